"""Model cards of a run, and what is pushed to the Hub: nothing leaves this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import vitnas
from vitnas.cli import main
from vitnas.errors import UserError
from vitnas.exporting.card import card_of
from vitnas.records import Result
from vitnas.reporting import write_cards
from vitnas.reporting.tables import interval


class Hub:
    """Takes what is pushed."""

    def __init__(self) -> None:
        self.repos: list[tuple[str, bool]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.repos.append((repo, private))

    def upload_folder(self, *, folder_path: str, repo_id: str, commit_message: str) -> None:
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def test_a_run_has_cards_beside_its_models_and_files(finished: Path) -> None:
    card = huggingface_hub.ModelCard.load(finished / "models" / "chosen" / "README.md")
    result = Result.read(finished / "models" / "chosen")
    assert (card.data.license, card.data.to_dict()["library_name"], card.data.pipeline_tag) == (
        "unknown",
        "timm",
        "image-classification",
    )
    (scored,) = card.data.eval_results
    assert (scored.metric_value, scored.dataset_split) == (round(result.test_accuracy or 0, 4), "test")
    for told in (
        interval(result.test_accuracy, result.n_test),
        "digits",
        "macs<=200K",
        "on onnxruntime, cpu, batch 1",
        "1 epochs from scratch",
        "which of 10 classes",
        "local-dir:",
    ):
        assert told in card.text, told
    other = (finished / "models" / "hand_scaled" / "README.md").read_text()
    assert "hand-scaled ViT" in other
    files = huggingface_hub.ModelCard.load(finished / "export" / "README.md")
    assert files.data.to_dict()["library_name"] == "onnx"
    assert "onnxruntime.InferenceSession" in files.text
    for where in (finished / "front").iterdir():
        told = (where / "README.md").read_text()
        assert "| Accuracy of these weights | " in told
        assert "its weights are taken from the supernet, and not trained further" in told


def test_a_run_is_pushed_with_its_card_and_files(finished: Path, hub: Hub, capsys: Any) -> None:
    assert main(["push", str(finished), "me/digits", "license=mit", "private=true"]) == 0
    assert hub.repos == [("me/digits", True)]
    assert "https://huggingface.co/me/digits" in capsys.readouterr().out
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors", "model.onnx", "predict.py"}
    card = huggingface_hub.ModelCard(hub.files["README.md"].decode())
    assert card.data.license == "mit"
    assert "hf-hub:me/digits" in card.text
    assert "PATH_OF_THIS_FOLDER" not in card.text
    assert "InferenceSession" in card.text
    assert "license: unknown" in (finished / "models" / "chosen" / "README.md").read_text()
    vitnas.push(f"{finished}@hand_scaled", "me/other")
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors"}


def test_what_cannot_be_pushed_is_refused(finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    class Refuses(Hub):
        def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
            raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nand more")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refuses)
    with pytest.raises(UserError, match=r"cannot be written \(Token is required\); .* `hf auth login`"):
        vitnas.push(finished, "me/digits")
    copy = tmp_path / "chosen"
    shutil.copytree(finished / "models" / "chosen", copy)
    card = copy / "README.md"
    card.write_text(card.read_text().replace("license: unknown", "license: mit"))
    with pytest.raises(UserError, match=r"license is 'apache-2.0', and .* names 'mit'; one of them is wrong"):
        vitnas.push(copy, "me/digits", licence="apache-2.0")
    card.unlink()
    with pytest.raises(UserError, match=r"chosen has no README.md; a model that is pushed has config.json"):
        vitnas.push(copy, "me/digits")


def test_cards_are_of_what_is_there(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("results.json", "export/latency.json", "manifest.json"):
        (run / name).unlink()
    result = Result.read(run / "models" / "chosen")
    Result(**{**vars(result), "test_accuracy": None, "n_test": None}).write(run / "models" / "chosen")
    write_cards(run)
    text = (run / "models" / "chosen" / "README.md").read_text()
    assert "holdout images" in text
    assert "not tested" in text
    assert "Latency" not in text


@pytest.mark.parametrize(
    "damaged", ["{}", "0.5", "[]", '{"architecture": "x"}', '{"architecture": "test_vit", "label_names": 3}']
)
def test_a_damaged_description_of_a_model_is_told_in_a_sentence(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(damaged)
    with pytest.raises(UserError, match=r"config\.json does not say what was saved"):
        card_of(tmp_path)
