"""Pooling with weights of its own: by a learned score, or by a learned query's attention.

Source of `SequencePool`: Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers" (arXiv 2104.05704),
section 3.2: softmax over tokens of a linear score, then the weighted sum.

Shapes: B images, n patches, D dim.
"""

from __future__ import annotations

from functools import partial

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn import functional

from vitnas.layers.axes import Axes
from vitnas.layers.cost import LayerCost
from vitnas.layers.mlp import ACTS, mlp_axes, mlp_cost, mlp_ratio
from vitnas.layers.select import masked_softmax


class SequencePool(nn.Module):
    """The mean of the patches, weighed by a learned score: (B, n, D) to (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def axes(self) -> dict[str, Axes]:
        one: Axes = (("one", 1),)
        return {"score.weight": (*one, ("dim", self.score.in_features)), "score.bias": one}

    def forward(self, x_BnD: Tensor, mask_Bn: Tensor | None = None) -> Tensor:
        """`mask_Bn` says how much each patch counts."""
        if mask_Bn is None:
            weights_B1n = self.score(x_BnD).softmax(1).transpose(1, 2)
        else:
            weights_B1n = masked_softmax(self.score(x_BnD).transpose(1, 2), mask_Bn.unsqueeze(1)).to(
                x_BnD.dtype
            )
        pooled_B1D: Tensor = weights_B1n @ x_BnD
        return pooled_B1D.squeeze(1)


class _Query(nn.Linear):
    """Of one query that is seen once per image: torch 2.11 multiplies such a view by another kernel where weights want
    gradients, and a Supernet's answer would differ from its Model's in the last bits."""

    def forward(self, x_B1D: Tensor) -> Tensor:
        product_BD = functional.linear(x_B1D.flatten(0, 1), self.weight)
        return product_BD + self.bias.to(product_BD.dtype)


class AttentionPool(AttentionPoolLatent):  # type: ignore[misc]  # timm leaves it untyped
    """A learned query's attention to all patches, then an MLP (SigLIP, arXiv 2303.15343): timm's, with named axes and
    cost. (B, n, D) to (B, D)."""

    def __init__(self, dim: int, num_heads: int, hidden: int, act: str, *, norm_eps: float) -> None:
        norm = partial(nn.LayerNorm, eps=norm_eps)
        ratio, kind = mlp_ratio(dim, hidden), ACTS[act]
        super().__init__(dim, num_heads=num_heads, mlp_ratio=ratio, norm_layer=norm, act_layer=kind)
        self.q = _Query(dim, dim)

    def axes(self) -> dict[str, Axes]:
        one: Axes = (("one", 1),)
        dim: Axes = (("dim", self.out_features),)
        inner: Axes = (("pool_heads", self.num_heads), ("pool_head_dim", self.head_dim))
        pair: Axes = (("kv", 2), *inner)
        axes = {
            "latent": one + one + dim,
            "q.weight": inner + dim,
            "q.bias": inner,
            "kv.weight": pair + dim,
            "kv.bias": pair,
            "proj.weight": dim + inner,
            "proj.bias": dim,
            "norm.weight": dim,
            "norm.bias": dim,
        }
        return axes | {f"mlp.{name}": found for name, found in mlp_axes(self.mlp, "pool_hidden").items()}

    def forward(
        self, x_BnD: Tensor, mask_Bn: Tensor | None = None, log_size_Bn: Tensor | None = None
    ) -> Tensor:
        """`mask_Bn` says which patches count; where it leaves none, all do. `log_size_Bn`: the logarithm of how often
        each counts."""
        seen = None if log_size_Bn is None else log_size_Bn[:, None, None].to(x_BnD.dtype)
        if mask_Bn is not None:
            seen_Bn = mask_Bn != 0
            seen = (seen_Bn | ~seen_Bn.any(1, keepdim=True))[:, None, None]
        pooled_BD: Tensor = super().forward(x_BnD.contiguous(), seen)
        return pooled_BD

    @staticmethod
    def cost(dim: int, num_heads: int, hidden: int, act: str, *, patches: int) -> LayerCost:
        """Memory without the patches."""
        mlp = mlp_cost(dim, hidden, act)
        one = max(dim + num_heads, 2 * dim + mlp.memory, 3 * dim)  # the query's own way, and the MLP's
        return LayerCost(
            macs=2 * dim * dim + 2 * patches * dim * dim + 2 * patches * dim + mlp.macs,
            params=4 * dim * dim + 7 * dim + mlp.params,
            memory=2 * patches * dim + dim + one,
        )
