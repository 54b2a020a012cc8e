"""Searchers: within the Budget, no duplicates, the same answer to the same question; and their settings."""

from __future__ import annotations

import random

import numpy as np
import pytest
from search_help import DOZEN, MICRO, score

from vitnas.budget import Budget
from vitnas.errors import UserError
from vitnas.searching import (
    SEARCHERS,
    AutoFormerEvolution,
    Evolution,
    Goal,
    Nsga2,
    Objective,
    OptunaSearch,
    RandomSearch,
    Searcher,
    Study,
    Tpe,
    Trial,
    search,
)
from vitnas.searching.predictor_search import PredictorSearch
from vitnas.searching.study import proposal_rng
from vitnas.space import Genes, autoformer

ACCURACY = (Objective("accuracy"),)
SOME = [
    Evolution(population=8, parents=3, mutants=4, crossovers=3),
    RandomSearch(),
    Tpe(),
    Nsga2(),
    PredictorSearch(first=8, crowd=64),
]


def play(searcher: Searcher, goal: Goal, num: int, history: list[Trial] | None = None) -> list[Trial]:
    """Ask and score without a Study."""
    trials = list(history or [])
    while len(trials) < num:
        index = len(trials)
        genes = searcher.propose(goal, trials, index, proposal_rng(0, index))
        if genes is None:
            break
        values = score(goal.space.decode(genes))
        cost = goal.cost(genes)
        trials.append(Trial(index, index, genes, goal.space, "scored", cost, values))
    return trials


@pytest.mark.parametrize("searcher", SOME, ids=repr)
def test_contract(searcher: Searcher) -> None:
    """A 2 % window, canonical genes, no duplicates, and a pure function of the history."""
    goal = Goal(MICRO, Budget.parse("690K<=macs<=704K"))
    trials = play(searcher, goal, 24)
    genes = [trial.genes for trial in trials]
    assert len(set(genes)) == len(genes) == 24
    assert goal.meets(genes).all()
    assert all(MICRO.canonical(g) == g for g in genes)
    fresh = type(searcher)(**{"sampler": searcher.sampler} if isinstance(searcher, OptunaSearch) else {})
    again = searcher if not isinstance(searcher, OptunaSearch) else fresh
    assert play(again, goal, 24, trials[:13]) == trials


@pytest.mark.parametrize("searcher", SOME, ids=repr)
def test_a_small_space_is_tried_out_and_then_ends(searcher: Searcher) -> None:
    goal = Goal(DOZEN)
    trials = play(searcher, goal, 100)
    assert len(trials) == DOZEN.size()


def test_draw_is_uniform_over_what_is_feasible() -> None:
    goal = Goal(DOZEN, Budget.parse("params<=20K"))
    feasible = [genes for genes in Goal(DOZEN)._listed or () if goal.meets([genes])[0]]
    assert 2 < len(feasible) < DOZEN.size()
    counts = dict.fromkeys(feasible, 0)
    for index in range(1000):
        genes = goal.draw(proposal_rng(1, index), ())
        assert genes is not None
        counts[genes] += 1
    expected = 1000 / len(feasible)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_one_percent_window_of_the_published_space_is_filled() -> None:
    goal = Goal(autoformer("tiny"), Budget.parse("1.40G<=macs<=1.41G and params<=6M"))
    seen: set[Genes] = set()
    for index in range(20):
        genes = goal.draw(proposal_rng(0, index), seen)
        assert genes is not None
        seen.add(genes)
    assert len(seen) == 20
    assert goal.meets(sorted(seen)).all()


def test_repair_moves_one_gene_at_a_time_into_the_window() -> None:
    goal = Goal(autoformer("tiny"), Budget.parse("1.60G<=macs<=1.61G"))
    for end in (goal.space.largest(), goal.space.smallest()):
        start = goal.space.encode(end)
        for seed in range(5):
            genes = goal.repair(start, random.Random(seed), ())
            assert genes is not None
            assert goal.meets([genes])[0]
            other = goal.repair(start, random.Random(seed), {genes})
            assert other is not None
            assert other != genes
    impossible = Goal(autoformer("tiny"), Budget.parse("macs<=0.1G"))
    assert impossible.repair(start, random.Random(0), ()) is None


def test_costs_and_violation_agree_with_the_budget() -> None:
    goal = Goal(MICRO, Budget.parse("500K<=macs<=600K and params<=40K"))
    rows = MICRO.random_matrix(200, np.random.default_rng(0))
    genes = [tuple(row.tolist()) for row in rows]
    expected = [goal.budget.violation(goal.cost(g)) for g in genes]
    np.testing.assert_allclose(goal.violation(genes), expected)
    assert ((goal.violation(genes) == 0) == goal.meets(genes)).all()


def test_autoformer_preset() -> None:
    preset = AutoFormerEvolution()
    assert (preset.population, preset.parents, preset.mutants, preset.crossovers) == (50, 10, 25, 25)
    assert (preset.generations, preset.prob, preset.structural_prob, preset.attempts) == (20, 0.2, 0.4, 10)
    assert preset.num_trials == 1000
    assert (preset.generation(49), preset.generation(50)) == (0, 1)


def test_sized_evolution_fits_the_number_of_trials() -> None:
    for num_trials in (5, 24, 200, 1000):
        assert num_trials <= Evolution.sized(num_trials).num_trials <= num_trials + 2 * 8 + num_trials // 4


def test_parents_are_the_best_of_all_earlier_generations() -> None:
    """Single objective: AutoFormer's top k. With prob 0 and crossovers only, children mix parents' genes."""
    goal = Goal(MICRO, objectives=ACCURACY)
    searcher = Evolution(population=10, parents=3, mutants=0, crossovers=10)
    trials = play(searcher, goal, 10)
    best = sorted(trials, key=lambda trial: -trial.values["accuracy"])[:3]
    assert searcher._parents(goal, trials) == [trial.genes for trial in best]


def test_several_objectives_take_parents_from_the_front() -> None:
    goal = Goal(MICRO)
    searcher = Evolution(population=30, parents=4, mutants=0, crossovers=10)
    trials = play(searcher, goal, 30)
    parents = searcher._parents(goal, trials)
    by_genes = {trial.genes: trial for trial in trials}
    chosen = [by_genes[genes] for genes in parents]
    for one in chosen:
        for other in trials:
            assert not (
                other.values["accuracy"] >= one.values["accuracy"] and other.cost.macs < one.cost.macs
            ), "a parent is beaten although the front is larger than the number of parents"


def test_evolution_beats_random_search() -> None:
    goal = Goal(MICRO, Budget.parse("macs<=700K"), ACCURACY)
    evolved = play(Evolution.sized(80), goal, 80)
    drawn = play(RandomSearch(), goal, 80)
    assert max(t.values["accuracy"] for t in evolved) > max(t.values["accuracy"] for t in drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 0}, "population is 0; it must be at least 1"),
        ({"population": 10, "mutants": 6, "crossovers": 5}, r"mutants \+ crossovers is 6 \+ 5"),
        ({"prob": 1.5}, r"prob is 1.5; a probability lies in 0..1"),
        ({"prob": 0.0, "structural_prob": 0.0}, "mutants would equal their parents"),
    ],
)
def test_evolution_refuses(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Evolution(**options)  # type: ignore[arg-type]


def test_unknown_searchers_are_refused_and_one_that_asks_a_sampler_needs_answers() -> None:
    with pytest.raises(UserError, match=r"searcher is 'nsga'; it must be one of .*\. Nearest: 'nsga"):
        search(Study.open(MICRO), lambda arch: {}, searcher="nsga")
    with pytest.raises(
        UserError, match="'sampler', which asks a learned sampler; a search by itself has none"
    ):
        search(Study.open(MICRO), lambda arch: {}, searcher="sampler")


def test_genetic_samplers_see_the_history_as_generations() -> None:
    """Optuna's NSGA-II picks parents by a generation written into the trials; ours must carry it."""
    import optuna

    goal = Goal(MICRO)
    searcher = OptunaSearch(lambda seed: optuna.samplers.NSGAIISampler(population_size=5, seed=seed))
    play(searcher, goal, 16)
    assert searcher._copy is not None
    complete = searcher._copy.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert [t.system_attrs["NSGAIISampler:generation"] for t in complete] == [0] * 5 + [1] * 5 + [2] * 5


def test_every_named_searcher_proposes() -> None:
    answers = [MICRO.encode(MICRO.smallest())]
    for name, kind in SEARCHERS.items():
        genes = kind.sized(20, lambda: answers).propose(Goal(MICRO), [], 0, proposal_rng(0, 0))
        assert genes is not None, name


def test_objectives_refuse() -> None:
    with pytest.raises(UserError, match="direction of accuracy is 'up'"):
        Objective("accuracy", "up")
    with pytest.raises(UserError, match="macs is to be maximised; a cost is minimised"):
        Objective("macs")
    cost = Goal(MICRO).cost(MICRO.encode(MICRO.smallest()))
    with pytest.raises(UserError, match=r"objective 'acc' is not given; the evaluator gives accuracy"):
        Objective("acc").value({"accuracy": 1.0}, cost)
