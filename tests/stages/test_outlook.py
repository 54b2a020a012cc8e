"""What a run will take is told before it begins, and kept to the time given."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from pretrain_help import pretrain_words
from stage_help import refused, words

from vitnas.cli import main
from vitnas.cli.fields import make_run, open_run
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.recipes import RECIPES
from vitnas.searching import Feasibility
from vitnas.searching.feasibility import FeasibilityRow
from vitnas.stages import forecast
from vitnas.stages.claim import begin
from vitnas.stages.context import Context
from vitnas.stages.forecast import to_halve
from vitnas.stages.outlook import Outlook, settled, shortened
from vitnas.stages.run import FinalsConfig


def test_a_dry_run_says_what_each_stage_takes_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*words(folder), "dry=true"]) == 0
    said = capsys.readouterr().out
    assert f"tour into {folder}" in said
    for stage in ("train", "search", "retrain", "export", "bench", "evaluate", "all"):
        assert f"\n  {stage} " in said
    assert "half as long: supernet.epochs=1 retrain.train.epochs=" in said
    assert "disk " in said
    assert "memory " in said
    assert [*tmp_path.iterdir()] == []


def test_a_short_run_looks_not_ahead(finished: Path) -> None:
    assert not Outlook.exists(finished)


def plant(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """Steps that take what a test says."""
    monkeypatch.setattr(forecast, "_step", lambda *_: step_s)
    monkeypatch.setattr(forecast, "FILE_S", 0.0)
    monkeypatch.setattr(forecast, "TIMING_S", 0.0)


def test_what_is_trained_to_choose_by_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a supernet; the epochs of 3 Archs in rungs of 1 and 2 epochs are 3 + 2."""
    plant(monkeypatch, 10.0)
    argv = words(tmp_path / "run", search__searcher="halving", search__num_trials="3", finals__epochs="2")
    fields = dict(word.partition("=")[::2] for word in argv[3:])
    run = make_run("tour", {**fields, "retrain.rank_archs": "0", "retrain.train.epochs": "4"})
    epoch_s = 6 * 10.0
    for baselines, epochs in ((), 4), (("hand_scaled",), 4 + 4 + 5), (("random_search",), 4 + 4 + 5):
        found = forecast.look_ahead(
            Context(replace(run, retrain=replace(run.retrain, baselines=baselines)), tmp_path / "run"),
            Feasibility(()),
        )
        took = [found.stages[name] for name in ("train", "search", "finals", "retrain")]
        assert took == [0, 3 * epoch_s, 2 * epoch_s, epochs * epoch_s]


def test_archs_that_are_timed_are_told_those_that_are_too_slow_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two targets; of four Archs one is fast enough, so four are timed for each that is scored."""
    plant(monkeypatch, 0.0)
    monkeypatch.setattr(forecast, "quick_meter", str)
    monkeypatch.setattr(forecast, "measure_ms", lambda *_: time.sleep(0.01))
    argv = words(tmp_path / "run", search__num_trials="40", retrain__baselines="[random_search]")
    run = make_run("tour", dict(word.partition("=")[::2] for word in argv[3:]))
    found = []
    for budget in ("macs<=1M", "latency<=3ms@torch and latency<=3ms@onnxruntime"):
        row = FeasibilityRow("latency on torch", "ms", 1.0, 9.0, "", 0.25, 4)
        context = Context(replace(run, budget=budget), tmp_path)
        found.append(forecast.look_ahead(context, Feasibility((row,))))
    assert found[0].clock_s == 0
    assert found[1].clock_s >= 4 * 2 * 0.01
    for stage in ("search", "retrain"):
        assert found[1].stages[stage] >= 40 * found[1].clock_s
    assert "to time each and those that are too slow" in str(forecast.table(run, found[1]).rows)
    assert "too slow" not in str(forecast.table(run, found[0]).rows)


@pytest.mark.slow
def test_a_dry_run_of_folds_and_of_a_supernet_that_learns_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    for argv, told in (
        (words(folder, search__folds="3"), "3 parts of train in turn; an accuracy of 90%"),
        (pretrain_words(folder, pretrain__model="supernet"), "half as long: epochs=0.5, or time="),
    ):
        assert main([*argv, "dry=true"]) == 0
        assert told in capsys.readouterr().out
        assert [*tmp_path.iterdir()] == []


def test_folds_take_a_supernet_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, 10.0)
    took = []
    for folds in (1, 3):
        fields = dict(word.partition("=")[::2] for word in words(tmp_path, search__folds=str(folds))[3:])
        run = make_run("tour", {**fields, "retrain.rank_archs": "0", "supernet.monitor_every": "0"})
        took.append(forecast.look_ahead(Context(run, tmp_path), Feasibility(())).stages["train"])
    assert took[1] == 3 * took[0] > 0


def test_what_is_timed_costs_about_what_will_be_trained(tmp_path: Path) -> None:
    """The middle Arch of a Space may cost a third of what its budget allows."""
    fields = dict(word.partition("=")[::2] for word in words(tmp_path / "run")[3:])
    run = make_run("tour", fields)  # at most 200,000 MACs
    row = FeasibilityRow("latency on torch", "ms", 1.0, 9.0, "", 0.5, 6, macs_met=150_000)
    for budget, rows, most in (
        ("macs<=200K", (), 200_000),
        ("latency<=3ms@torch", (row,), 150_000),
        ("300K<=macs<=400K and latency<=3ms@torch", (row,), 150_000),
        ("macs<=100K and latency<=3ms@torch", (row,), 100_000),
    ):
        context = Context(replace(run, budget=budget), tmp_path)
        macs = [count(arch).macs for arch in forecast.likely(context, Feasibility(rows))]
        assert len(macs) == forecast.LIKELY
        assert all(forecast.NEAR * most <= each <= most for each in macs), budget
    context = Context(replace(run, budget=""), tmp_path)
    assert forecast.likely(context, Feasibility(())) == [context.space.middle()]
    none_met = Feasibility((replace(row, macs_met=None),))
    small = max(count(arch).macs for arch in forecast.likely(context, none_met))
    assert small < count(context.space.middle()).macs


def test_a_run_is_shortened_once_to_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, 10.0)
    argv = words(
        tmp_path / "run", supernet__epochs="40", retrain__train__epochs="40", search__num_trials="200"
    )
    fields = dict(word.partition("=")[::2] for word in argv[3:])
    run = make_run("tour", {**fields, "time": "1h"})
    context = Context(run, tmp_path / "run")
    begin(context)
    found = Outlook.read(tmp_path / "run")
    assert 0 < found.share < 1
    assert found.seconds == pytest.approx(3600, rel=0.05)
    assert context.run.supernet.epochs == pytest.approx(40 * found.share)
    assert context.models.config.train.epochs == pytest.approx(40 * found.share)
    assert context.run.search.num_trials < 200
    assert open_run(tmp_path / "run") == run, "run.yaml says what was asked for"
    plant(monkeypatch, 99.0)  # a busier day
    later = Context(run, tmp_path / "run")
    begin(later)
    assert later.run == context.run
    assert settled(replace(run, time=None), tmp_path / "run").supernet.epochs == 40


def test_too_little_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, 100.0)
    said = refused([*words(tmp_path / "run", supernet__epochs="40"), "time=1m"], capsys)
    assert "time is 1m; the least that is worth it, 2 epochs, takes about" in said
    assert not (tmp_path / "run" / "run.yaml").exists()
    for name, message in (
        ("tour", "time is 'soon'; it is a number"),
        ("slim", "a run of slim has slim.time"),
    ):
        with pytest.raises(UserError, match=message):
            replace(RECIPES[name](), time="soon" if name == "tour" else "1h")


def test_what_halves_a_run_halves_it() -> None:
    run = RECIPES["images"]()
    half = shortened(run, 0.5)
    assert (half.supernet.epochs, half.supernet.warmup_epochs) == (50, 2.5)
    assert (half.search.num_trials, half.retrain.train.epochs, half.retrain.rank_epochs) == (100, 50, 5)
    found = Outlook(
        stages={"train": 100.0, "retrain": 20.0}, share=1, step_s=1, model_step_s=1, image_s=1,
        memory_bytes=1, disk_bytes=1,
    )  # fmt: skip
    said = to_halve(run, found)
    assert said.endswith("retrain.rank_epochs=5, or time=60s")
    assert "supernet.epochs=50 search.num_trials=100 retrain.train.epochs=50" in said
    many = replace(run, search=replace(run.search, num_trials=4000))
    assert " search.num_trials=2000 " in to_halve(many, found), "a number that the command line takes"
    trains = replace(run, search=replace(run.search, searcher="halving"), finals=FinalsConfig(epochs=8))
    assert to_halve(trains, found) == (
        "half as long: search.num_trials=100 retrain.train.epochs=50 finals.epochs=4, or time=60s"
    ), "without a supernet none is shorter"
