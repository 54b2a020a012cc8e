"""How many directions features fill."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(features_ND: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007; RankMe, Garrido et al.
    2023, equation 1): from 1, where all features are multiples of one vector, to min(N, D).

    Args:
        features_ND: (N, D), not centred. All zeros count as 1.
    """
    values = torch.linalg.svdvals(features_ND.double())
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())
