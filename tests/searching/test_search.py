"""The loop: what is refused, what is rejected and never scored, how it stops, what it gives back."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace

import pytest
from optuna.storages import InMemoryStorage
from search_help import BUDGET, DOZEN, MICRO, Stub, evolution, score, told
from torch import nn

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.errors import UserError
from vitnas.measure import LatencyMeter
from vitnas.searching import Objective, RandomSearch, Study, Trial, search
from vitnas.searching.latency import meters_of

TARGET = "onnxruntime,batch=1"


class DepthMeter:
    """A clock that depends on the depth alone: 2 ms per block."""

    def __init__(self) -> None:
        self.num_measured = 0

    def measure(self, model: nn.Module) -> SimpleNamespace:
        self.num_measured += 1
        assert isinstance(model, Stub)
        return SimpleNamespace(median_ms=2.0 * model.arch.depth)


def test_as_the_readme_shows() -> None:
    supernet = SimpleNamespace(space=MICRO)
    study = search(Study.open(supernet.space, Budget(macs=(0.6e6, 0.7e6))), score, num_trials=20)
    best = study.best()
    assert 0.6e6 <= best.cost.macs <= 0.7e6
    assert best.values == score(best.arch)
    assert len(study.scored()) == 20


def test_the_same_seed_gives_the_same_search() -> None:
    first, second, other = (
        search(Study.open(MICRO, BUDGET, seed=seed), score, searcher=evolution(), num_trials=25)
        for seed in (1, 1, 2)
    )
    assert told(first) == told(second) != told(other)


def test_num_trials_counts_earlier_runs() -> None:
    storage = InMemoryStorage()
    for wanted, there in ((5, 5), (12, 12), (12, 12), (3, 12)):
        study = search(
            Study.open(MICRO, BUDGET, storage=storage), score, searcher="random", num_trials=wanted
        )
        assert len(study.scored()) == there


def test_an_evaluator_of_test_images_is_refused() -> None:
    class Cheat:
        split = "test"

        def __call__(self, arch: Arch) -> dict[str, float]:
            raise AssertionError("must not run")

    with pytest.raises(UserError, match="evaluator's split is 'test'; a search that looks at test images"):
        search(Study.open(MICRO), Cheat())


def test_an_impossible_budget_is_refused_before_anything_runs() -> None:
    def evaluator(arch: Arch) -> dict[str, float]:
        raise AssertionError("must not run")

    message = r"macs<=1K cannot be met; micro ranges from \d+\.\d\dK to 2\.\d\dM\. Change the limit"
    with pytest.raises(UserError, match=message):
        search(Study.open(MICRO, "macs<=1K"), evaluator)


def test_latency_is_measured_and_what_misses_it_is_never_scored() -> None:
    meter, seen = DepthMeter(), []

    def evaluator(arch: Arch) -> dict[str, float]:
        seen.append(arch)
        return score(arch)

    study = search(
        Study.open(MICRO, "latency<=6ms"),
        evaluator,
        searcher="random",
        num_trials=15,
        latency_meter=meter,
        build=Stub,
    )
    assert all(arch.depth <= 3 for arch in seen)
    rejected = [trial for trial in study.trials() if trial.state == "rejected"]
    assert rejected
    assert meter.num_measured == len(seen) + len(rejected)
    assert rejected[0].reasons == (f"latency on {TARGET} is 8.00ms; the budget allows at most 6.00ms",)
    assert rejected[0].values == {}
    assert rejected[0].cost.latency_ms == {TARGET: 8.0}
    summary = study.summary()
    assert summary.rejections == {f"latency<=6ms@{TARGET}": len(rejected)}
    assert summary.trials[0].costs.latency_ms.keys() == {TARGET}
    stored = study._study.get_trials()
    violations = [row.constraints[f"latency<=6ms@{TARGET}"] for row in stored]
    assert {round(value, 3) for value in violations} == {0.0, 0.333}


def test_a_tighter_latency_limit_changes_the_result() -> None:
    best = [
        search(
            Study.open(MICRO, f"latency<={limit}ms"),
            score,
            num_trials=30,
            latency_meter={TARGET: DepthMeter()},
            build=Stub,
        )
        .best()
        .arch.depth
        for limit in (6, 4)
    ]
    assert best == [3, 2]


def test_latency_as_an_objective() -> None:
    study = search(
        Study.open(MICRO, objectives=(Objective("accuracy"), Objective(f"latency@{TARGET}", "minimize"))),
        score,
        searcher="random",
        num_trials=12,
        latency_meter=DepthMeter(),
        build=Stub,
    )
    assert len({trial.cost.latency_ms[TARGET] for trial in study.front()}) == len(study.front())


def test_a_latency_limit_without_a_meter_is_refused() -> None:
    with pytest.raises(UserError, match="latency on onnxruntime,batch=1 has no meter; a limit or objective"):
        search(Study.open(MICRO, "latency<=6ms"), score)
    two = "latency<=6ms and latency<=9ms@torch,batch=1"
    with pytest.raises(UserError, match="as a mapping from target to meter"):
        search(Study.open(MICRO, two), score, latency_meter=DepthMeter())


def test_a_meter_answers_for_its_own_target_only() -> None:
    """Seconds of 64 images were taken for those of one."""
    other = LatencyMeter("torch,batch=64")
    with pytest.raises(
        UserError, match=r"onnxruntime,batch=1 has a meter of torch,batch=64; a meter answers"
    ):
        search(Study.open(MICRO, "latency<=5s@onnxruntime,batch=1"), score, latency_meter=other)
    wrong = {"torch,batch=1": other}
    with pytest.raises(UserError, match=r"torch,batch=1 has a meter of torch,batch=64"):
        search(Study.open(MICRO, "latency<=5s@torch,batch=1"), score, latency_meter=wrong)
    own = meters_of(LatencyMeter("torch,batch=8"), ["torch, threads=1, batch=8"])
    assert list(own) == ["torch, threads=1, batch=8"]


def test_a_search_that_only_rejects_stops(caplog: pytest.LogCaptureFixture) -> None:
    study = search(
        Study.open(MICRO, "latency<=1ms"),
        score,
        num_trials=3,
        max_rejections=7,
        latency_meter=DepthMeter(),
        build=Stub,
    )
    assert (len(study.scored()), study.num_rejected()) == (0, 7)
    assert "stopped after 7 Archs missed the budget" in caplog.text
    assert study.summary().chosen is None


def test_a_small_space_ends_early_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        study = search(Study.open(DOZEN), score, num_trials=50)
    assert len(study.scored()) == 12
    assert "the search has tried 12 Archs; no other was found" in caplog.text


def test_an_evaluator_that_raises_gives_its_trial_back() -> None:
    calls: list[Arch] = []

    def evaluator(arch: Arch) -> dict[str, float]:
        calls.append(arch)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return score(arch)

    study = Study.open(MICRO, BUDGET)
    with pytest.raises(RuntimeError, match="out of memory"):
        search(study, evaluator, searcher="random", num_trials=8)
    search(study, evaluator, searcher="random", num_trials=8)
    assert calls[3] == calls[4]
    assert len({arch.id for arch in calls}) == 8
    assert told(study) == told(search(Study.open(MICRO, BUDGET), score, searcher="random", num_trials=8))


def test_each_trial_is_reported() -> None:
    reported: list[Trial] = []
    study = search(
        Study.open(MICRO),
        score,
        searcher=RandomSearch(),
        num_trials=4,
        on_trial=lambda _, trial: reported.append(trial),
    )
    assert reported == study.scored()


def test_the_study_that_was_given_comes_back() -> None:
    study = Study.open(MICRO, BUDGET)
    assert search(study, score, num_trials=3) is study
    assert len(study.scored()) == 3


def test_bad_arguments() -> None:
    with pytest.raises(
        UserError, match=r"searcher is 'evolutoin'; it must be one of autoformer, .* Nearest: 'evol"
    ):
        search(Study.open(MICRO), score, searcher="evolutoin")
    with pytest.raises(UserError, match="num_trials is 0; a search scores at least 1 Arch"):
        search(Study.open(MICRO), score, num_trials=0)


def test_global_random_state_is_left_alone() -> None:
    random.seed(3)
    before = random.getstate()
    search(Study.open(MICRO, BUDGET), score, searcher=evolution(), num_trials=15)
    assert random.getstate() == before
