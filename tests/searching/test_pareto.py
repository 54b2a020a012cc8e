"""Dominance over all pairs of a grid, fronts, and hypervolume against a brute-force answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from vitnas.errors import UserError
from vitnas.searching import hypervolume, rank_correlation
from vitnas.searching.pareto import (
    best_first,
    crowding,
    front,
    hypervolume_history,
    is_dominated,
    ranks,
)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dominance_over_all_pairs(dims: int) -> None:
    grid = [np.array(point) for point in itertools.product(range(3), repeat=dims)]
    some = np.random.default_rng(0).integers(0, 9, (24, dims))  # a few twice
    for points in (grid, list(some)):
        beaten = is_dominated(np.array(points))
        assert beaten.tolist() == [any(all(a >= b) and any(a > b) for a in points) for b in points]


def test_ranks_peel_fronts() -> None:
    #   y
    # 3 | 0 . . .      the 0s beat the 1s beat the 2
    # 2 | 1 0 . .
    # 1 | . 1 . 0
    # 0 | 2 . . 1
    #     0 1 2 3  x
    points = np.array([(0, 3), (0, 2), (1, 2), (1, 1), (3, 1), (0, 0), (3, 0)])
    assert ranks(points).tolist() == [0, 1, 0, 1, 0, 2, 1]
    assert ranks(points, 4).tolist() == [0, 1, 0, 1, 0, -1, 1]
    assert best_first(points, 4) == best_first(points)[:4]
    assert front(points) == [0, 2, 4]
    assert front(points[:0]) == []


def test_equal_points_are_both_on_the_front() -> None:
    assert front(np.array([(1.0, 1.0), (1.0, 1.0), (0.0, 1.0)])) == [0, 1]


def test_crowding_keeps_the_ends_and_prefers_the_lonely() -> None:
    points = np.array([(0.0, 10.0), (1.0, 9.0), (2.0, 8.0), (8.0, 2.0), (10.0, 0.0)])
    distance = crowding(points)
    assert np.isinf(distance[[0, 4]]).all()
    # Worked by hand: (8-1)/10 in both objectives for the third; (2-0)/10 twice for the second.
    np.testing.assert_allclose(distance[1:4], [0.4, 1.4, 1.6])
    assert best_first(points) == [0, 4, 3, 2, 1]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_hypervolume_equals_counting_cells(dims: int) -> None:
    rng = np.random.default_rng(dims)
    for _ in range(30):
        points = rng.integers(0, 7, size=(rng.integers(1, 9), dims)).astype(float)
        cells = itertools.product(range(7), repeat=dims)
        expected = sum(bool((points >= np.array(cell) + 1).all(axis=1).any()) for cell in cells)
        assert hypervolume(points, np.zeros(dims)) == pytest.approx(expected)


def test_hypervolume_needs_few_objectives() -> None:
    with pytest.raises(UserError, match="number of objectives is 4; hypervolume is exact for at most 3"):
        hypervolume(np.ones((2, 4)), np.zeros(4))


def test_hypervolume_history_grows_to_the_whole() -> None:
    points = np.random.default_rng(0).random((40, 2))
    history = hypervolume_history(points)
    values = [value for _, value in history]
    assert values == sorted(values)
    assert history[-1][0] == 40
    scaled = (points - points.min(axis=0)) / np.ptp(points, axis=0)
    assert values[-1] == pytest.approx(hypervolume(scaled, np.zeros(2)))
    assert hypervolume_history(points[:0]) == []
    assert hypervolume_history(np.ones((3, 2))) == [(1, 1.0), (3, 1.0)]


def test_rank_correlation_equals_scipy_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (rng.integers(0, 6, 15).astype(float).tolist() for _ in range(2))
        ours = rank_correlation(a, b)
        assert ours["kendall_tau"] == pytest.approx(stats.kendalltau(a, b).statistic)
        assert ours["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
        assert ours["n"] == 15


def test_rank_correlation_refuses() -> None:
    with pytest.raises(UserError, match="scores are 2 and 3 long"):
        rank_correlation([1, 2], [1, 2, 3])
    with pytest.raises(UserError, match="all scores of one side are equal"):
        rank_correlation([1, 1], [1, 2])
