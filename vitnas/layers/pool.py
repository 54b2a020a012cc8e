"""Sequence pooling: the mean of the patches, weighed by a learned score.

Source: Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers" (arXiv 2104.05704), section 3.2:
softmax over tokens of a linear score, then the weighted sum.

Shapes: B images, n patches, D dim.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitnas.layers.axes import Axes
from vitnas.layers.select import masked_softmax


class SequencePool(nn.Module):
    """(B, n, D) to (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def axes(self) -> dict[str, Axes]:
        one: Axes = (("one", 1),)
        return {"score.weight": (*one, ("dim", self.score.in_features)), "score.bias": one}

    def forward(self, x_BnD: Tensor, mask_Bn: Tensor | None = None) -> Tensor:
        """`mask_Bn` says which patches count."""
        if mask_Bn is None:
            weights_B1n = self.score(x_BnD).softmax(1).transpose(1, 2)
        else:
            weights_B1n = masked_softmax(self.score(x_BnD).transpose(1, 2), mask_Bn.unsqueeze(1)).to(
                x_BnD.dtype
            )
        pooled_B1D: Tensor = weights_B1n @ x_BnD
        return pooled_B1D.squeeze(1)
