"""Which of the Archs that a search scored is the answer, where a score is of so many images and no more.

A score of n images has a standard error: 1.3 points at 96 % of 216. The best of two hundred such scores is the
luckiest of the good ones, and by chance often one that leaves much of the budget unused. So a score is drawn
towards what Archs of its cost have on average, the more so the less scores differ beyond their own error (James and
Stein's shrinkage towards a line, with the variances read off the scores themselves).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from vitnas.budget import QUANTITIES, Budget
from vitnas.searching.goal import Goal, Objective, oriented
from vitnas.searching.pareto import front
from vitnas.searching.trial import SearchRecord, Trial

Prefer: TypeAlias = Literal["accuracy", "cost"]
LOSS = "loss"  # as an objective, of what has weights of a supernet
MOST_IMAGES = 1_000_000  # that someone may have
POINT = 0.01


def cost_objective(objectives: Sequence[Objective], budget: Budget) -> Objective:
    """The cost that counts: the first that is an objective, else what the budget limits."""
    costs = [each for each in objectives if each.quantity in QUANTITIES]
    return (costs or [Objective(budget.quantity, "minimize")])[0]


def estimates(trials: Sequence[Trial], goal: Goal, num_images: int) -> tuple[np.ndarray, float]:
    """Scores as they are to be expected, given that each was measured on `num_images` images, and a standard error.

    Returns:
        float (n,): accuracies or, where the search is by loss, losses with a minus; and the error of the best of them.
    """
    by_loss, log_N = goal.objectives[0].name == LOSS, np.log(_costs(trials, goal))
    score_N = np.array([-trial.values[LOSS] if by_loss else trial.values["accuracy"] for trial in trials])
    line_N = score_N - beyond(log_N, score_N)
    noise = _noise([trial.values for trial in trials], num_images, by_loss)
    real = max(0.0, float(np.mean((score_N - line_N) ** 2)) - noise**2)
    expected_N = line_N + (real / (real + noise**2) if noise else 1.0) * (score_N - line_N)
    known = by_loss or "error" in trials[0].values
    return np.asarray(expected_N), noise if known else error(float(expected_N.max()), num_images)


def loss_error(values: Sequence[Mapping[str, float]]) -> float:
    """The standard error of a loss beside others on the same images; 0 where it is not on record.

    How hard the images are is common to all, and most of what the losses of single images vary by. What is left is
    what the loss on half of the images is off by from that on all, here more and there less.
    """
    off_N = np.array([each["loss_odd"] - each[LOSS] for each in values if "loss_odd" in each])
    return float(off_N.std(ddof=1)) if len(off_N) > 1 else 0.0


def error(accuracy: float, num_images: int) -> float:
    """The standard error of an accuracy on so many images; not 0 where all or none are right."""
    share = (accuracy * num_images + 1) / (num_images + 2)
    return float(np.sqrt(share * (1 - share) / num_images))


def error_of(accuracy: float, num_images: int, known: float | None) -> float:
    """The same, or where it is known (of R^2) that."""
    return error(accuracy, num_images) if known is None else known


def _noise(values: Sequence[Mapping[str, float]], num_images: int, by_loss: bool) -> float:
    """The standard error of the scores of a search."""
    if by_loss:
        return loss_error(values)
    known = [each["error"] for each in values if "error" in each]
    mean = float(np.mean([each["accuracy"] for each in values]))
    return error_of(mean, num_images, float(np.mean(known)) if known else None)


def cannot_order(search: SearchRecord, *, finals: bool = False) -> str:
    """Why the scores of a search do not say which of its Archs is best, and how many images would; "" where they do.

    They do where Archs differ by more than a score of so many images is off by. What Archs differ by is what their
    scores vary by beyond that. All were scored on the same images, whose luck accuracies partly share: so fewer may do.

    Args:
        finals: the Arch is chosen by training some all the same.
    """
    by_loss = search.objectives[0].name == LOSS
    values = [trial.values for trial in search.trials if (LOSS if by_loss else "accuracy") in trial.values]
    if len(values) < 2 or not search.num_images:
        return ""
    scores, n = np.array([each[LOSS if by_loss else "accuracy"] for each in values]), search.num_images
    noise = _noise(values, n, by_loss)
    real = float(np.sqrt(max(0.0, scores.var() - noise**2)))
    if real >= noise:
        return ""
    shows = n * noise**2 < MOST_IMAGES * real**2
    enough = math.ceil(n * (noise / (real if shows else POINT)) ** 2 / 10) * 10
    what, unit = ("losses", "") if by_loss else ("accuracies", " points")
    off, differ = (f"{each:.4f}" if by_loss else f"{100 * each:.1f}" for each in (noise, real))
    were = "" if shows else f"were it {POINT:g}, " if by_loss else "were it 1 point, "
    if not by_loss and "error" in values[0]:
        what, unit, off, differ = "R² scores", "", f"{noise:.3f}", f"{real:.3f}"
        were = "" if shows else f"were it {POINT:g}, "
    remedy = (
        "The finals choose by training; hold out more (data.holdout) for a better shortlist."
        if finals
        else "Hold out more (data.holdout), score on several parts of train (search.folds=3), or choose by training "
        "(finals.archs=8)."
    )
    return (
        f"{what} on {n} held-out images are off by {off}{unit} (standard error) and those of the scored Archs differ "
        f"by {differ} beyond that, so which is best they do not say; {were}about {enough:,} images would tell them "
        f"apart. {remedy}"
    )


def choose(trials: Sequence[Trial], goal: Goal, num_images: int, prefer: Prefer = "accuracy") -> Trial:
    """The answer of a search: of `accuracy` the Arch whose score is expected to be the best, of `cost` the cheapest
    whose expected score lies within a standard error of that."""
    (expected_N, near), cost_N = estimates(trials, goal, num_images), _costs(trials, goal)
    best = _ranked(_standing(trials, goal, expected_N), cost_N)[0]
    if prefer == "accuracy":
        return trials[best]
    among = np.flatnonzero(expected_N >= expected_N[best] - near)
    return trials[min(among.tolist(), key=lambda place: (cost_N[place], -expected_N[place], place))]


def shortlist(trials: Sequence[Trial], goal: Goal, num_images: int, n: int) -> list[Trial]:
    """`n` scored Trials to be trained, or all where there are not so many: one half the best to be expected, the other
    spread over the front from its cheapest to its costliest, filled up with the next best. No two have one structure
    (widths, depths, stem) while there are others: a search ends among the kin of what scored best, and what training
    is to tell apart must differ by more than that."""
    standing_N = _standing(trials, goal, estimates(trials, goal, num_images)[0])
    cost_N = _costs(trials, goal)
    ranked = _ranked(standing_N, cost_N)
    cost = cost_objective(goal.objectives, goal.budget)
    points = oriented(np.stack([standing_N, cost_N], axis=1).tolist(), (Objective("accuracy"), cost))
    edge = sorted(front(points), key=lambda place: (cost_N[place], place))
    half = n - n // 2
    spread = [edge[round(i * (len(edge) - 1) / max(1, n // 2 - 1))] for i in range(n // 2)]

    def unlike(places: Sequence[int]) -> list[int]:
        """The first of each structure."""
        first: dict[tuple[int, ...], int] = {}
        for place in places:
            first.setdefault(_structure(trials[place]), place)
        return list(first.values())

    queue = [*unlike(ranked)[:half], *spread, *unlike(ranked), *ranked]
    places = list(dict.fromkeys((*unlike(queue), *queue)))[:n]
    return [trials[place] for place in sorted(places, key=ranked.index)]


def _standing(trials: Sequence[Trial], goal: Goal, expected_N: np.ndarray) -> np.ndarray:
    """float (n,): how Trials are ordered, larger is better: by accuracy what is expected of it, by loss `standing`."""
    if goal.objectives[0].name != LOSS:
        return expected_N
    return standing(
        expected_N, _costs(trials, goal), [(each.cost.params, each.arch.depth) for each in trials]
    )


def standing(
    expected_N: np.ndarray, cost_N: np.ndarray, params_and_depth_N: Sequence[tuple[int, int]]
) -> np.ndarray:
    """float (n,): where Archs stand among each other by what a Supernet and their size say; larger is better.

    An inherited loss flatters what is shallow: of a Supernet that has learned little few parts are good, and a shallow
    Arch needs few. Of what costs alike, more blocks and more parameters learn more in the end. So this is the mean of
    the ranks by loss and by these two, one half each, as far as cost does not tell them already. It orders trained
    Archs better than any of the three (LOG.md).

    Args:
        expected_N: losses as they are to be expected, with a minus.
        cost_N: the cost that counts, in its unit.
    """
    log_N = np.log(np.asarray(cost_N, dtype=np.float64))
    params_N, depth_N = np.log1p(np.asarray(params_and_depth_N, dtype=np.float64)).T
    return ranks(expected_N) + (ranks(beyond(log_N, params_N)) + ranks(beyond(log_N, depth_N))) / 2


def beyond(told_N: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """Values less a line over what tells them in part; float (n,)."""
    centred_N, off_N = told_N - told_N.mean(), values_N - values_N.mean()
    spread = float(centred_N @ centred_N)
    return np.asarray(off_N - (float(centred_N @ off_N) / spread if spread > 0 else 0.0) * centred_N)


def ranks(values_N: np.ndarray) -> np.ndarray:
    """float (n,): how many values are below each, equal ones counted half."""
    rounded_N = np.round(values_N, 12)  # a line through equal values leaves some last bits
    in_order = np.sort(rounded_N)
    below, upto = (np.searchsorted(in_order, rounded_N, side) for side in ("left", "right"))
    return np.asarray((below + upto) / 2, dtype=np.float64)


def _structure(trial: Trial) -> tuple[int, ...]:
    """The genes that change the whole Arch."""
    return tuple(
        option for gene, option in zip(trial.space.genes, trial.genes, strict=True) if gene.structural
    )


def _costs(trials: Sequence[Trial], goal: Goal) -> np.ndarray:
    """float (n,): the cost that counts."""
    cost = cost_objective(goal.objectives, goal.budget)
    return np.array([cost.value(trial.values, trial.cost) for trial in trials])


def _ranked(expected_N: np.ndarray, cost_N: np.ndarray) -> list[int]:
    """Places, the best to be expected first; of equals the cheapest, then the first."""
    return sorted(range(len(expected_N)), key=lambda place: (-expected_N[place], cost_N[place], place))
