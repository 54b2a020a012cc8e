"""NearBudget: random Archs whose cost is about what the budget allows, in a Sampler and in a run."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.sample import SAMPLERS, Given, NearBudget, use_of
from vitnas.space import Matrix, Space, autoformer

SPACE = autoformer("micro", image_size=8)
MIDDLE = float(
    np.median(SPACE.cost_table().costs(SPACE.random_matrix(500, np.random.default_rng(0)))["macs"])
)
BUDGET = Budget(macs=0.9 * MIDDLE)


def drawn(source: Any, n: int) -> list[float]:
    rng = random.Random(0)
    return [count(source.sample(rng)).macs / (0.9 * MIDDLE) for _ in range(n)]


def near(space: Space, budget: Budget, **options: Any) -> NearBudget:
    use = use_of(space, budget, options.pop("cost_of", None))
    assert use is not None
    return NearBudget(space, use, **options)


def test_archs_of_the_range_come_as_often_as_uniform_draws_give_them() -> None:
    space = autoformer("micro", image_size=8, embed_dims=(16, 32), depths=(1, 2))
    genes = space.random_matrix(50_000, np.random.default_rng(0))
    costs = space.cost_table().costs(genes)["macs"]
    high = float(np.quantile(costs, 0.6))
    rows = genes[(0.9 * high <= costs) & (costs <= high)].tolist()
    expected = Counter(map(tuple, rows))
    assert len(expected) > 3
    rng, source = random.Random(0), near(space, Budget(macs=high), low=0.9, high=1.0)
    taken = Counter(space.encode(source.sample(rng)) for _ in range(600))
    assert set(taken) <= set(expected)
    for arch, times in expected.items():
        share = times / len(rows)
        assert (
            abs(taken[arch] / 600 - share) < 4 * (share * (1 - share) / 600) ** 0.5 + 0.005
        )  # standard errors


def test_costs_are_near_the_budget_and_uniform_ones_are_not() -> None:
    assert all(0.5 <= use <= 1.25 for use in drawn(near(SPACE, BUDGET), 100))
    assert not all(0.5 <= use <= 1.25 for use in drawn(SPACE, 100))


def test_the_tightest_of_several_limits_counts() -> None:
    genes = SPACE.random_matrix(50, np.random.default_rng(0))
    costs = SPACE.cost_table().costs(genes)
    use = use_of(SPACE, Budget(macs=MIDDLE, params=1e4, latency_ms=(None, 1.0)))
    assert use is not None
    assert use(genes) == pytest.approx(np.maximum(costs["macs"] / MIDDLE, costs["params"] / 1e4))


def test_latency_is_what_the_model_of_it_predicts() -> None:
    asked = []

    def cost_of(target: str) -> Any:
        asked.append(target)

        def predict(genes: Matrix) -> np.ndarray:
            return SPACE.cost_table().costs(genes)["macs"] / MIDDLE

        return predict

    budget = Budget(latency_ms=0.9)
    assert use_of(SPACE, budget) is None  # nothing tells the latency
    assert all(0.5 <= use <= 1.25 for use in drawn(near(SPACE, budget, cost_of=cost_of), 50))
    assert len(asked) == 1, "what predicts is made once, not at every step"


def test_where_nothing_is_near_the_nearest_is_drawn() -> None:
    least = count(SPACE.smallest()).macs
    uses = drawn(near(SPACE, Budget(macs=least / 10)), 20)
    smallest = least / (0.9 * MIDDLE)
    assert min(uses) >= smallest
    assert max(uses) < 1.5 * smallest


@pytest.mark.parametrize("kind", ["uniform", "several", "sandwich"])
def test_samplers_draw_near_the_budget_where_they_are_told_to(kind: str) -> None:
    def costs(near_budget: bool, budget: Budget) -> list[float]:
        config: Any = SAMPLERS[kind]
        sampler = config(near_budget=near_budget).build(SPACE, Given(budget=budget))
        rng, ends = random.Random(0), {SPACE.largest().id, SPACE.smallest().id}
        archs = [draw.arch for _ in range(30) for draw in sampler.draw(rng)]
        return [
            count(arch).macs / (0.9 * MIDDLE) for arch in archs if arch.id not in ends or kind == "uniform"
        ]

    assert all(0.5 <= use <= 1.25 for use in costs(True, BUDGET))
    for uniform in (
        costs(False, BUDGET),
        costs(True, Budget(macs=(1.0, None))),
    ):  # no upper bound: nothing to be near
        assert not all(0.5 <= use <= 1.25 for use in uniform)
