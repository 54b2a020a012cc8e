"""Random Archs that cost about what a Budget allows, so that a Supernet trains what will be looked at.

A uniform draw costs what it happens to: where the Budget is a tenth of the largest Arch, most steps, and nearly all
their multiplications, go to Archs that no search will return. Source: AttentiveNAS (arXiv 2011.09011, section 3) draws
a cost and then an Arch of it; here every Arch in a range of costs keeps the chance that uniform draws give it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.sample.sampler import Given, SamplerConfig
from vitnas.space import Matrix, Space

DRAWN, TRIES = 64, 20  # at once, and how often before the nearest of all is taken


class Source(Protocol):
    """Where random Archs come from; a Space is one."""

    def sample(self, rng: random.Random) -> Arch: ...


@dataclass(frozen=True)
class NearBudget:
    """Uniform draws from the Archs that use `low` to `high` of a Budget.

    Where none of `DRAWN * TRIES` draws is in the range, the nearest of them is taken.

    Args:
        use: (N, genes) canonical genes to (N,) shares of the Budget that they use; 1 just meets it.
    """

    space: Space
    use: Callable[[Matrix], np.ndarray]
    low: float = 0.5
    high: float = 1.25

    def sample(self, rng: random.Random) -> Arch:
        numpy_rng = np.random.default_rng(rng.getrandbits(64))
        nearest, least = (), np.inf
        for _ in range(TRIES):
            genes = self.space.random_matrix(DRAWN, numpy_rng)
            use = self.use(genes)
            misses = np.maximum(np.maximum(self.low - use, use - self.high), 0.0)
            row = int(misses.argmin())  # the first in the range, where one is
            if misses[row] < least:
                nearest, least = tuple(genes[row].tolist()), misses[row]
            if not least:
                break
        return self.space.arch_of(nearest)


def use_of(
    space: Space, budget: Budget, cost_of: Callable[[str], Callable[[Matrix], np.ndarray]] | None = None
) -> Callable[[Matrix], np.ndarray] | None:
    """How much of `budget` Archs use: the largest of their costs, each as a share of its upper bound.

    Args:
        cost_of: predicts latency on a target; without it, bounds on latency are left out. Of several targets the first
            is looked at.

    Returns:
        A function of (N, genes) canonical genes; None where nothing that can be told is bounded from above.
    """
    upper = [limit for limit in budget.limits if limit.high is not None]
    counted = [limit for limit in upper if not limit.target]
    first = next((limit for limit in upper if limit.target), None) if cost_of else None
    predict = cost_of(first.target) if cost_of and first else None  # once: it may time Archs, or read a file
    if not counted and predict is None:
        return None

    def use(genes: Matrix) -> np.ndarray:
        costs = space.cost_table().costs(genes) if counted else {}
        shares = [costs[limit.quantity] / limit.high for limit in counted if limit.high]
        if predict and first and first.high:
            shares.append(predict(genes) / first.high)
        return np.asarray(np.max(shares, axis=0), dtype=np.float64)

    return use


@dataclass(frozen=True, kw_only=True)
class RandomConfig(SamplerConfig):
    """What kinds that draw random Archs share.

    Args:
        near_budget: draw such as use half to five quarters of the run's budget, rather than any of the Space.
    """

    near_budget: bool = False

    def source(self, space: Space, given: Given) -> Source:
        """Where the random Archs come from."""
        use = use_of(space, given.budget, given.cost_of) if self.near_budget and given.budget else None
        return NearBudget(space, use) if use else space
