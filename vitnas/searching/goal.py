"""What a search is asked: a Space, a Budget and objectives, and how to reach Archs that meet the Budget."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from vitnas.budget import QUANTITIES, Budget, Cost, split_target
from vitnas.errors import UserError
from vitnas.space import Genes, Matrix, Space

# Spaces up to this size are listed whole, so that "nothing is left" is known and not guessed.
LISTED_SIZE = 4096
_PATHS = 8


@dataclass(frozen=True)
class Objective:
    """One thing to optimise: a number of the evaluator, or a cost (macs, params, memory, latency@target)."""

    name: str
    direction: str = "maximize"

    def __post_init__(self) -> None:
        if self.direction not in ("maximize", "minimize"):
            raise UserError(f"direction of {self.name} is {self.direction!r}; use 'maximize' or 'minimize'.")
        if self.quantity in QUANTITIES and self.direction == "maximize":
            raise UserError(f"{self.name} is to be maximised; a cost is minimised. Use 'minimize'.")

    @property
    def quantity(self) -> str:
        """The name without the target: `latency` of `latency@onnxruntime,batch=1`."""
        return split_target(self.name)[0]

    @property
    def target(self) -> str:
        """What its latency is measured on."""
        return split_target(self.name)[1]

    def value(self, values: Mapping[str, float], cost: Cost) -> float:
        """This objective's number, from the evaluator's `values` or from the Cost.

        Raises:
            UserError: neither has it.
        """
        if self.name in values:
            return float(values[self.name])
        if self.quantity in QUANTITIES:
            return cost.value(self.quantity, self.target)
        raise UserError(
            f"objective {self.name!r} is not given; the evaluator gives {', '.join(values) or 'nothing'} and the "
            f"Cost {', '.join(QUANTITIES)}. Use one of these."
        )


DEFAULT_OBJECTIVES = (Objective("accuracy", "maximize"), Objective("macs", "minimize"))


def oriented(values: Sequence[Sequence[float]], objectives: Sequence[Objective]) -> np.ndarray:
    """(num_points, num_objectives) in which larger is better: minimised columns change sign."""
    signs = np.array([1.0 if objective.direction == "maximize" else -1.0 for objective in objectives])
    return np.asarray(values, dtype=float).reshape(-1, len(objectives)) * signs


@dataclass(frozen=True)
class Goal:
    """A Space, a Budget and objectives. Methods look at the counted limits only; latency has no table."""

    space: Space
    budget: Budget = field(default_factory=Budget)
    objectives: tuple[Objective, ...] = DEFAULT_OBJECTIVES

    def costs(self, genes: Sequence[Genes] | Matrix) -> dict[str, np.ndarray]:
        """'macs', 'params' and 'memory' (bytes) of many Archs at once."""
        costs: dict[str, np.ndarray] = self.space.cost_table().costs(np.asarray(genes, dtype=np.int64))
        return costs

    def cost(self, genes: Genes) -> Cost:
        """The counted Cost of one Arch."""
        costs = self.costs([genes])
        return Cost(int(costs["macs"][0]), int(costs["params"][0]), int(costs["memory"][0]))

    def meets(self, genes: Sequence[Genes] | Matrix) -> np.ndarray:
        """bool (n,): which Archs meet the counted limits."""
        return self.budget.mask(self.costs(genes))

    def violation(self, genes: Sequence[Genes]) -> np.ndarray:
        """float (n,): by how much the counted limits are missed, summed as shares; 0 where they are met."""
        costs = self.costs(genes)
        total = np.zeros(len(genes))
        for limit in self.budget.counted.limits:
            values = costs[limit.quantity].astype(float)
            if limit.high is not None:
                total += np.clip(values / limit.high - 1, 0, None)
            if limit.low is not None:
                total += np.clip(1 - values / limit.low, 0, None)
        return total

    def draw(self, rng: random.Random, seen: Collection[Genes], *, num_draws: int = 100_000) -> Genes | None:
        """An Arch that meets the counted limits and is not in `seen`, as likely as its genes are, by rejection.

        That is not uniform over Archs, as equally likely depths have unequally many. In Spaces of at most `LISTED_SIZE`
        Archs it is.

        Where `num_draws` draws hold none, single genes are moved toward the Budget instead. None when nothing is
        left: certain for Spaces of at most `LISTED_SIZE` Archs, else "not found".
        """
        if self._listed is not None:
            left = [genes for genes in self._listed if genes not in seen]
            return rng.choice(left) if left else None
        generator = np.random.default_rng(rng.getrandbits(64))
        drawn, batch = 0, 64
        rows = np.empty((0, len(self.space.genes)), dtype=np.int64)
        while drawn < num_draws:
            rows = self.space.random_matrix(batch, generator)
            for row in rows[self.meets(rows)]:
                genes = _genes(row)
                if genes not in seen:
                    return genes
            drawn, batch = drawn + batch, min(4 * batch, 16_384)
        for row in rows[:16]:
            if (repaired := self.repair(_genes(row), rng, seen)) is not None:
                return repaired
        return None

    def repair(self, genes: Genes, rng: random.Random, seen: Collection[Genes]) -> Genes | None:
        """Move one gene at a time toward the counted limits; None where that leads nowhere.

        Each step looks at every Arch one gene away. One that meets the Budget and is not in `seen` ends it; else
        any one that misses by less is the next. Always taking the nearest would spend the large genes (depth,
        width) first and stop beside the Budget; a path that stops is begun again instead.
        """
        start = self.space.canonical(genes)
        for _ in range(_PATHS):
            here, miss = start, float(self.violation([start])[0])
            for _ in range(2 * len(self.space.genes)):
                around = self._one_away(here)
                if not around:
                    return None
                misses = self.violation(around)
                met = [
                    near
                    for near, value in zip(around, misses, strict=True)
                    if value == 0 and near not in seen
                ]
                if met:
                    return rng.choice(met)
                better = np.flatnonzero((misses < miss) & (misses > 0))
                if len(better) == 0:
                    break
                place = int(rng.choice(better.tolist()))
                here, miss = around[place], float(misses[place])
        return None

    def _one_away(self, genes: Genes) -> list[Genes]:
        """Every canonical Arch that differs in one gene, in a fixed order."""
        counts = self.space.num_options
        rows = np.tile(np.asarray(genes, dtype=np.int64), (sum(counts), 1))
        places = np.repeat(np.arange(len(counts)), counts)
        rows[np.arange(len(rows)), places] = [option for count in counts for option in range(count)]
        return sorted({_genes(row) for row in self.space.canonical_matrix(rows)} - {genes})

    @cached_property
    def _listed(self) -> tuple[Genes, ...] | None:
        """All Archs that meet the counted limits, of a Space small enough to list; else None."""
        if math.prod(self.space.num_options) > 16 * LISTED_SIZE or self.space.size() > LISTED_SIZE:
            return None
        every = itertools.product(*map(range, self.space.num_options))
        unique = sorted({self.space.canonical(genes) for genes in every})
        return tuple(genes for genes, inside in zip(unique, self.meets(unique), strict=True) if inside)


def _genes(row: np.ndarray) -> Genes:
    return tuple(int(option) for option in row)
