"""The predictor: detail only where held-out Archs ask for it; and the searcher that it guides."""

from __future__ import annotations

import numpy as np
import pytest
from search_help import MICRO

from vitnas.budget import Budget
from vitnas.searching import Evolution, Goal, Study, rank_correlation, search
from vitnas.searching.predictor import Features, Predictor, normal_scores
from vitnas.searching.predictor_search import PredictorSearch
from vitnas.space import Matrix, Space, mixer_space, vit_resnas, vitas

FEATURES = Features(MICRO)
RNG = np.random.default_rng
STRUCTURE = [place for place, gene in enumerate(MICRO.genes) if gene.structural]


def planted(genes_NG: Matrix, *, blocks: float, noise: float, seed: int = 0) -> np.ndarray:
    """Scores by structure, by single blocks (`blocks` is their weight), and noise."""
    rng = RNG(seed)
    worth_G = rng.normal(0, 1, genes_NG.shape[1]) * blocks
    worth_G[STRUCTURE] = 1.0
    return genes_NG @ worth_G + noise * RNG(seed + 1).normal(size=len(genes_NG))


def test_scores_become_quantiles_and_ties_stay() -> None:
    found = normal_scores(np.array([3.0, 1.0, 2.0, 2.0, -1e9]))
    assert found[2] == found[3]
    assert (np.argsort(found)[[0, 1, 4]] == [4, 1, 0]).all()
    assert found[4] > -2, "one that failed outright bends nothing"


def test_few_archs_are_told_apart_by_structure_alone_many_by_every_block() -> None:
    genes = np.unique(MICRO.random_matrix(400, RNG(0)), axis=0)
    order = RNG(1).permutation(len(genes))
    for blocks, noise, n, level in ((0.1, 0.5, 20, 0), (1.0, 0.05, 200, 2)):
        scores = planted(genes, blocks=blocks, noise=noise)
        seen, new = order[:n], order[n:]
        found = Predictor.fit(FEATURES, genes[seen], scores[seen])
        assert found.level == level
        tau = rank_correlation(found(genes[new]).tolist(), scores[new].tolist())["kendall_tau"]
        assert tau > 0.6
        assert found.error < 0.6


def test_what_cannot_be_predicted_is_said() -> None:
    genes = np.unique(MICRO.random_matrix(60, RNG(0)), axis=0)
    noise = Predictor.fit(FEATURES, genes, RNG(2).normal(size=len(genes)))
    assert noise.error > 0.9
    equal = Predictor.fit(FEATURES, genes, np.ones(len(genes)))
    assert np.ptp(equal(genes)) == 0


def test_left_out_errors_are_those_of_models_fitted_to_the_others() -> None:
    from vitnas.searching.predictor import _best, _with_constant

    design = _with_constant(FEATURES.of(MICRO.random_matrix(15, RNG(0)))[1])
    target = RNG(1).normal(size=15)
    errors, penalty = _best(design, target)
    for i in (0, 7):
        rest = np.delete(np.arange(15), i)
        weights = np.linalg.solve(
            design[rest].T @ design[rest] + penalty * np.eye(design.shape[1]), design[rest].T @ target[rest]
        )
        assert errors[i] == pytest.approx((target[i] - design[i] @ weights) ** 2)


@pytest.mark.parametrize(
    "space",
    [
        vit_resnas("micro", image_size=8, patch_size=2, num_classes=4),
        vitas("micro", image_size=8, num_classes=4),
        mixer_space("micro", image_size=8, patch_size=2, num_classes=4),
    ],
    ids=lambda space: space.name,
)
def test_every_kind_of_space_has_features(space: Space) -> None:
    genes = space.random_matrix(40, RNG(0))
    levels = Features(space).of(genes)
    assert [len(level) for level in levels] == [40, 40, 40]
    assert levels[0].shape[1] < levels[1].shape[1] < levels[2].shape[1]
    assert all(np.isfinite(level).all() for level in levels)
    macs = space.cost_table().costs(genes)["macs"].astype(float)
    found = Predictor.fit(Features(space), genes, macs)
    assert rank_correlation(found(genes).tolist(), macs.tolist())["kendall_tau"] > 0.8


def test_a_predictor_s_search_leaves_less_than_evolution() -> None:
    """On planted scores whose best Arch within the budget is known from all draws."""
    goal = Goal(MICRO, Budget.parse("macs<=700K"))
    every = MICRO.random_matrix(60_000, RNG(3))
    every = every[goal.meets(every)]
    left: dict[str, list[float]] = {"evolution": [], "predictor": []}
    for seed in range(2):
        scores = planted(every, blocks=0.7, noise=0.0, seed=seed)
        top, spread = scores.max(), scores.std()
        for name, searcher in (
            ("evolution", Evolution.sized(60)),
            ("predictor", PredictorSearch(first=10, crowd=128, rounds=4)),
        ):
            study = search(
                Study.open(MICRO, goal.budget, seed=seed),
                lambda arch, seed=seed: {  # type: ignore[misc]
                    "accuracy": float(
                        planted(np.array([MICRO.encode(arch)]), blocks=0.7, noise=0.0, seed=seed)[0]
                    )
                },
                searcher=searcher,
                num_trials=60,
            )
            left[name].append(float((top - study.best().values["accuracy"]) / spread))
    assert np.mean(left["predictor"]) < 0.5 * np.mean(left["evolution"])
