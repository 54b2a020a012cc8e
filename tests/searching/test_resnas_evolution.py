"""ViT-ResNAS's evolution: gradual shrinking within the window, its numbers, and generations of unequal size."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
from search_help import MICRO, score

from vitnas.budget import Budget
from vitnas.searching import SEARCHERS, Evolution, Goal, Trial, ViTResNASEvolution
from vitnas.searching.shrinking import shrunk
from vitnas.searching.study import proposal_rng
from vitnas.space import Genes, vit_resnas

SPACE = vit_resnas("sr_tiny_mh")
WINDOW = Budget.parse("1.7495G<=macs<=1.7944G")  # 0.975 to 1 times ViT-Res-Tiny's


def test_the_papers_settings() -> None:
    searcher = SEARCHERS["vit_resnas"].sized(1)
    assert isinstance(searcher, Evolution)
    assert searcher.num_trials == 3350
    assert (searcher.first, searcher.population, searcher.parents) == (500, 150, 75)
    assert (searcher.mutants, searcher.crossovers, searcher.generations) == (75, 75, 20)
    assert searcher.prob == searcher.structural_prob == 0.3
    assert [searcher.generation(index) for index in (0, 499, 500, 649, 650, 3349)] == [0, 0, 1, 1, 2, 19]


def mean_place(rows: list[Genes]) -> float:
    """How far up their options the heads and hidden units are, from 0 to 1."""
    matrix = np.asarray(rows)
    active = SPACE.active_matrix(matrix)
    shares = [
        matrix[active[:, i], i].mean() / (len(gene.options) - 1)
        for i, gene in enumerate(SPACE.genes)
        if not gene.structural
    ]
    return float(np.mean(shares))


def test_shrinking_fills_the_window_and_loses_little_everywhere() -> None:
    goal = Goal(SPACE, WINDOW)
    seen: set[Genes] = set()
    drawn: list[Genes] = []
    for index in range(40):
        genes = shrunk(goal, proposal_rng(0, index), seen)
        assert genes is not None
        assert genes not in seen
        assert SPACE.canonical(genes) == genes
        seen.add(genes)
        uniform = goal.draw(proposal_rng(1, index), ())
        assert uniform is not None
        drawn.append(uniform)
    assert goal.meets(sorted(seen)).all()
    assert mean_place(sorted(seen)) > mean_place(drawn) + 0.02


def test_shrinking_is_a_function_of_its_generator() -> None:
    goal = Goal(SPACE, WINDOW)
    assert shrunk(goal, random.Random(3), ()) == shrunk(goal, random.Random(3), ())


def test_narrow_budgets_shrink_the_structure_too() -> None:
    goal = Goal(SPACE, Budget.parse("macs<=1.0G"))
    found = [shrunk(goal, random.Random(seed), ()) for seed in range(5)]
    assert all(genes is not None for genes in found)
    assert shrunk(Goal(SPACE, Budget.parse("macs<=0.1G")), random.Random(0), (), attempts=3) is None
    assert shrunk(Goal(SPACE, Budget.parse("9G<=macs")), random.Random(0), (), attempts=3) is None


def test_children_descend_from_the_best_of_all_generations() -> None:
    searcher = replace(
        ViTResNASEvolution(),
        first=12,
        population=6,
        parents=3,
        mutants=3,
        crossovers=3,
        generations=3,
        attempts=20,
    )
    assert searcher.num_trials == 24
    goal, trials = Goal(MICRO, Budget.parse("600K<=macs<=704K")), list[Trial]()
    for index in range(searcher.num_trials):
        genes = searcher.propose(goal, trials, index, proposal_rng(0, index))
        assert genes is not None
        values = score(goal.space.decode(genes))
        trials.append(Trial(index, index, genes, goal.space, "scored", goal.cost(genes), values))
    genes = [trial.genes for trial in trials]
    assert len(set(genes)) == 24
    assert goal.meets(genes).all()
    accuracies = [trial.values["accuracy"] for trial in trials]
    assert np.mean(accuracies[12:]) > np.mean(accuracies[:12])
    again = searcher.propose(goal, trials[:15], 15, proposal_rng(0, 15))
    assert again == genes[15]
