"""The feasibility table: ranges, shares, latency, and what is refused before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from search_help import DOZEN, MICRO
from torch import nn

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.searching import Feasibility, feasibility
from vitnas.space import mixer_space


class Stub(nn.Module):
    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = arch


class DepthMeter:
    def measure(self, model: nn.Module) -> SimpleNamespace:
        assert isinstance(model, Stub)
        return SimpleNamespace(median_ms=2.0 * model.arch.depth)


def test_rows_ranges_and_shares(tmp_path: Path) -> None:
    table = feasibility(MICRO, "500K<=macs<=700K and params<=40K", n=20_000)
    rows = {row.quantity: row for row in table.rows}
    costs = MICRO.cost_table().costs(MICRO.random_matrix(20_000, np.random.default_rng(5)))
    inside = (costs["macs"] >= 5e5) & (costs["macs"] <= 7e5)
    assert rows["macs"].share_feasible == pytest.approx(inside.mean(), abs=0.02)
    both = inside & (costs["params"] <= 4e4)
    assert rows["all limits"].share_feasible == pytest.approx(both.mean(), abs=0.02)
    assert rows["macs"].space_min == MICRO.cost_table().costs(_row(MICRO.smallest()))["macs"][0]
    assert rows["macs"].space_max == MICRO.cost_table().costs(_row(MICRO.largest()))["macs"][0]
    assert rows["macs"].requested == "500K<=macs<=700K"
    table.write(tmp_path)
    assert Feasibility.read(tmp_path) == table


def test_the_range_is_that_of_all_archs_not_of_the_largest() -> None:
    """The mixer with the most multiply-accumulates is not the one with the most weights."""
    space = mixer_space("micro")
    row = feasibility(space, "params>=520K", n=2000).rows[0]
    assert row.space_max == 533_426
    with pytest.raises(UserError, match=r"params>=534K cannot be met; mixers_micro ranges from .* to 533\.4"):
        feasibility(space, "params>=534K", n=100)


def _row(arch: Arch) -> np.ndarray:
    return np.array([MICRO.encode(arch)])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("macs<=100K", r"macs<=100K cannot be met; micro ranges from 1\d\d\.\d\dK to 2\.\d\dM\. Change"),
        ("macs>=3M", r"macs>=3M cannot be met; micro ranges from"),
        ("params<=1K", r"params<=1K cannot be met; micro ranges from"),
        ("memory<=1B", r"memory<=1B cannot be met; micro ranges from \d+\.\d\dKB"),
        (
            "params<=10K and macs>=2M",
            r"is met by no Arch that was found; micro ranges over macs from .*; params",
        ),
    ],
)
def test_impossible_budgets_are_refused_with_the_range(budget: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        feasibility(MICRO, budget, n=5_000)


def test_a_gap_in_a_small_space_is_found() -> None:
    with pytest.raises(UserError, match="is met by no Arch that was found"):
        feasibility(DOZEN, "200K<=macs<=210K", n=2_000)


def test_a_limit_that_draws_miss_but_repair_reaches() -> None:
    smallest = MICRO.cost_table().costs(_row(MICRO.smallest()))["macs"][0]
    rows = feasibility(MICRO, f"macs<={smallest}", n=50).rows
    assert rows[0].share_feasible == 0
    assert rows[0].note == "none of the Archs drawn meets it"
    assert "moves genes toward the budget" in rows[-1].note


def test_latency_is_timed_on_a_few_archs() -> None:
    table = feasibility(MICRO, "latency<=6ms", n=100, latency_meter=DepthMeter(), build=Stub)
    row = table.rows[0]
    assert (row.quantity, row.unit) == ("latency on onnxruntime,batch=1", "ms")
    assert (row.space_min, row.space_max) == (4.0, 8.0)
    assert 0 < row.share_feasible < 1
    assert 3 < row.n <= 6
    assert row.macs_met == table.most_macs > 0
    assert Feasibility((row, replace(row, macs_met=None))).most_macs == 0, "none met the second"
    with pytest.raises(
        UserError, match=r"latency<=1ms@.* cannot be met; micro ranges from 4\.00ms to 8\.00ms"
    ):
        feasibility(MICRO, "latency<=1ms", n=100, latency_meter=DepthMeter(), build=Stub)


def test_latency_without_a_meter_is_said() -> None:
    table = feasibility(MICRO, "latency<=6ms and macs<=1M", n=100)
    assert table.rows[1].note == "not measured: no latency meter"
    assert table.rows[1].n == 0
    assert table.rows[-1].note == "without latency"
    assert table.most_macs == float("inf")


def test_no_limits() -> None:
    rows = feasibility(MICRO, "", n=100).rows
    assert [(row.quantity, row.share_feasible) for row in rows] == [("all limits", 1.0)]
