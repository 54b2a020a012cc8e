"""Can the Budget be met in this Space, and by how many Archs? Answered before any expensive work."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vitnas.budget import Budget, Limit, format_quantity
from vitnas.errors import UserError
from vitnas.runs import RunFile
from vitnas.searching.goal import Goal
from vitnas.searching.latency import Build, LatencyMeter, measure_ms, meters_of
from vitnas.space import Genes, Space

UNITS = {"macs": "MACs", "params": "parameters", "memory": "bytes", "latency": "ms"}
ALL_LIMITS = "all limits"
_CHUNK = 16_384


@dataclass(frozen=True)
class FeasibilityRow:
    """One limit of a Budget against a Space.

    Args:
        quantity: what is limited (`latency on <target>` for latency, `all limits` for the last row).
        unit: of `space_min` and `space_max`.
        space_min, space_max: the range of all Archs of the Space (of those timed, for latency); None in the last row.
        requested: the limit's text.
        share_feasible: of the `n` Archs drawn (measured, for latency) that meet it.
        n: how many were drawn or measured.
        note: what else a person should know.
        macs_met: of latency: MACs of the costliest Arch that was timed and meets it.
    """

    quantity: str
    unit: str
    space_min: float | None
    space_max: float | None
    requested: str
    share_feasible: float
    n: int
    note: str = ""
    macs_met: int | None = None


@dataclass(frozen=True)
class Feasibility(RunFile):
    """The table: one row per limit, and one for all limits together."""

    FILE = "feasibility.json"

    rows: tuple[FeasibilityRow, ...]

    @property
    def most_macs(self) -> float:
        """MACs up to which Archs that were timed met the limits of latency: 0 where none did, infinite where there is
        no such limit."""
        timed = (row.macs_met or 0 for row in self.rows if row.quantity.startswith("latency") and row.n)
        return min(timed, default=math.inf)


def feasibility(
    space: Space,
    budget: Budget | str,
    *,
    n: int = 100_000,
    seed: int = 0,
    latency_meter: LatencyMeter | Mapping[str, LatencyMeter] | None = None,
    build: Build | None = None,
    num_timed: int = 3,
) -> Feasibility:
    """Hold every limit of `budget` against `space`.

    Args:
        space: the Space that would be searched.
        budget: the Budget, or its text.
        n: how many random Archs are counted.
        seed: of the draws.
        latency_meter: the meter, or one per latency target; without it latency rows say that nothing was measured.
        build: Arch to Model for the meter; default `vitnas.model.build`.
        num_timed: random Archs that are timed beside the smallest, the middle and the largest.

    Raises:
        UserError: a limit that no Arch of the Space can meet (with the range it has), or limits that no Arch
            was found to meet together.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    goal = Goal(space, budget)
    drawn = _drawn_costs(space, n, seed)
    rows = [_counted_row(space, limit, drawn) for limit in budget.counted.limits]
    if budget.latency_targets:
        meters = meters_of(latency_meter, budget.latency_targets) if latency_meter else {}
        rows += _latency_rows(goal, meters, build, random.Random(f"{seed}/latency"), num_timed)
    share = float(budget.mask(drawn).mean())
    note = ""
    if share == 0:
        found = goal.draw(random.Random(f"{seed}/all"), ())
        if found is None:
            ranges = "; ".join(
                f"{row.quantity} from {_show(row.space_min, limit)} to {_show(row.space_max, limit)}"
                for row, limit in zip(rows, budget.counted.limits, strict=False)
            )
            raise UserError(
                f"{budget.counted.text} is met by no Arch that was found; {space.name} ranges over {ranges}. "
                "Widen the limits."
            )
        note = f"fewer than 1 in {n} random Archs; the search moves genes toward the budget"
    if budget.latency_targets:
        note = "; ".join(filter(None, (note, "without latency")))
    total = FeasibilityRow(ALL_LIMITS, "", None, None, budget.text, share, n, note)
    return Feasibility((*rows, total))


def _drawn_costs(space: Space, n: int, seed: int) -> dict[str, np.ndarray]:
    """Costs of `n` random Archs, in chunks that keep memory small."""
    generator, table = np.random.default_rng(seed), space.cost_table()
    sizes = [min(_CHUNK, n - start) for start in range(0, n, _CHUNK)]
    chunks = [table.costs(space.random_matrix(size, generator)) for size in sizes]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _counted_row(space: Space, limit: Limit, drawn: Mapping[str, np.ndarray]) -> FeasibilityRow:
    """One row; refuses a limit outside the range of the Space."""
    low, high = (float(end) for end in space.cost_span(limit.quantity))
    _refuse_outside(space, limit, low, high)
    share = float(Budget.of((limit,)).mask(drawn).mean())
    note = "none of the Archs drawn meets it" if share == 0 else ""
    n = len(drawn[limit.quantity])
    return FeasibilityRow(limit.name, UNITS[limit.quantity], low, high, str(limit), share, n, note)


def _latency_rows(
    goal: Goal,
    meters: Mapping[str, LatencyMeter],
    build: Build | None,
    rng: random.Random,
    num_timed: int,
) -> list[FeasibilityRow]:
    """Time the extremes and a few Archs that meet the counted limits; a limit below all of them is refused."""
    limits = [limit for limit in goal.budget.limits if limit.quantity == "latency"]
    if not meters:
        note = "not measured: no latency meter"
        return [FeasibilityRow(li.name, "ms", None, None, str(li), 0.0, 0, note) for li in limits]
    space = goal.space
    picked: list[Genes] = []
    for _ in range(num_timed):
        if (genes := goal.draw(rng, picked)) is not None:
            picked.append(genes)
    archs = [space.smallest(), space.middle(), space.largest(), *(space.decode(genes) for genes in picked)]
    archs = list(dict.fromkeys(archs))
    rows = []
    for limit in limits:
        times = [measure_ms(meters[limit.target], arch, build) for arch in archs]
        low, high = min(times), max(times)
        note = "timed: smallest, middle, largest and random Archs within the counted limits"
        share = sum(not limit.misses(value) for value in times) / len(times)
        # A tenth of slack: a clock is not exact, and an Arch between those timed may be a little faster.
        _refuse_outside(space, limit, 0.9 * low, 1.1 * high, shown=(low, high))
        met = [
            goal.cost(space.encode(arch)).macs
            for arch, value in zip(archs, times, strict=True)
            if not limit.misses(value)
        ]
        most = max(met, default=None)
        rows.append(FeasibilityRow(limit.name, "ms", low, high, str(limit), share, len(times), note, most))
    return rows


def _refuse_outside(
    space: Space, limit: Limit, low: float, high: float, shown: tuple[float, float] | None = None
) -> None:
    too_small = limit.high is not None and limit.high < low
    too_large = limit.low is not None and limit.low > high
    if too_small or too_large:
        least, most = (_show(value, limit) for value in (shown or (low, high)))
        raise UserError(
            f"{limit} cannot be met; {space.name} ranges from {least} to {most}. "
            "Change the limit, or take a space that reaches it."
        )


def _show(value: float | None, limit: Limit) -> str:
    return "?" if value is None else format_quantity(value, limit.quantity)
