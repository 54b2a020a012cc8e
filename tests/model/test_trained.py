"""Trained networks by what a user types: one reading of it, for weights, images' constants and Spaces alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitnas.errors import UserError
from vitnas.model.trained import Trained, find_trained

NAME = "vit_tiny_patch16_224"


def test_names_folders_and_files(tmp_path: Path) -> None:
    file = tmp_path / "weights.anything"
    file.touch()
    for name in (NAME, f"{NAME}.augreg_in21k", "hf-hub:timm/some_model"):
        assert find_trained(name, what="pretrained") == Trained(name)
    assert find_trained(f"{NAME}@{file}", what="pretrained") == Trained(NAME, file=file)
    assert find_trained(str(tmp_path), what="pretrained") == Trained(f"local-dir:{tmp_path}", folder=tmp_path)
    assert find_trained(f"local-dir:{tmp_path}", what="pretrained") == find_trained(
        str(tmp_path), what="pretrained"
    )
    with pytest.raises(UserError, match=r"weights\.anything', a file that holds no network .* NAME@FILE"):
        find_trained(str(file), what="pretrained")
    with pytest.raises(UserError, match=r"a file of weights does not say what they are of\. Write NAME@/"):
        find_trained(str(file.with_suffix(".pth")), what="pretrained")


def test_models_of_a_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in ("models/chosen", "models/hand_scaled", "front/d16-l2-ab12"):
        (run / folder).mkdir(parents=True)
        (run / folder / "config.json").touch()
    (run / "run.yaml").touch()
    for text, folder in (
        ("", "models/chosen"),
        ("@hand_scaled", "models/hand_scaled"),
        ("@d16-l2-ab12", "front/d16-l2-ab12"),
        ("/front/d16-l2-ab12", "front/d16-l2-ab12"),
    ):
        where = run / folder
        assert find_trained(f"{run}{text}", what="pretrained") == Trained(f"local-dir:{where}", folder=where)
    with pytest.raises(
        UserError, match=r"has no model 'hand' \(it has: d16-l2-ab12, chosen, hand_scaled\).*Nearest: 'ha"
    ):
        find_trained(f"{run}@hand", what="pretrained")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.yaml").touch()
    with pytest.raises(
        UserError, match=r"new has no model 'chosen' \(it has: none yet\)\. .* or let the run make it"
    ):
        find_trained(str(tmp_path / "new"), what="pretrained")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vit_tyny_patch16_224", rf"it must be a folder .*, alone or as NAME@FILE\. Nearest: '{NAME}'\.$"),
        ("vit_tyny_patch16_224@a.pth", rf"; it must be a folder .* Nearest: '{NAME}'\.$"),
        ("runs/mine/models/chosen", r"it must be a folder of a saved model or .* NAME@FILE\. Correct it\.$"),
        ("local-dir:no/such", r", but there is no folder 'no/such'\. Correct the path\.$"),
        (f"{NAME}@no/weights.pth", r", but there is no file 'no/weights\.pth'\. Correct the path\.$"),
        (
            "a.pth.tar",
            r"a file of weights does not say what they are of\. Write NAME@a\.pth\.tar, for example",
        ),
    ],
)
def test_what_is_none_of_these_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^task\.teacher is '{text}'.*{message}"):
        find_trained(text, what="task.teacher")
