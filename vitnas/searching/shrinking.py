"""A random Arch by gradual shrinking: start wide within a random structure, then lower one gene after the other.

Source: ViT-ResNAS's search (arXiv 2109.00642, section 3.4). Widths and depth are drawn at random, all other genes are
at their largest; then random genes are lowered by one option until the upper limits hold. Such Archs lose few units
everywhere instead of many somewhere; they are not uniform over the Space.
"""

from __future__ import annotations

import random
from collections.abc import Collection

import numpy as np

from vitnas.searching.goal import Goal
from vitnas.space import Genes

NOTCHES = 100  # lowered genes after which the structure may shrink too
DRAWS = 64  # structures drawn at once


def shrunk(goal: Goal, rng: random.Random, seen: Collection[Genes], *, attempts: int = 200) -> Genes | None:
    """An Arch that meets the counted limits and is not in `seen`, or None if `attempts` structures gave none."""
    generator = np.random.default_rng(rng.getrandbits(64))
    for _ in range(attempts):
        start = _start(goal, generator)
        if start is None:
            continue
        genes = _shrink(goal, start, generator)
        if genes is not None and genes not in seen:
            return genes
    return None


def _start(goal: Goal, generator: np.random.Generator) -> Genes | None:
    """A random structure with all else at its largest that keeps the lower limits; None if none of a few does."""
    space = goal.space
    rows = space.random_matrix(DRAWS, generator)
    for index, gene in enumerate(space.genes):
        if not gene.structural:
            rows[:, index] = len(gene.options) - 1
    rows = space.canonical_matrix(rows)
    costs = goal.costs(rows)
    enough = np.ones(len(rows), dtype=bool)
    for limit in goal.budget.counted.limits:
        if limit.low is not None:
            enough &= costs[limit.quantity] >= limit.low
    kept = np.flatnonzero(enough)
    return tuple(rows[kept[0]].tolist()) if len(kept) else None


def _shrink(goal: Goal, start: Genes, generator: np.random.Generator) -> Genes | None:
    """The first Arch on a random way down from `start` that meets the limits; None where the way jumps over them."""
    space = goal.space
    active = space.active_matrix(np.asarray([start], dtype=np.int64))[0]
    free = np.flatnonzero(active & np.array([not gene.structural for gene in space.genes]))
    way = [list(start)]
    for gene in generator.choice(free, size=NOTCHES).tolist() if len(free) else ():
        way.append([max(0, value - 1) if index == gene else value for index, value in enumerate(way[-1])])
    found = _first(goal, way)
    if found is not None:
        return found
    here = np.asarray(way[-1:], dtype=np.int64)
    way = []
    for _ in range(NOTCHES):
        gene = int(generator.choice(np.flatnonzero(space.active_matrix(here)[0])))
        here[0, gene] = max(0, here[0, gene] - 1)
        here = space.canonical_matrix(here)
        way.append(here[0].tolist())
    return _first(goal, way)


def _first(goal: Goal, way: list[list[int]]) -> Genes | None:
    inside = np.flatnonzero(goal.meets(np.asarray(way)))
    return tuple(way[inside[0]]) if len(inside) else None
