"""ScoreModel: how good Archs are relative to each other, learned from the few that were looked at.

Scores on one small batch of images are noisy, and a Supernet moves while it trains. Both cancel when only Archs
that were scored on the same images at the same time are compared. So the model is additive over genes and sees
differences only:

    score(a) - mean score of the group  ~  w . (x(a) - mean x of the group),      x(a): one-hot of the genes that matter

with ridge, and older groups fading by `decay` per group. The sums that the solution needs are all that is kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitnas.space import Matrix, Space

Floats = npt.NDArray[np.float64]


class ScoreModel:
    """Additive model of the score of canonical genes, up to a constant.

    Args:
        space: whose genes.
        ridge: strength of the pull to 0, in scored Archs.
        decay: weight of a group one group later.
    """

    def __init__(self, space: Space, *, ridge: float = 1.0, decay: float = 0.98) -> None:
        self.space, self.ridge, self.decay = space, ridge, decay
        self._starts = np.cumsum([0, *space.num_options])
        size = int(self._starts[-1])
        self.products = torch.zeros(size, size, dtype=torch.float64)
        self.targets = torch.zeros(size, dtype=torch.float64)

    def features(self, genes_NG: Matrix) -> Floats:
        """(N, sum of options): 1 at the option of each gene that matters."""
        features = np.zeros((len(genes_NG), int(self._starts[-1])))
        rows = np.repeat(np.arange(len(genes_NG)), genes_NG.shape[1])
        columns = (genes_NG + self._starts[:-1]).reshape(-1)
        features[rows, columns] = self.space.active_matrix(genes_NG).reshape(-1)
        return features

    def add(self, genes_NG: Matrix, scores_N: Floats) -> None:
        """A group of Archs that were scored on the same images by the same weights."""
        features = self.features(genes_NG)
        x = torch.from_numpy(features - features.mean(0))
        y = torch.from_numpy(np.asarray(scores_N, dtype=np.float64) - np.mean(scores_N))
        self.products.mul_(self.decay).add_(x.T @ x)
        self.targets.mul_(self.decay).add_(x.T @ y)

    def weights(self) -> Floats:
        """(sum of options,): the worth of every option of every gene."""
        system = self.products + self.ridge * torch.eye(len(self.targets), dtype=torch.float64)
        solved: Floats = torch.linalg.solve(system, self.targets).numpy()
        return solved

    def __call__(self, genes_NG: Matrix) -> Floats:
        """(N,) scores up to a constant."""
        return self.features(genes_NG) @ self.weights()

    def tensors(self) -> dict[str, Tensor]:
        return {"products": self.products, "targets": self.targets}
