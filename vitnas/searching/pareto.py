"""Which Archs are not beaten by another: dominance, fronts, crowding, hypervolume.

Points are float arrays (num_points, num_objectives) in which **larger is better** in every column;
`oriented` of `vitnas.searching.goal` turns minimised objectives around. Optuna has these sums too, but in private
modules, and its `best_trials` reads a Study anew; scipy's correlations would be a dependency for ten lines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitnas.errors import UserError
from vitnas.train.evaluate import Z95


def is_dominated(points: np.ndarray) -> np.ndarray:
    """bool (num_points,): which points some other point dominates: it is nowhere worse and somewhere better.

    From the largest in the first objective down, only what came before can dominate. With two objectives one sweep
    does; with more each point is held against the front so far.
    """
    order = np.lexsort(-points.T[::-1])
    beaten = np.zeros(len(points), dtype=bool)
    if points.shape[1] == 2 and len(points):
        x, y = points[order].T
        highest = np.maximum.accumulate(y)
        leads = np.append(True, highest[1:] > highest[:-1])
        leader = np.maximum.accumulate(np.where(leads, np.arange(len(y)), 0))  # the first that is so high
        beaten[order] = (highest > y) | (x[leader] > x)
        return beaten
    kept = np.empty_like(points)
    count = 0
    for place in order:
        as_good = kept[:count][(kept[:count] >= points[place]).all(axis=1)]
        if (as_good > points[place]).any():
            beaten[place] = True
        else:
            kept[count], count = points[place], count + 1
    return beaten


def front(points: np.ndarray) -> list[int]:
    """Indices of the points that none dominates, in their given order."""
    if len(points) == 0:
        return []
    return [int(index) for index in np.flatnonzero(~is_dominated(points))]


def ranks(points: np.ndarray, count: int | None = None) -> np.ndarray:
    """int (num_points,): 0 for the front, 1 for the front of what remains, and so on.

    With `count` no further front is looked for when so many points have a rank; the others' is -1.
    """
    result = np.full(len(points), -1)
    left = np.arange(len(points))
    rank, wanted = 0, len(points) if count is None else min(count, len(points))
    while len(points) - len(left) < wanted:
        beaten = is_dominated(points[left])
        result[left[~beaten]] = rank
        left, rank = left[beaten], rank + 1
    return result


def crowding(points: np.ndarray) -> np.ndarray:
    """float (num_points,): how far a point's neighbours lie, summed over objectives; infinite at the ends."""
    distance = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]] if len(order) else 0.0
        distance[order[:1]] = distance[order[-1:]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance


def best_first(points: np.ndarray, count: int | None = None) -> list[int]:
    """Indices of the `count` best points (None for all), by rank, the less crowded first, then as given (NSGA-II)."""
    rank = ranks(points, count)
    distance = np.zeros(len(points))
    for value in range(int(rank.max(initial=-1)) + 1):
        members = np.flatnonzero(rank == value)
        distance[members] = crowding(points[members])
    found = np.flatnonzero(rank >= 0).tolist()
    return sorted(found, key=lambda index: (int(rank[index]), -float(distance[index]), index))[:count]


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Exact volume between `reference` and the points, for one to three objectives.

    Args:
        points: (num_points, num_objectives), larger is better.
        reference: (num_objectives,), the worst corner; points not above it add nothing.

    Raises:
        UserError: more than three objectives.
    """
    dims = points.shape[1]
    if dims > 3:
        raise UserError(f"the number of objectives is {dims}; hypervolume is exact for at most 3. Use fewer.")
    gains = np.clip(points - reference, 0.0, None)
    gains = gains[(gains > 0).all(axis=1)]
    if len(gains) == 0:
        return 0.0
    if dims == 1:
        return float(gains.max())
    return _area(gains) if dims == 2 else _volume(gains)


def _area(gains: np.ndarray) -> float:
    """Area under the staircase of 2-D points, from the right: each step adds what it is higher by."""
    area = height = 0.0
    for x, y in gains[np.argsort(-gains[:, 0], kind="stable")]:
        if y > height:
            area += float(x) * (float(y) - height)
            height = float(y)
    return area


def _volume(gains: np.ndarray) -> float:
    """Slices along the third axis: between two levels the cross-section is the area of the points above."""
    order = gains[np.argsort(-gains[:, 2], kind="stable")]
    levels = np.append(order[:, 2], 0.0)
    return float(sum(_area(order[: i + 1, :2]) * (levels[i] - levels[i + 1]) for i in range(len(order))))


def hypervolume_history(points: np.ndarray) -> list[tuple[int, float]]:
    """(number of points so far, hypervolume) wherever it grows, and at the end.

    Each objective is scaled to [0, 1] by the worst and the best of all points, and the reference is 0: the figures
    of one history compare with each other, not with those of another history.
    """
    if len(points) == 0 or points.shape[1] > 3:
        return []
    low, high = points.min(axis=0), points.max(axis=0)
    # An objective that never varied counts as reached (1), so that it does not hide the others.
    scaled = np.where(high > low, (points - low) / np.where(high > low, high - low, 1.0), 1.0)
    zero = np.zeros(points.shape[1])
    history: list[tuple[int, float]] = []
    best = scaled[:0]
    for count, point in enumerate(scaled, start=1):
        if not any((kept >= point).all() for kept in best):
            best = np.vstack([best, point])
            best = best[front(best)]
            history.append((count, hypervolume(best, zero)))
    if history[-1][0] != len(points):
        history.append((len(points), history[-1][1]))
    return history


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> dict[str, float | int]:
    """How alike two scores order the same Archs: {"kendall_tau", "spearman", "n"}; 1 is the same order.

    Raises:
        UserError: different lengths, fewer than two pairs, or a side whose scores are all equal (no order).
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(
            f"scores are {len(a)} and {len(b)} long; a correlation needs two or more pairs of them."
        )
    if len(set(a)) < 2 or len(set(b)) < 2:
        raise UserError(
            "all scores of one side are equal; they have no order. Use more Archs or more images."
        )
    one, two = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    order_one = np.sign(one[:, None] - one[None, :])
    order_two = np.sign(two[:, None] - two[None, :])
    # Kendall's tau-b: concordant less discordant pairs, over the pairs that are not tied on either side.
    tau = (order_one * order_two).sum() / np.sqrt((order_one**2).sum() * (order_two**2).sum())
    # Spearman's rho is Pearson's r of the ranks; a row sum of signs is the (tie-averaged) rank, shifted.
    spearman = np.corrcoef(order_one.sum(axis=1), order_two.sum(axis=1))[0, 1]
    return {"kendall_tau": float(tau), "spearman": float(spearman), "n": len(a)}


def kendall_interval(tau: float, n: int) -> tuple[float, float]:
    """A 95 % interval of Kendall's tau of `n` Archs drawn at random, if anything too wide.

    By the largest variance that tau can have, 2 (1 - tau^2) / n (Kendall, "Rank Correlation Methods", chapter 4),
    solved for the true tau as Wilson's interval is for a share.

    >>> [round(end, 2) for end in kendall_interval(0.6, 12)]
    [-0.19, 0.92]
    """
    c = 2 * Z95**2 / n
    half = np.sqrt(c * (1 + c - tau**2))
    return float((tau - half) / (1 + c)), float((tau + half) / (1 + c))
