"""Numbers that a network tells of images: it learns and says them standardised, and who shows them turns them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitnas.model.timm_cfg import SCALE


@dataclass(frozen=True)
class Scale:
    """What numbers are standardised by, a mean and a standard deviation for each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def standardised(self, numbers_BT: Tensor) -> Tensor:
        """float32, of mean about 0 and std about 1 in train."""
        mean_T, std_T = (
            torch.tensor(each, dtype=torch.float64, device=numbers_BT.device)
            for each in (self.mean, self.std)
        )
        return ((numbers_BT.double() - mean_T) / std_T).float()

    def restored(self, standardised_BT: Tensor) -> Tensor:
        """float32, as they were given."""
        mean_T, std_T = (torch.tensor(each, device=standardised_BT.device) for each in (self.mean, self.std))
        return standardised_BT.float() * std_T + mean_T


def scale_of(network: Any) -> Scale | None:
    """Of a network that tells numbers."""
    given = (getattr(network, "pretrained_cfg", None) or {}).get(SCALE)
    return Scale(tuple(given[0]), tuple(given[1])) if given else None


def explained(told_NT: Tensor, numbers_NT: Tensor) -> Tensor:
    """(N,) what is explained of each image's numbers: 1 less its squared error as a share of their variance (of one
    that does not vary here, of 1, its variance in train), mean over the numbers. The mean of it is R^2.

    >>> explained(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [5.0]]))
    tensor([1., 0.])
    """
    variance_T = numbers_NT.var(0, correction=0)
    variance_T = torch.where(variance_T > 0, variance_T, 1.0)
    return 1 - ((told_NT - numbers_NT) ** 2 / variance_T).mean(1)
