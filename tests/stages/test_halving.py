"""searcher=halving: a whole run without a supernet, whose Archs are trained in rungs."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_help import Warm, has_step, outcome, refused, words

from vitnas.cli import main
from vitnas.cli.fields import make_run
from vitnas.errors import UserError
from vitnas.exporting import load_timm
from vitnas.records import Correlation, Finals, Result, Results
from vitnas.searching import SearchRecord

HALVING = {
    "search__searcher": "halving",
    "search__num_trials": "3",
    "finals__epochs": "1",
    "retrain__baselines": "[random_search]",
    "export__formats": "[]",
    "export__latency": "[]",
}


@pytest.mark.slow
def test_a_search_without_a_supernet(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(words(folder, **{**HALVING, "search__num_trials": "2", "retrain__baselines": "[]"})) == 0
    assert not (folder / "supernet.safetensors").exists()
    finals = Finals.read(folder)
    assert [len(each.rungs) for each in finals.finalists] == [1, 1]
    assert Result.read(folder / "models" / "chosen").arch_id == finals.chosen
    assert load_timm(folder / "front" / finals.chosen) is not None


@pytest.mark.slow
def test_a_run_without_a_supernet(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(words(folder, **HALVING)) == 0
    assert not (folder / "supernet.safetensors").exists()
    search, finals = SearchRecord.read(folder), Finals.read(folder)
    assert search.num_scored == len(finals.finalists) == 3
    assert [len(each.rungs) for each in finals.finalists] == [2, 2, 1]
    assert {rung.epochs for each in finals.finalists for rung in each.rungs} == {0.5, 1}
    first = {each.arch_id: each.rungs[0].accuracy for each in finals.finalists}
    assert {trial.arch_id: trial.values["accuracy"] for trial in search.trials} == first
    rows = {row.role: row for row in Results.read(folder).rows}
    assert rows["chosen"].arch_id == finals.chosen
    spent = {role: row.spent for role, row in rows.items()}
    assert spent["chosen"] is not None
    assert spent["random_search"] is not None
    own = 6 * 32
    assert spent["chosen"].learned == finals.spent.learned + own
    # Random search is given as many epochs, rounded: 1 + 1 + 0.5 are 2 Archs of 1.
    assert spent["random_search"].learned == 2 * own + own
    for arch_id in search.front:
        assert load_timm(folder / "front" / arch_id) is not None
    assert "no supernet" in Correlation.read(folder).note
    page = (folder / "report.html").read_text()
    assert "after a brief training each" in page
    assert "every Arch of the front: config and weights of a brief training" in page
    assert "supernet: missing" not in page
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert main(words(folder, **HALVING)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_needs_a_supernet_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for field, value in (
        ("retrain.start", "inherited"),
        ("pretrained", "test_vit"),
        ("sampler.kind", "focus"),
    ):
        with pytest.raises(
            UserError, match=rf"{field} is '.*' and search.searcher is 'halving', which trains no"
        ):
            make_run("tour", {"search.searcher": "halving", field: value})
    assert "halving" in refused(words(tmp_path, search__searcher="halvin"), capsys)


@pytest.mark.slow
def test_halving_that_is_killed_goes_on(warm: Warm, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main(words(whole, **HALVING)) == 0
    for ready in (
        has_step(folder, "finals/search/", 2),
        lambda: len([*folder.glob("finals/search/*/rung0.json")]) == 2,
        lambda: len([*folder.glob("finals/search/*/rung1.json")]) == 1,
        has_step(folder, "finals/random_search/", 5),
    ):
        warm.kill_when(words(folder, **HALVING), ready)
    warm.run(words(folder, **HALVING))
    got, want = outcome(folder), outcome(whole)
    for name in ("weights", "trials", "chosen"):
        assert got[name] == want[name], name
    assert Result.read(folder / "models" / "chosen").arch_id == Finals.read(whole).chosen
