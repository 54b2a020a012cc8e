"""A predictor of scores from genes and counts, fitted to the few Archs that were scored or trained.

Ridge regression, on features in three levels of detail: structure (widths, depths, stages), then the means over
blocks and the counted costs, then every block by itself. With few Archs the finer levels fit noise, so a finer one
is taken only where the errors on Archs that were left out are lower by two standard errors (Breiman's rule, a
little stricter). Scores enter as normal scores of their ranks: a net that failed outright would else bend the whole
line. What is left out is exact for a ridge: no model is fitted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from vitnas.space import Gene, Genes, Matrix, Space

PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
CLEARLY = 2.0  # standard errors by which a finer level must be better
CONSTANT = 10.0  # of the column that stands for the mean, so that it is hardly held back
WEIGHTS = (1.0, 0.5, 0.3)  # of the levels' features: an effect of one block is expected to be smaller


@dataclass(frozen=True, eq=False)
class Features:
    """The features of a Space's Archs, in three levels. Standardised by Archs drawn at random from it."""

    space: Space

    def of(self, genes: Sequence[Genes] | Matrix) -> tuple[np.ndarray, ...]:
        """(N, F) of each level, the coarsest first; a level holds those before it."""
        raw = self._raw(np.asarray(genes, dtype=np.int64))
        found: list[np.ndarray] = []
        for weight, values_NF, (mean_F, spread_F) in zip(WEIGHTS, raw, self._scales, strict=True):
            scaled_NF = weight * (values_NF - mean_F) / spread_F
            found.append(np.hstack([*found[-1:], scaled_NF]))
        return tuple(found)

    @cached_property
    def _scales(self) -> list[tuple[np.ndarray, np.ndarray]]:
        drawn = self._raw(self.space.random_matrix(512, np.random.default_rng(0)))
        return [(level.mean(0), np.maximum(level.std(0), 1e-9)) for level in drawn]

    def _raw(self, genes_NG: Matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        active_NG = self.space.active_matrix(genes_NG)
        costs = self.space.cost_table().costs(genes_NG)
        structure, blocks = [active_NG.sum(1)[:, None]], list[np.ndarray]()
        families: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for place, gene in enumerate(self.space.genes):
            values_NV, is_active_N = _values(gene)[genes_NG[:, place]], active_NG[:, place]
            if gene.structural:
                structure.append(np.where(is_active_N[:, None], values_NV, 0.0))
                continue
            mean_V = values_NV[is_active_N].mean(0) if is_active_N.any() else values_NV.mean(0)
            blocks.append(np.where(is_active_N[:, None], values_NV - mean_V, 0.0))
            families.setdefault(gene.name.rpartition(".")[0] or gene.name, []).append(
                (values_NV, is_active_N)
            )
        means = [np.log(np.maximum(costs[name], 1))[:, None] for name in ("macs", "params")]
        for members in families.values():
            count_N = np.maximum(sum(on.astype(float) for _, on in members), 1.0)
            means.append(sum(each * on[:, None] for each, on in members) / count_N[:, None])
        empty = np.zeros((len(genes_NG), 0))
        return np.hstack(structure), np.hstack(means), np.hstack([empty, *blocks])


def _values(gene: Gene) -> np.ndarray:
    """(options, V): an ordered number as itself, anything else as one column per option."""
    options: list[Any] = list(gene.options)
    if all(isinstance(option, int | float) for option in options):
        return np.asarray(options, dtype=float)[:, None]
    return np.eye(len(options))


@dataclass(frozen=True, eq=False)
class Predictor:
    """See the module. `mean_F` and `root_FF` are the weights of the features and a root of their covariance.

    Args:
        level: how detailed its features are, from 0.
        error: the mean squared error on left-out Archs, in units of the scores' variance: 1 is no better than the mean.
    """

    features: Features
    level: int
    error: float
    mean_F: np.ndarray
    root_FF: np.ndarray

    @classmethod
    def fit(cls, features: Features, genes: Sequence[Genes] | Matrix, scores: Sequence[float]) -> Predictor:
        """Fit to Archs and what they scored; larger is better."""
        levels, target_N = features.of(genes), normal_scores(np.asarray(scores, dtype=float))
        fits = [_best(_with_constant(level), target_N) for level in levels]
        pick = 0
        for level in range(1, len(fits)):
            gain_N = fits[pick][0] - fits[level][0]
            if gain_N.mean() > CLEARLY * gain_N.std() / np.sqrt(len(gain_N)):
                pick = level
        errors_N, penalty = fits[pick]
        design_NF = _with_constant(levels[pick])
        inverse_FF = np.linalg.inv(design_NF.T @ design_NF + penalty * np.eye(design_NF.shape[1]))
        root_FF = np.linalg.cholesky((inverse_FF + inverse_FF.T) / 2) * np.sqrt(errors_N.mean())
        return cls(features, pick, float(errors_N.mean()), inverse_FF @ design_NF.T @ target_N, root_FF)

    def __call__(self, genes: Sequence[Genes] | Matrix) -> np.ndarray:
        """float (N,): what is expected, in standard deviations of the scores that it was fitted to."""
        return np.asarray(self._design(genes) @ self.mean_F)

    def drawn(self, rng: np.random.Generator) -> Predictor:
        """One of the predictors that the data allow, at random (for Thompson sampling)."""
        weights_F = self.mean_F + self.root_FF @ rng.standard_normal(len(self.mean_F))
        return Predictor(self.features, self.level, self.error, weights_F, self.root_FF)

    def _design(self, genes: Sequence[Genes] | Matrix) -> np.ndarray:
        return _with_constant(self.features.of(genes)[self.level])


def normal_scores(scores_N: np.ndarray) -> np.ndarray:
    """Ranks as quantiles of a normal distribution; equal scores stay equal."""
    _, place_N, count_U = np.unique(scores_N, return_inverse=True, return_counts=True)
    share_U = (np.cumsum(count_U) - count_U / 2) / len(scores_N)
    return np.array([NormalDist().inv_cdf(share) for share in share_U])[place_N]


def _with_constant(features_NF: np.ndarray) -> np.ndarray:
    return np.hstack([np.full((len(features_NF), 1), CONSTANT), features_NF])


def _best(design_NF: np.ndarray, target_N: np.ndarray) -> tuple[np.ndarray, float]:
    """Squared errors of Archs that are left out one by one, with the penalty that makes them smallest, and that."""
    values_F, vectors_NF = np.linalg.svd(design_NF, full_matrices=False)[1::-1]
    tried = []
    for penalty in PENALTIES:
        shrunk_F = values_F**2 / (values_F**2 + penalty)
        hat_NN = (vectors_NF * shrunk_F) @ vectors_NF.T
        errors_N = ((target_N - hat_NN @ target_N) / (1 - np.minimum(np.diag(hat_NN), 0.999))) ** 2
        tried.append((float(errors_N.mean()), penalty, errors_N))
    _, penalty, errors_N = min(tried, key=lambda row: row[:2])
    return errors_N, penalty
