"""Allocation: which Arch of a Space meets a Budget at the least damage, as sensitivities predict it.

Damage is taken as the sum over genes, which makes a prediction of any Arch a look-up. `exchanged` gives the Archs that
are best at some rate of damage for cost; a search of the package goes on from these, as budgets may limit several
quantities. What is predicted best is then to be folded and measured; the measurement decides.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.model import build
from vitnas.searching import Evolution, Goal, LatencyMeter, Objective, Searcher, Study, Trial, search, tried
from vitnas.slimming.sensitivity import Sensitivity
from vitnas.space import Genes, Matrix, Space
from vitnas.space.keeps import FIELD as KEEP

OBJECTIVES = (Objective("damage", "minimize"),)
RATES = np.geomspace(1e-4, 1e4, 97)
NUM_TRIALS = 300
WORST = 1e9  # damage


class PredictedDamage:
    """An Evaluator: the sum of what a Sensitivity says of an Arch's options, as `damage`."""

    def __init__(self, space: Space, sensitivity: Sensitivity) -> None:
        self.space = space
        self.tables = [np.asarray(sensitivity.damage[gene.name]) for gene in space.genes]

    def __call__(self, arch: Arch) -> Mapping[str, float]:
        genes = np.asarray([self.space.encode(arch)], dtype=np.int64)
        return {"damage": float(self.of(genes)[0])}

    def of(self, genes: Matrix) -> np.ndarray:
        """(n,) damage of (n, num_genes) canonical genes; what does not matter costs nothing."""
        active = self.space.active_matrix(genes)
        columns = [table[genes[:, place]] for place, table in enumerate(self.tables)]
        total: np.ndarray = (np.stack(columns, 1) * active).sum(1)
        return total

    def keeping_all(self) -> PredictedDamage:
        """The same, in which keeping fewer tokens is the worst that can be."""
        kept = copy.copy(self)
        kept.tables = [
            np.where(np.arange(len(table)) < len(table) - 1, WORST, table) if gene.field == KEEP else table
            for table, gene in zip(self.tables, self.space.genes, strict=True)
        ]
        return kept


@lru_cache(maxsize=2)  # asked again for every budget
def exchanged(damage: PredictedDamage, quantity: str = "macs") -> tuple[Genes, ...]:
    """The Archs that are best at some rate of damage for `quantity`, each once, the largest first.

    At a rate the genes of a block are chosen together and apart from all others, as damage and, at one width, cost are
    sums over blocks.
    """
    space, found = damage.space, []
    largest = np.asarray([space.num_options], dtype=np.int64) - 1
    whole = float(space.cost_table().costs(largest)[quantity][0])
    groups = _groups(space)
    for rate in RATES:
        genes = largest.copy()
        for _ in range(2):  # widths and what blocks cost at them depend on each other
            for places in groups:
                options = list(itertools.product(*(range(space.num_options[place]) for place in places)))
                rows = np.repeat(genes, len(options), 0)
                rows[:, places] = options
                rows = space.canonical_matrix(rows)
                cost = space.cost_table().costs(rows)[quantity] / whole
                genes = rows[[int(np.argmin(damage.of(rows) + rate * cost))]]
                genes = np.where(space.active_matrix(genes), genes, largest)
        found.append(tuple(int(option) for option in space.canonical_matrix(genes)[0]))
    return tuple(dict.fromkeys(found))


def _groups(space: Space) -> list[list[int]]:
    """Genes by block; each other gene by itself."""
    groups: dict[tuple[int, int, str], list[int]] = {}
    for place, gene in enumerate(space.genes):
        own = "" if gene.scope == "block" else gene.name
        groups.setdefault((gene.stage, gene.slot, own), []).append(place)
    return list(groups.values())


@dataclass(frozen=True)
class Starting:
    """A Searcher that first proposes Archs given to it, each moved into the Budget, then what another one does."""

    first: tuple[Genes, ...]
    then: Searcher

    def propose(self, goal: Goal, history: Sequence[Trial], index: int, rng: random.Random) -> Genes | None:
        """See `Searcher.propose`."""
        seen = tried(history)
        for genes in self.first if index < len(self.first) else ():
            if genes not in seen and bool(goal.meets([genes])[0]):
                return genes
        return self.then.propose(goal, history, index, rng)

    def generation(self, index: int) -> int | None:
        """See `Searcher.generation`."""
        return self.then.generation(index)


def allocate(
    damage: PredictedDamage,
    budget: Budget | str,
    *,
    meter: LatencyMeter | Mapping[str, LatencyMeter] | None = None,
    num_trials: int = NUM_TRIALS,
    seed: int = 0,
) -> list[Trial]:
    """Archs within a Budget by predicted damage, the least first.

    Args:
        meter: for limits on latency; one that predicts (`PredictedLatency`), as it is asked for every Arch.
        num_trials: Archs that the search looks at.

    Raises:
        UserError: no Arch meets the Budget (with the range), or a limit on latency without a meter.
    """
    space = damage.space
    with Study.open(space, budget, objectives=OBJECTIVES, seed=seed) as study:
        starts = _filled(study.goal, damage)
        searcher = Starting(tuple(starts), Evolution.sized(num_trials))
        blank = partial(build, device="meta")
        search(study, damage, searcher=searcher, num_trials=num_trials, latency_meter=meter, build=blank)
        return sorted(study.scored(), key=lambda trial: (trial.values["damage"], trial.number))


def _filled(goal: Goal, damage: PredictedDamage) -> list[Genes]:
    """The exchanged Archs that meet the counted limits, each grown while it meets them, by the gene that mends most."""
    space, found = goal.space, []
    for genes in exchanged(damage):
        if not bool(goal.meets([genes])[0]):
            continue
        row = np.asarray(genes, dtype=np.int64)
        while True:
            rows = _grown(space, row)
            rows = rows[goal.meets(rows)] if len(rows) else rows
            if not len(rows):
                break
            gains = damage.of(row[None])[0] - damage.of(rows)
            if gains.max() <= 0:
                break
            row = rows[int(gains.argmax())]
        found.append(tuple(int(option) for option in row))
    ordered = sorted(dict.fromkeys(found), key=lambda genes: float(damage.of(np.asarray([genes]))[0]))
    return ordered[:16]


def _grown(space: Space, row: np.ndarray) -> Matrix:
    """Every Arch with one gene that matters one option larger."""
    active, rows = space.active_matrix(row[None])[0], []
    for place, count in enumerate(space.num_options):
        if active[place] and row[place] + 1 < count:
            larger = row.copy()
            larger[place] += 1
            rows.append(larger)
    return space.canonical_matrix(np.stack(rows)) if rows else np.empty((0, len(row)), dtype=np.int64)
