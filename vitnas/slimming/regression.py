"""Ridge regression from sums: images are gone through once and leave A'A and A'B behind, however many they were.

Sums are kept in float64 and about the first batch's means, so that float32 activations with large means lose no digits.
With fewer tokens than inputs A'A has no inverse; the ridge gives it one. How strong a ridge is best is told by
two halves of the images, each fitted on one and held against the other, which takes no further pass.

Shapes: B images, N tokens, A inputs, Y outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitnas.errors import UserError

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths to choose from, as shares of the inputs' mean variance."""
LEAST = 1e-30  # where no input varies


class Regression:
    """Outputs as a linear map of inputs and a constant.

    Args:
        inputs, outputs: how many.
        device: where the sums are kept.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(2, *shape, dtype=torch.float64, device=device)

        self._images = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        self._n, self._A, self._Y = zeros(), zeros(inputs), zeros(outputs)
        self._AA, self._AY, self._YY = zeros(inputs, inputs), zeros(inputs, outputs), zeros(outputs)

    def add(self, inputs_BNA: Tensor, outputs_BNY: Tensor, weights_N: Tensor | None = None) -> None:
        """Take in the tokens of some images; `weights_N` says how much each place counts."""
        if self._shift is None:
            self._shift = inputs_BNA.mean((0, 1)), outputs_BNY.mean((0, 1))
        size, tokens = inputs_BNA.shape[:2]
        for half in (0, 1):
            mine = slice((half - self._images) % 2, size, 2)
            a_TA = (inputs_BNA[mine] - self._shift[0]).flatten(0, 1)
            y_TY = (outputs_BNY[mine] - self._shift[1]).flatten(0, 1)
            w_T = torch.ones(len(a_TA), dtype=a_TA.dtype, device=a_TA.device)
            if weights_N is not None:
                w_T = weights_N.to(w_T).repeat(len(a_TA) // tokens)
                root_T1 = w_T.sqrt()[:, None]
                a_TA, y_TY = a_TA * root_T1, y_TY * root_T1
                self._A[half] += (root_T1 * a_TA).sum(0)
                self._Y[half] += (root_T1 * y_TY).sum(0)
            else:
                self._A[half] += a_TA.sum(0)
                self._Y[half] += y_TY.sum(0)
            self._n[half] += w_T.sum()
            self._AA[half] += a_TA.T @ a_TA
            self._AY[half] += a_TA.T @ y_TY
            self._YY[half] += (y_TY**2).sum(0)
        self._images += size

    def solve(self, strength: float | None = None, *, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """(A, Y) slopes and the (Y) constant, in float64.

        Args:
            strength: of the ridge, as a share of the inputs' mean variance; None for the best of `RIDGES`.
            intercept: False where nothing can take a constant, which is then 0.

        Raises:
            UserError: sums that are not finite.
        """
        require_finite(self._AA, self._AY)
        if strength is None:
            strength = self._best(intercept)
        return self._fit(slice(0, 2), [strength], intercept)[0]

    def covariance(self) -> tuple[Tensor, Tensor]:
        """(A, A) covariance of the inputs, and their mean; as `solve`, of finite sums alone."""
        require_finite(self._AA)
        cov_AA, _, mean_A, _ = self._sums(slice(0, 2), True)
        return cov_AA, mean_A

    def _best(self, intercept: bool) -> float:
        if not bool((self._n > 0).all()):
            return 1e-2
        errors = torch.zeros(len(RIDGES), dtype=torch.float64)
        for half in (0, 1):
            fits = self._fit(slice(half, half + 1), RIDGES, intercept)
            errors += torch.stack([self._error(1 - half, *fit) for fit in fits]).cpu()
        return RIDGES[int(errors.argmin())]

    def _sums(self, halves: slice, intercept: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Covariances of inputs, and of inputs with outputs, and both means; about 0 without an intercept."""
        assert self._shift is not None
        n = self._n[halves].sum()
        mean_A, mean_Y = self._A[halves].sum(0) / n, self._Y[halves].sum(0) / n
        cov_AA = self._AA[halves].sum(0) / n - torch.outer(mean_A, mean_A)
        cov_AY = self._AY[halves].sum(0) / n - torch.outer(mean_A, mean_Y)
        mean_A, mean_Y = mean_A + self._shift[0], mean_Y + self._shift[1]
        if not intercept:
            cov_AA = cov_AA + torch.outer(mean_A, mean_A)
            cov_AY = cov_AY + torch.outer(mean_A, mean_Y)
        return cov_AA, cov_AY, mean_A, mean_Y

    def _fit(self, halves: slice, strengths: Sequence[float], intercept: bool) -> list[tuple[Tensor, Tensor]]:
        cov_AA, cov_AY, mean_A, mean_Y = self._sums(halves, intercept)
        mean = cov_AA.diagonal().mean() if len(cov_AA) else cov_AA.sum()
        found = []
        for strength in strengths:
            slopes_AY = ridge_solve(cov_AA, cov_AY, strength * mean)
            constant_Y = mean_Y - mean_A @ slopes_AY if intercept else torch.zeros_like(mean_Y)
            found.append((slopes_AY, constant_Y))
        return found

    def _error(self, half: int, slopes_AY: Tensor, constant_Y: Tensor) -> Tensor:
        """Squared errors of a half of the tokens, summed over outputs, without what does not depend on the fit."""
        cov_AA, cov_AY, mean_A, mean_Y = self._sums(slice(half, half + 1), True)
        bias_Y = mean_A @ slopes_AY + constant_Y - mean_Y
        spread = (slopes_AY * (cov_AA @ slopes_AY - 2 * cov_AY)).sum()
        return spread + (bias_Y**2).sum()


def require_finite(*sums: Tensor) -> None:
    """Refuse sums of activations that hold NaN or infinity."""
    if not all(bool(torch.isfinite(each).all()) for each in sums):
        raise UserError(
            "activations are not finite (NaN or infinite); nothing can be fitted to them. Look for such weights in the "
            "network, or such pixels in the images."
        )


def ridge_solve(cov_AA: Tensor, cov_AY: Tensor, ridge: Tensor) -> Tensor:
    """The slopes for which (cov_AA + ridge I) slopes = cov_AY, with as much more ridge as an inverse needs: products of
    float32 leave a covariance of few tokens a little below what it should be."""
    eye_AA = torch.eye(len(cov_AA), dtype=cov_AA.dtype, device=cov_AA.device)
    ridge = ridge.clamp(min=LEAST)
    while True:
        factor_AA, failed = torch.linalg.cholesky_ex(cov_AA + ridge * eye_AA)
        if not int(failed):
            return torch.cholesky_solve(cov_AY, factor_AA)
        ridge = 10 * ridge
