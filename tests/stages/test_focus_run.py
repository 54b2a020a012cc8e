"""A run with a learned sampler: it answers its own budget, and others afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
from stage_help import refused, words

from vitnas.cli import main
from vitnas.reporting import report
from vitnas.runs import read_json, read_jsonl

FOCUS = {
    "sampler__kind": "focus",
    "sampler__focus__every": "2",
    "sampler__focus__images": "16",
    "sampler__focus__updates": "1",
    "sampler__focus__draws": "16",
    "search__searcher": "sampler",
    "search__num_trials": "3",
    "retrain__baselines": "[]",
    "retrain__rank_archs": "0",
    "supernet__monitor_every": "0",
    "export__latency": "[]",
    "export__formats": "[]",  # exporting takes seconds per file; other tests export
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned") / "run"
    assert main(words(folder, **FOCUS)) == 0
    return folder


@pytest.fixture
def copy(learned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(learned, tmp_path / "run"))


def test_the_sampler_is_kept_and_watched(learned: Path) -> None:
    assert (learned / "sampler.safetensors").exists()
    summary = read_json(learned / "sampler.json")
    assert summary["quantity"] == "macs"
    assert [row["policy"]["n"] for row in summary["compared"]] == [8, 8, 8]
    lines = [line for line in read_jsonl(learned / "metrics.jsonl") if line.get("event") == "focus"]
    assert len(lines) >= 3
    assert {"gain", "miss", "cost_ratio", "entropy", "score"} <= lines[0].keys()
    assert "cost_ratio" not in lines[1], "what it would draw is recorded at every fourth look"
    search = read_json(learned / "search.json")
    assert search["num_scored"] == 3
    assert all(trial["costs"]["macs"] <= 200_000 for trial in search["trials"])


def test_a_family_of_answers(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["specialize", str(copy), "--budget", "[macs<=120K, macs<=200K and params<=1M]"]) == 0
    said = capsys.readouterr().out
    family = read_json(copy / "family.json")
    assert [row["budget"] for row in family] == ["macs<=120K", "macs<=200K and params<=1M"]
    for row, most in zip(family, (120_000, 200_000), strict=True):
        assert row["arch_id"] in said
        assert row["cost"]["macs"] <= most
        assert row["source"] == "sampler"
        assert row["evaluated"] == 1, "a twentieth of the search's evaluations, at least one"
        folder = copy / row["path"]
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert sum(p.numel() for p in model.parameters()) == row["cost"]["params"]
        assert read_json(folder / "export.json") == {}, "the run's export.formats are none"
    page = report(copy).read_text()
    assert "What the sampler learned" in page
    assert "Answers to other budgets" in page
    assert main(["specialize", str(copy), "budget=macs<=120K"]) == 0
    assert len(read_json(copy / "family.json")) == 2, "an answer replaces the one to the same budget"


@pytest.mark.slow
def test_an_answer_is_exported_as_the_run_says(copy: Path) -> None:
    path = copy / "run.yaml"
    path.write_text(path.read_text().replace("formats: []", "formats: [onnx]"))
    assert main(["specialize", str(copy), "budget=macs<=120K"]) == 0
    (row,) = read_json(copy / "family.json")
    record = read_json(copy / row["path"] / "export.json")["onnx"]
    assert record["max_abs_diff"] < 1e-4
    assert (copy / row["path"] / "model.onnx").stat().st_size > 1000


def test_bad_questions_get_one_sentence(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = refused(["specialize", str(copy), "budget=macs<=1"], capsys)
    assert "'macs<=1' is outside what the sampler learned: macs from " in outside
    other = refused(["specialize", str(copy), "budget=params<=1M"], capsys)
    assert "has no upper bound on macs, which is what the sampler was trained for" in other
    path = copy / "run.yaml"
    path.write_text(path.read_text().replace("num_heads:\n  - 1\n  - 2", "num_heads:\n  - 2\n  - 3"))
    changed = refused(["specialize", str(copy), "budget=macs<=120K"], capsys)
    assert "was trained on other genes than those of" in changed
    assert not (copy / "family.json").exists()


def test_a_run_without_a_sampler_cannot_ask_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(words(tmp_path / "run", search__searcher="sampler"), capsys)
    assert "search.searcher is 'sampler' but sampler.kind is 'uniform', which learns nothing" in error
    assert not (tmp_path / "run").exists()


def test_the_summary_is_plain_json(learned: Path) -> None:
    assert json.loads((learned / "sampler.json").read_text())["preferences"]["depth"]
