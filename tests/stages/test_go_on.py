"""A finished search that is made longer: it goes on from its Trials, and the rest is made anew where it changed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from stage_help import refused, words

from vitnas.cli import main
from vitnas.cli.fields import make_run, open_run
from vitnas.data import Readings
from vitnas.model.named import ArchFile, Chosen
from vitnas.records import Correlation, ExportRecord, LatencyRecord, Result, Results
from vitnas.searching import SearchRecord


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may make longer."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns


@pytest.mark.slow
def test_a_longer_search_goes_on_and_the_rest_follows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, weights = SearchRecord.read(run), stamp(run / "supernet.safetensors")
    ranked = Correlation.read(run)
    assert main(words(run, search__num_trials="14")) == 0
    after = SearchRecord.read(run)
    assert (before.num_scored, after.num_scored) == (6, 14)
    assert after.trials[:6] == before.trials, "none is scored again"
    assert stamp(run / "supernet.safetensors") == weights
    chosen = Result.read(run / "models" / "chosen").arch_id
    assert (
        chosen == after.chosen == Chosen.read(run).arch.id == ArchFile.read(run / "models" / "chosen").arch.id
    )
    rows = Results.read(run).rows
    assert [row.arch_id for row in rows] == [
        Result.read(run / "models" / role).arch_id for role in ("chosen", "hand_scaled", "random_search")
    ]
    assert {row.role for row in LatencyRecord.read(run / "export").rows} == {row.role for row in rows}
    params = Result.read(run / "models" / "chosen").params
    assert {file.params for file in ExportRecord.read(run / "export").files.values()} == {params}
    assert Correlation.read(run) == ranked
    changed = "is another Arch now" in " ".join(capsys.readouterr().out.split())
    assert len(Readings.read(run).readings) == 1 + changed, (
        "the test split is read again for other models only"
    )
    assert main(words(run, search__num_trials="14")) == 0
    assert "of 14" not in refused(words(run), capsys)


@pytest.mark.slow
def test_a_model_whose_arch_changed_is_made_anew_with_all_that_came_of_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the longer search had found something else: the model in place is of another Arch."""
    shutil.rmtree(run / "models" / "chosen")
    shutil.copytree(run / "models" / "hand_scaled", run / "models" / "chosen")
    exported = stamp(run / "export" / "model.onnx")
    assert main(words(run, search__num_trials="7")) == 0
    assert "chosen is another Arch now, and is trained anew" in " ".join(capsys.readouterr().out.split())
    search = SearchRecord.read(run)
    assert search.num_scored == 7
    assert Result.read(run / "models" / "chosen").arch_id == search.chosen
    assert stamp(run / "export" / "model.onnx") > exported
    assert Results.read(run).rows[0].arch_id == search.chosen
    assert len(Readings.read(run).readings) == 2
    assert "2 times" in (run / "report.html").read_text()


def test_a_run_of_before_there_was_a_field_means_what_it_meant(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Archs were scored by accuracy, and there were no folds; whoever repeats the command knows of neither."""
    path = run / "run.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.strip() not in ("score: loss", "folds: 1")))
    assert len(path.read_text().splitlines()) == len(lines) - 2
    assert open_run(run).search == replace(open_run(run).search, score="accuracy", folds=1)
    assert main(words(run)) == 0
    assert "search.score: 'accuracy' then, 'loss' now" in refused(words(run, search__score="loss"), capsys)
    assert "search.folds: 1 then, 2 now" in refused(words(run, search__folds="2"), capsys)
    mine = run / "mine.yaml"
    mine.write_text("search:\n  num_trials: 3\n")
    assert make_run(str(mine), {}).search.score == "loss", "a person's file has what there is by default"


def test_what_cannot_grow_is_refused_and_told_how(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: stamp(path) for path in run.rglob("*") if path.is_file()}
    error = refused(words(run, supernet__epochs="3"), capsys)
    assert "supernet.epochs: 2.0 then, 3.0 now" in error
    assert "give another folder=PATH to do all anew; only search.num_trials may grow" in error
    assert "search.num_trials: 6 then, 5 now" in refused(words(run, search__num_trials="5"), capsys)
    error = refused(words(run, search__num_trials="9", seed="1"), capsys)
    assert "seed: 0 then, 1 now" in error
    assert "num_trials: " not in error
    assert {path: stamp(path) for path in run.rglob("*") if path.is_file()} == before
