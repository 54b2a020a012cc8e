"""Multi-head self-attention (Vaswani et al., arXiv 1706.03762), optionally with 2-D relative or rotary positions.

Parameter names are timm's: `qkv`, `proj`. The head dimension is free of `dim / num_heads`.

Shapes: B images, N tokens, D dim, A heads, K head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vitnas.layers.relative_position import RelativePosition2d, line_features
from vitnas.mixers.mixer import Convention, HeadMixer, MixerShape, heads_memory, shared_params

__all__ = ["Convention", "Softmax"]


class Softmax(HeadMixer):
    """softmax(q k^T / sqrt(head_dim)) v, by torch's fused attention.

    Args besides those of every mixer:
        relative_position: largest distance of 2-D relative positions (in patches); 0 for none.
    """

    word = "softmax"
    takes_relative_position = True
    takes_fewer_keys = True

    def __init__(self, dim: int, num_heads: int, *, relative_position: int = 0, **options: object) -> None:
        super().__init__(dim, num_heads, **options)  # type: ignore[arg-type]
        self.rel_pos_k: RelativePosition2d | None = None
        self.rel_pos_v: RelativePosition2d | None = None
        if relative_position:
            self.rel_pos_k, self.rel_pos_v = (
                RelativePosition2d(
                    self.head_dim,
                    self.grid_size,
                    relative_position,
                    num_prefix_tokens=self.num_prefix_tokens,
                )
                for _ in range(2)
            )

    def set_grid_size(self, grid_size: int) -> None:
        """Tables of relative positions stay: they go by distance in patches."""
        super().set_grid_size(grid_size)
        for table in (self.rel_pos_k, self.rel_pos_v):
            if table is not None:
                table.grid_size = grid_size

    def core(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor) -> Tensor:
        if self.rel_pos_k is None or self.rel_pos_v is None:
            return functional.scaled_dot_product_attention(q_BANK, k_BANK, v_BANK, scale=self.scale)
        return self._relative(q_BANK, k_BANK, v_BANK, self.rel_pos_k, self.rel_pos_v)

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
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        tokens, inner = shape.tokens, shape.inner
        macs = 4 * tokens * shape.dim * inner + 2 * tokens**2 * inner
        if shape.relative_position and convention == "executed":
            features = 2 * shape.grid_size + bool(shape.num_prefix_tokens)
            macs += 2 * tokens**2 * shape.num_heads * features  # the wider q, k and v
            macs += 2 * tokens * _entries(shape) * inner  # products with the tables
        elif shape.relative_position and convention == "dense_relative":
            macs += 2 * tokens**2 * inner
        return macs

    @staticmethod
    def params(shape: MixerShape) -> int:
        tables = 4 * (2 * shape.relative_position + 2) * shape.head_dim if shape.relative_position else 0
        return shared_params(shape) + tables

    @staticmethod
    def memory(shape: MixerShape) -> int:
        tokens, heads, inner = shape.tokens, shape.num_heads, shape.inner
        prefix, grid = shape.num_prefix_tokens, shape.grid_size
        if not shape.relative_position:
            return heads_memory(shape, tokens * (inner + heads), copies=False)
        # q, k and v stay alive. The peak is in attention, or, with narrow heads on a fine grid, when the
        # index into the tables is made or the weights meet them.
        features, entries = 2 * grid + bool(prefix), _entries(shape)
        lines, wide = tokens * features, tokens * heads * (shape.head_dim + features)
        products = heads * tokens * entries
        index = 2 * tokens * 2 * grid  # of 64-bit integers
        making = index + 6 * tokens * grid + 2 * grid * (grid + 1 + prefix)
        attention = 4 * wide + tokens * heads  # q, k, v and output, each with its line features
        scores = products + max(making, index + heads * tokens * (2 * features + bool(prefix)))
        after = max(products, (3 if prefix else 1) * tokens * inner)
        combine = wide + entries * shape.head_dim + max(making, index + products + after)
        return heads_memory(shape, lines + max(attention, scores, combine), copies=True)


def _entries(shape: MixerShape) -> int:
    """Entries of both tables that are within reach."""
    return 2 * (2 * min(shape.relative_position, shape.grid_size - 1) + 2)
