"""The answer of a search: what a score of so many images is worth, and what is taken where scores cannot tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from search_help import MICRO

from vitnas.budget import Budget, Cost
from vitnas.searching import Goal, Objective, SearchRecord, Trial
from vitnas.searching.choosing import (
    cannot_order,
    choose,
    cost_objective,
    error,
    estimates,
    loss_error,
    shortlist,
    standing,
)


def trials(*points: tuple[float, float]) -> list[Trial]:
    """Scored Trials of (accuracy, MACs in millions)."""
    rows = MICRO.random_matrix(len(points), np.random.default_rng(0)).tolist()
    return [
        Trial(
            number=number,
            proposal=number,
            genes=tuple(rows[number]),
            space=MICRO,
            state="scored",
            cost=Cost(round(macs * 1e6), 1, 1, {"torch": 10 - macs}),
            values={"accuracy": accuracy},
        )
        for number, (accuracy, macs) in enumerate(points)
    ]


GOAL = Goal(MICRO, Budget.parse("macs<=2M"))
# Accuracy rises with cost, and one of 1.3 M MACs was one image of 200 luckier than the largest.
RISING = trials((0.80, 0.4), (0.84, 0.6), (0.87, 0.8), (0.90, 1.0), (0.935, 1.3), (0.93, 2.0))


def test_one_lucky_image_does_not_leave_a_third_of_the_budget_unused() -> None:
    assert choose(RISING, GOAL, 200).cost.macs == 2_000_000
    assert choose(RISING, GOAL, 1_000_000).cost.macs == 1_300_000  # so many images can tell


def test_of_equals_the_cheapest_where_that_is_preferred() -> None:
    flat = trials((0.93, 0.4), (0.94, 0.6), (0.93, 0.8), (0.94, 1.0), (0.935, 1.3), (0.94, 2.0))
    assert choose(flat, GOAL, 200).cost.macs == 2_000_000
    assert choose(flat, GOAL, 200, "cost").cost.macs == 400_000
    assert (
        choose(RISING, GOAL, 200, "cost").cost.macs == 2_000_000
    )  # the others are more than an error behind


def test_what_is_clearly_better_is_taken_whatever_it_costs() -> None:
    found = trials((0.80, 0.4), (0.84, 0.6), (0.99, 0.8), (0.85, 1.0), (0.86, 1.3), (0.87, 2.0))
    for prefer in ("accuracy", "cost"):
        assert choose(found, GOAL, 1000, prefer).cost.macs == 800_000  # type: ignore[arg-type]


def test_estimates_are_nearer_to_the_line_than_scores() -> None:
    score = np.array([trial.values["accuracy"] for trial in RISING])
    (few, off), (many, little) = estimates(RISING, GOAL, 200), estimates(RISING, GOAL, 1_000_000)
    assert off == pytest.approx(error(few.max(), 200))
    assert little < 0.001
    np.testing.assert_allclose(many, score, atol=1e-4)
    log = np.log([trial.cost.macs for trial in RISING])
    line = np.polyval(np.polyfit(log, score, 1), log)
    assert (np.abs(few - line) < np.abs(score - line)).all()
    assert np.abs(few - score).max() > 0.003
    assert estimates(RISING[:1], GOAL, 200)[0] == pytest.approx([0.80])


def test_the_error_of_a_perfect_score_is_not_0() -> None:
    assert error(0.96, 216) == pytest.approx(0.0140, abs=1e-4)
    assert 0 < error(1.0, 216) < 0.01


def test_the_cost_that_counts_is_the_budget_s() -> None:
    objectives = (Objective("accuracy"),)
    for text, name in (
        ("", "macs"),
        ("params<=6M", "params"),
        ("macs<=1G and latency<=3ms@torch", "latency@torch"),
        ("macs>=1G and memory<=1MB", "memory"),
    ):
        budget = Budget.parse(text)
        assert cost_objective(objectives, budget).name == budget.quantity == name
    assert cost_objective((*objectives, Objective("params", "minimize")), Budget()).name == "params"
    fast = Goal(
        MICRO,
        Budget.parse("latency<=9.7ms@torch"),
        (Objective("accuracy"), Objective("latency@torch", "minimize")),
    )
    assert choose(RISING, fast, 200).cost.macs == 2_000_000  # which is the fastest here


def test_a_shortlist_has_the_best_and_is_spread_over_the_front() -> None:
    many = trials(*((0.5 + 0.02 * step + 0.001 * (step % 3), 0.1 + 0.1 * step) for step in range(20)))
    found = shortlist(many, GOAL, 200, 8)
    costs = [trial.cost.macs for trial in found]
    assert len({trial.genes for trial in found}) == 8
    assert found[0] is choose(many, GOAL, 200)
    assert sum(cost >= 1_600_000 for cost in costs) >= 3
    assert min(costs) == 100_000
    assert [trial.number for trial in shortlist(many[:3], GOAL, 200, 8)] == [2, 1, 0]


def test_a_shortlist_has_no_two_of_one_structure_while_there_are_others() -> None:
    """As where a search ended among kin: the eight best are as wide and deep as each other."""
    rows = MICRO.random_matrix(400, np.random.default_rng(0))
    kin = rows[(rows[:, :2] == rows[0, :2]).all(axis=1)][:8]
    others = rows[(rows[:, :2] != rows[0, :2]).any(axis=1)][:30]
    found = [
        replace(trial, genes=tuple(genes.tolist()))
        for trial, genes in zip(
            trials(*((0.9 - 0.01 * i, 1.0) for i in range(len(kin) + len(others)))),
            [*kin, *others],
            strict=True,
        )
    ]
    chosen = shortlist(found, GOAL, 1000, 4)
    assert chosen[0].number == 0
    assert len({trial.genes[:2] for trial in chosen}) == 4
    alike = shortlist(found[:8], GOAL, 1000, 4)
    assert [trial.number for trial in alike] == [0, 1, 2, 3], "of kin alone the best are taken"


BY_LOSS = Goal(MICRO, GOAL.budget, (Objective("loss", "minimize"), Objective("macs", "minimize")))


def lossy(losses: tuple[float, ...], odd: tuple[float, ...] = ()) -> list[Trial]:
    """RISING by losses, whose accuracies are noise; `odd` is what the losses on every second image are off by."""
    accuracies = (0.26, 0.30, 0.25, 0.22, 0.26, 0.22)
    halves = [{"loss_odd": loss + off} for loss, off in zip(losses, odd, strict=False)] or [{}] * 6
    return [
        replace(trial, values={"accuracy": accuracy, "loss": loss, **half})
        for trial, accuracy, loss, half in zip(RISING, accuracies, losses, halves, strict=True)
    ]


@pytest.mark.parametrize("prefer", ["accuracy", "cost"])
def test_a_search_by_loss_is_answered_by_loss(prefer: str) -> None:
    """Whatever accuracies, which are noise, and however little is known of the losses' error."""
    found = lossy((2.05, 2.04, 1.95, 1.96, 2.06, 1.97))
    for num_images in (200, 1_000_000):
        assert choose(found, BY_LOSS, num_images, prefer) is found[2]  # type: ignore[arg-type]


def test_losses_that_are_luck_are_drawn_to_what_archs_of_such_cost_have() -> None:
    """One of 1.3 M MACs has the lowest, and the largest is next to it; halves of the images do not agree on either."""
    losses, odd = (2.10, 2.06, 2.03, 2.00, 1.965, 1.97), (0.01, -0.01, 0.02, 0.0, -0.03, 0.01)
    clear, dim = lossy(losses, tuple(0.01 * off for off in odd)), lossy(losses, odd)
    assert choose(clear, BY_LOSS, 200) is clear[4]
    assert choose(clear, BY_LOSS, 200, "cost") is clear[4]
    assert choose(dim, BY_LOSS, 200) is dim[5]
    flat = lossy((1.97, 1.96, 1.97, 1.975, 1.965, 1.955), odd)
    assert choose(flat, BY_LOSS, 200, "cost") is flat[0]
    assert choose(lossy((2.2, *losses[1:]), odd), BY_LOSS, 200, "cost") is not flat[0]


def test_the_error_of_losses_is_what_they_are_off_by_beyond_what_all_share() -> None:
    """Of Archs whose losses on the same images have much in common: how hard each image is."""
    rng = np.random.default_rng(0)
    hard_N, own_AN = rng.exponential(2.0, 500), rng.normal(0, 0.4, (300, 500))
    loss_AN = hard_N + own_AN
    values = [{"loss": each.mean(), "loss_odd": each[1::2].mean()} for each in loss_AN]
    assert loss_error(values) == pytest.approx(0.4 / np.sqrt(500), rel=0.1)
    assert loss_error(values) < 0.3 * loss_AN[0].std() / np.sqrt(500), (
        "which is what one loss alone is off by"
    )
    assert loss_error([{"loss": 1.0}, {"loss": 2.0}]) == 0


def record(scores: list[float], num_images: int | None) -> SearchRecord:
    return SearchRecord(
        objectives=(Objective("accuracy"),),
        budget="",
        seed=0,
        num_scored=len(scores),
        num_rejected=0,
        rejections={},
        trials=tuple(trial.record() for trial in trials(*((score, 1.0) for score in scores))),
        front=(),
        chosen=None,
        hypervolume=(),
        seconds=0.0,
        num_images=num_images,
    )


def test_scores_that_vary_by_no_more_than_their_error_order_nothing() -> None:
    """Of 100 images at 90 % the standard error is 3 points; Archs that differ by 1.5 need four times as many."""

    def seen(n: int) -> SearchRecord:
        """Half of the Archs above 90 %, half below, by what 1.5 points and the error of n images make together."""
        apart = float(np.hypot(0.015, error(0.9, n)))
        return record([0.9 + apart, 0.9 - apart] * 4, n)

    said = cannot_order(seen(100))
    assert (
        "off by 3.1 points (standard error) and those of the scored Archs differ by 1.5 beyond that" in said
    )
    assert said.endswith(
        "about 430 images would tell them apart. Hold out more (data.holdout), score on several parts "
        "of train (search.folds=3), or choose by training (finals.archs=8)."
    )
    assert "The finals choose by training; hold out more" in cannot_order(seen(100), finals=True)
    assert cannot_order(seen(380)) != ""
    assert cannot_order(seen(430)) == ""


def test_scores_that_are_all_alike_say_nothing_of_any_number() -> None:
    assert "differ by 0.0 beyond that" in cannot_order(record([0.9, 0.9, 0.9], 100))
    assert "were it 1 point, about 970 images would tell" in cannot_order(record([0.9, 0.9, 0.9], 100))
    assert cannot_order(record([0.9], 100)) == ""
    assert cannot_order(record([0.9, 0.9], None)) == "", "of before it was on record"


def test_a_shortlist_by_loss_is_not_of_lucky_accuracies() -> None:
    """Accuracies that have nothing to do with the loss, as those of a supernet that has hardly learned."""
    found = lossy((2.05, 1.95, 2.04, 1.96, 2.06, 1.97))
    turned = [
        replace(trial, values={**trial.values, "accuracy": 1 - trial.values["accuracy"]}) for trial in found
    ]
    first, second = (
        [trial.number for trial in shortlist(these, BY_LOSS, 1000, 5)] for these in (found, turned)
    )
    assert first == second
    alike = [replace(trial, genes=found[0].genes) for trial in found]  # size tells nothing of these
    best = [trial.values["loss"] for trial in shortlist(alike, BY_LOSS, 1000, 5)]
    assert best == sorted(best)
    assert best[:3] == [1.95, 1.96, 1.97]


def test_losses_that_halves_of_the_images_do_not_agree_on_order_nothing() -> None:
    losses, odd = (2.01, 1.99, 2.01, 1.99, 2.01, 1.99), np.array([1, 1, -1, -1, 1, -1])
    search = replace(record([], 400), objectives=BY_LOSS.objectives)

    def seen(off: float) -> str:
        trials = lossy(losses, tuple(off * odd))
        return cannot_order(replace(search, trials=tuple(trial.record() for trial in trials)))

    assert seen(0.001) == ""
    assert "losses on 400 held-out images are off by 0.0088 (standard error)" in seen(0.008)
    assert "differ by 0.0048 beyond that" in seen(0.008)
    assert "were it 0.01, about" in seen(0.05)


ALIKE = np.full(4, 3e6)  # multiply-accumulates


def test_of_what_costs_alike_size_counts_beside_an_inherited_loss() -> None:
    losses = np.array([1.80, 1.84, 1.95, 2.10])
    same = [(10_000, 2)] * 4
    assert standing(-losses, ALIKE, same).argsort().tolist() == [3, 2, 1, 0], "nothing but the loss tells"
    sizes = [(2_000, 1), (30_000, 4), (20_000, 3), (2_000, 1)]
    assert standing(-losses, ALIKE, sizes).argmax() == 1, "the shallow one is a little ahead and much smaller"
    assert standing(-losses, ALIKE, sizes).argmin() == 3


def test_size_that_cost_tells_already_does_not_count() -> None:
    costs, losses = np.array([1e6, 2e6, 4e6, 8e6]), np.array([1.9, 1.8, 1.85, 1.95])
    grown = [(round(cost / 100) - 1, 2) for cost in costs]  # parameters in proportion
    assert standing(-losses, costs, grown).argsort().tolist() == [3, 0, 2, 1]


def test_a_search_by_loss_takes_the_deeper_of_two_that_score_about_alike() -> None:
    by_loss = Goal(MICRO, GOAL.budget, (Objective("loss", "minimize"), Objective("macs", "minimize")))
    given = sorted(trials((0.3, 1.0), (0.3, 1.0), (0.3, 1.0)), key=lambda trial: trial.arch.depth)
    assert given[0].arch.depth < given[-1].arch.depth
    losses = (1.80, 1.90, 1.81)
    scored = [
        replace(
            trial,
            values={"loss": loss, "accuracy": 0.3},
            cost=replace(trial.cost, params=1000 * trial.arch.depth),
        )
        for trial, loss in zip(given, losses, strict=True)
    ]
    assert choose(scored, by_loss, 200) is scored[-1]
    assert shortlist(scored, by_loss, 200, 1) == [scored[-1]]
