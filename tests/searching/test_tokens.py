"""Archs that keep fewer tokens are returned only where they are faster than with all, as measured side by side."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
from search_help import Stub, score
from torch import nn

from vitnas.arch import Arch
from vitnas.searching import Study, TokenClock, search, token_speeds, withdraw_slower
from vitnas.space import autoformer
from vitnas.space.keeps import keeping_all

SPACE = autoformer(
    "micro", image_size=16, patch_size=4, num_classes=10, keep=(1.0, 0.5), selector="attention"
)
TARGET = "onnxruntime,batch=1"


class Clock:
    """2 ms per block, half of it where patches were dropped, and `selection_ms` for each time that happens."""

    def __init__(self, selection_ms: float) -> None:
        self.selection_ms = selection_ms

    def measure(self, model: nn.Module) -> float:
        arch, ms, left = model.arch, 0.0, 1.0
        assert isinstance(arch, Arch)
        for block in arch.blocks:
            if block.keep is not None:
                left, ms = 0.5, ms + self.selection_ms
            ms += 2 * left
        return ms


class SideBySide(Clock):
    """Times Models together."""

    def measure(self, model: nn.Module) -> float:
        assert isinstance(model.arch, Arch)
        assert model.arch.selector is None, "timed alone"
        return super().measure(model)

    def compare(self, models: Mapping[str, nn.Module]) -> dict[str, SimpleNamespace]:
        assert [*models] == ["kept", "full"]
        return {name: SimpleNamespace(median_ms=Clock.measure(self, each)) for name, each in models.items()}


def wide(arch: Arch) -> dict[str, float]:
    """Better with fewer tokens, so that only time speaks against them."""
    return {"accuracy": score(arch)["accuracy"] + 0.2 * (arch.selector is not None)}


@pytest.mark.parametrize("clock", [Clock, SideBySide])
@pytest.mark.parametrize(("selection_ms", "wins"), [(0.1, True), (9.0, False)])
def test_a_slow_selection_is_never_scored_where_latency_is_measured(
    clock: type[Clock], selection_ms: float, wins: bool
) -> None:
    study = search(
        Study.open(SPACE, "latency<=30ms"),
        wide,
        searcher="random",
        num_trials=20,
        latency_meter=clock(selection_ms),
        build=Stub,
    )
    assert (study.best().arch.selector is not None) == wins
    with_fewer = [trial for trial in study.trials() if trial.arch.selector]
    assert {trial.state for trial in with_fewer} == {"scored" if wins else "rejected"}
    rejections = study.summary().rejections
    assert rejections.get(f"fewer tokens are not faster than all on {TARGET}", 0) == (
        0 if wins else len(with_fewer)
    )
    trial = with_fewer[0]
    assert trial.cost.latency_ms == {TARGET: Clock(selection_ms).measure(Stub(trial.arch))}


@pytest.mark.parametrize(("selection_ms", "wins"), [(0.1, True), (9.0, False)])
def test_a_slow_selection_leaves_the_front_of_a_search_without_a_clock(
    selection_ms: float, wins: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    storage = tmp_path_factory.mktemp("study") / "study.db"
    study = search(Study.open(SPACE, storage=storage), wide, searcher="random", num_trials=20)
    before = [trial for trial in study.front() if trial.arch.selector]
    assert before
    clock = TokenClock({TARGET: Clock(selection_ms)}, Stub)
    withdraw_slower(study, study.front, clock)
    speeds = clock.speeds
    assert {speed.is_faster for speed in speeds} == {wins}
    assert {trial.arch.id for trial in before} <= {speed.arch_id for speed in speeds}
    with Study.open(SPACE, storage=storage) as again:  # another process sees the same
        for each in (study, again):
            left = [trial for trial in each.front() if trial.arch.selector]
            assert left == (before if wins else [])
            assert len(each.scored()) == 20 - (0 if wins else len({speed.arch_id for speed in speeds}))
            assert (each.best().arch.selector is not None) == wins


def test_beside_the_same_arch_with_all_tokens() -> None:
    arch = SPACE.smallest()
    (speed,) = token_speeds(arch, {TARGET: Clock(1.0)}, Stub)
    full = keeping_all(arch)
    assert full.selector is None
    assert [block.mlp_hidden for block in full.blocks] == [block.mlp_hidden for block in arch.blocks]
    assert (speed.ms, speed.full_ms) == (Clock(1.0).measure(Stub(arch)), 2.0 * arch.depth)
    assert (
        speed.reason
        == f"fewer tokens are not faster than all on {TARGET}: {speed.ms:.2f} ms against {speed.full_ms:.2f} ms"
    )
