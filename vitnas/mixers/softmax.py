"""Multi-head self-attention (Vaswani et al., arXiv 1706.03762), optionally with 2-D relative positions.

Parameter names are timm's: `qkv`, `proj`. The head dimension is free of `dim / num_heads`.

Shapes: B images, N tokens, D dim, A heads, K head_dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.layers.axes import Axes
from vitnas.layers.relative_position import RelativePosition2d, line_features

Convention = Literal["executed", "plain", "dense_relative", "patch_tokens"]


class Softmax(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v, by torch's fused attention.

    Args:
        dim: width of the tokens.
        num_heads, head_dim: the inner width is their product.
        relative_position: largest distance of 2-D relative positions (in patches); 0 for none.
        grid_size: patches along one side; only relative positions need it.
        num_prefix_tokens: tokens before the patches (0 or 1).
        scale: factor of q k^T; None for head_dim ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        relative_position: int = 0,
        grid_size: int = 0,
        num_prefix_tokens: int = 1,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim if head_dim is not None else dim // num_heads
        inner = self.num_heads * self.head_dim
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, dim)
        self.rel_pos_k: RelativePosition2d | None = None
        self.rel_pos_v: RelativePosition2d | None = None
        if relative_position:
            self.rel_pos_k, self.rel_pos_v = (
                RelativePosition2d(
                    self.head_dim, grid_size, relative_position, num_prefix_tokens=num_prefix_tokens
                )
                for _ in range(2)
            )

    def axes(self) -> dict[str, Axes]:
        rows: Axes = (("qkv", 3), ("heads", self.num_heads), ("head_dim", self.head_dim))
        dim: Axes = (("dim", self.proj.out_features),)
        axes = {"qkv.weight": rows + dim, "proj.weight": dim + rows[1:], "proj.bias": dim}
        return axes | ({"qkv.bias": rows} if self.qkv.bias is not None else {})

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        qkv = self.qkv(x_BND).unflatten(2, (3, self.num_heads, self.head_dim))
        q_BANK, k_BANK, v_BANK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.rel_pos_k is None or self.rel_pos_v is None:
            out = functional.scaled_dot_product_attention(q_BANK, k_BANK, v_BANK, scale=self.scale)
        else:
            out = self._relative(q_BANK, k_BANK, v_BANK, self.rel_pos_k, self.rel_pos_v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _relative(
        self,
        q_BANK: Tensor,
        k_BANK: Tensor,
        v_BANK: Tensor,
        keys: RelativePosition2d,
        values: RelativePosition2d,
    ) -> Tensor:
        lines_NF = line_features(keys.grid_size, keys.num_prefix_tokens, q_BANK.device, q_BANK.dtype)
        lines = lines_NF.expand(*k_BANK.shape[:2], -1, -1)
        out = functional.scaled_dot_product_attention(
            torch.cat([q_BANK, keys.scores(q_BANK).to(q_BANK.dtype)], dim=-1),
            torch.cat([k_BANK, lines], dim=-1),
            torch.cat([v_BANK, lines], dim=-1),
            scale=self.scale,
        )
        return out[..., : self.head_dim] + values.combine(out[..., self.head_dim :])

    @staticmethod
    def macs(
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        grid_size: int,
        num_prefix_tokens: int,
        relative_position: int,
        convention: Convention = "executed",
    ) -> int:
        """Multiply-accumulates of one image; see `vitnas.count` for the conventions."""
        tokens = grid_size**2 + num_prefix_tokens
        inner = num_heads * head_dim
        macs = 4 * tokens * dim * inner + 2 * tokens**2 * inner
        if relative_position and convention == "executed":
            features = 2 * grid_size + bool(num_prefix_tokens)
            macs += 2 * tokens**2 * num_heads * features  # the wider q, k and v
            entries = 2 * (2 * min(relative_position, grid_size - 1) + 2)
            macs += 2 * tokens * entries * inner  # products with the tables
        elif relative_position and convention == "dense_relative":
            macs += 2 * tokens**2 * inner
        return macs

    @staticmethod
    def params(dim: int, num_heads: int, head_dim: int, *, relative_position: int, qkv_bias: bool) -> int:
        inner = num_heads * head_dim
        tables = 4 * (2 * relative_position + 2) * head_dim if relative_position else 0
        return 4 * dim * inner + (3 * inner if qkv_bias else 0) + dim + tables

    @staticmethod
    def memory(
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        grid_size: int,
        num_prefix_tokens: int,
        relative_position: int,
    ) -> int:
        """Elements alive at the peak of a forward pass of one image, besides the input of the mixer."""
        tokens = grid_size**2 + num_prefix_tokens
        inner = num_heads * head_dim
        if not relative_position:
            return 4 * tokens * inner + max(tokens * num_heads, tokens * dim)
        # q, k and v stay alive throughout. The peak is in attention, or, with narrow heads on a fine grid, when the
        # index into the tables is made or the weights meet them.
        features = 2 * grid_size + bool(num_prefix_tokens)
        entries = 2 * (2 * min(relative_position, grid_size - 1) + 2)
        lines, wide = tokens * features, tokens * num_heads * (head_dim + features)
        products = num_heads * tokens * entries
        index = 2 * tokens * 2 * grid_size  # of 64-bit integers
        making = index + 6 * tokens * grid_size + 2 * grid_size * (grid_size + 1 + num_prefix_tokens)
        attention = 4 * wide + tokens * num_heads  # q, k, v and output, each with its line features
        scores = products + max(making, index + num_heads * tokens * (2 * features + bool(num_prefix_tokens)))
        after = max(products, (3 if num_prefix_tokens else 1) * tokens * inner)
        combine = wide + entries * head_dim + max(making, index + products + after)
        return 3 * tokens * inner + max(lines + max(attention, scores, combine), tokens * (inner + dim))
