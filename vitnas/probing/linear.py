"""A linear classifier on features: multinomial logistic regression by L-BFGS, run to its end.

It has one number to choose, the strength of the penalty, where descent by single images has a rate, a schedule and a
number of epochs, and a result that depends on their order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

STEPS = 500  # at most; with a weak penalty the classes are parted long before the weights settle


class Linear:
    """A classifier of features that were brought to mean 0 and deviation 1.

    Args:
        values_ND, classes_N: what it is fitted to.
        strength: of one image against the penalty on squared weights (scikit-learn's C).
        start: another of the same features whose weights it starts from, to be done sooner.
    """

    def __init__(
        self, values_ND: Tensor, classes_N: Tensor, strength: float, start: Linear | None = None
    ) -> None:
        if start is None:
            self.mean_D = values_ND.double().mean(0)
            self.std_D = values_ND.double().std(0, correction=0).clamp_min(1e-6)
        else:
            self.mean_D, self.std_D = start.mean_D, start.std_D
        self._fitted: Any = LogisticRegression(max_iter=STEPS) if start is None else start._fitted
        self._fitted.set_params(C=strength, warm_start=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", "scipy.optimize: The `disp`")  # of an older scikit-learn
            self._fitted.fit(self._normed(values_ND), classes_N.numpy())

    def classes(self, values_ND: Tensor) -> Tensor:
        """(N,) the class of each."""
        return torch.as_tensor(self._fitted.predict(self._normed(values_ND)))

    def accuracy(self, values_ND: Tensor, classes_N: Tensor) -> float:
        """Share of the images whose class is found."""
        return float((self.classes(values_ND) == classes_N).double().mean())

    def _normed(self, values_ND: Tensor) -> Any:
        return ((values_ND.double() - self.mean_D) / self.std_D).numpy()


def linear_probe(
    values_ND: Tensor, classes_N: Tensor, held_ND: Tensor, held_classes_N: Tensor, strengths: Iterable[float]
) -> tuple[float, float]:
    """The strength that does best on held-out images, and its accuracy there; of equals the smallest.

    Args:
        values_ND, classes_N: what each is fitted to, each from where the smaller one ended.
    """
    fitted: Linear | None = None
    best = (0.0, -1.0)
    for strength in sorted(strengths):
        fitted = Linear(values_ND, classes_N, strength, fitted)
        found = fitted.accuracy(held_ND, held_classes_N)
        if found > best[1]:
            best = (strength, found)
    return best
