"""ViTAS's settings of the evolution: every child by crossover, then about one gene mutated."""

from __future__ import annotations

import random

import pytest

from vitnas.errors import UserError
from vitnas.searching import Evolution, Study, VitasEvolution, search
from vitnas.space import vitas

SPACE = vitas("1g")


def test_the_papers_numbers() -> None:
    evolution = VitasEvolution()
    assert (evolution.population, evolution.generations, evolution.num_trials) == (50, 40, 2000)
    assert (evolution.mutants, evolution.crossovers, evolution.parents) == (0, 50, 50)


def test_a_mutation_redraws_about_one_gene() -> None:
    rng, evolution = random.Random(0), VitasEvolution()
    parent = SPACE.encode(SPACE.largest())
    changed = []
    for _ in range(600):
        child = evolution._mutated(SPACE, parent, rng)
        changed.append(sum(a != b for a, b in zip(parent, child, strict=True)))
    # a redrawn gene is another in half to nine tenths of the cases; one that goes takes its slot's three along
    assert 0.5 < sum(changed) / len(changed) < 1.5
    crossed = evolution._draw("crossover", _Goal(), [parent, parent], rng)  # type: ignore[arg-type]
    drawn = [evolution._draw("crossover", _Goal(), [parent, parent], rng) for _ in range(20)]  # type: ignore[arg-type]
    assert len(crossed) == len(parent)
    assert len(set(drawn)) > 5, "children of equal parents differ by mutation"


class _Goal:
    space = SPACE


def test_a_search_with_it_improves_within_the_window() -> None:
    evolution = Evolution(
        population=20, parents=20, mutants=0, crossovers=20, generations=6, num_mutated=1, mutate_crossed=True
    )
    study = search(
        Study.open(SPACE, "0.9G<=macs<=1G"),
        lambda arch: {"accuracy": sum(block.num_heads for block in arch.blocks) / 300},
        searcher=evolution,
        num_trials=evolution.num_trials,
    )
    scores = [t.values["accuracy"] for t in study.scored()]
    assert max(scores[20:]) > max(scores[:20])
    assert len({t.arch.patch_size for t in study.scored()[:20]}) > 1, "patch sizes share a population"
    assert all(0.9e9 <= t.cost.macs <= 1e9 for t in study.scored())


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"num_mutated is 0; a mutation redraws genes\. Use 1, or None"):
        Evolution(num_mutated=0)
