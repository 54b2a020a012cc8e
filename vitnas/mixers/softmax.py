"""Multi-head self-attention (Vaswani et al., arXiv 1706.03762), optionally with 2-D relative or rotary positions.

Parameter names are timm's: `qkv`, `proj`. The head dimension is free of `dim / num_heads`.

Shapes: B images, N tokens, D dim, A heads, K head_dim.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.grids import Grid
from vitnas.layers.axes import Axes
from vitnas.layers.position_bias import BiasCost, PositionBias
from vitnas.layers.relative_position import RelativePosition2d, line_features, of_rows
from vitnas.layers.rotary import rotary_memory
from vitnas.layers.select import Asked, Kept, Picked, masked_attention, masked_mean, sees
from vitnas.mixers.mixer import (
    Convention,
    HeadMixer,
    MixerShape,
    QkvBias,
    heads_memory,
    shared_params,
)


class Softmax(HeadMixer):
    """softmax(q k^T / sqrt(head_dim)) v, by torch's fused attention.

    Args besides those of every mixer:
        relative_position: largest distance of 2-D relative positions (in patches); 0 for none.
        rel_pos_bias: kind of bias by the step from patch to patch (`layers/position_bias.py`).
        qk_norm_eps: epsilon of the norms of queries and keys; None for no norms.
    """

    word = "softmax"
    takes_relative_position = takes_attention_parts = True
    takes_fewer_keys = True
    takes_selection = gives_attention = takes_picked = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        relative_position: int = 0,
        rel_pos_bias: str = "none",
        qk_norm_eps: float | None = None,
        qkv_bias: QkvBias = True,
        **options: object,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, **options)  # type: ignore[arg-type]
        if qkv_bias == "qv":
            self.q_bias, self.v_bias = (
                nn.Parameter(torch.empty(self.num_heads * self.head_dim)) for _ in range(2)
            )
        self.has_qv_bias, self.has_qk_norm = qkv_bias == "qv", qk_norm_eps is not None
        self.q_norm, self.k_norm = (
            nn.Identity() if qk_norm_eps is None else nn.LayerNorm(self.head_dim, eps=qk_norm_eps)
            for _ in range(2)
        )
        self.rel_pos: PositionBias | None = None
        if rel_pos_bias != "none":
            prefix = self.num_prefix_tokens
            self.rel_pos = PositionBias(rel_pos_bias, num_heads, self.grid, num_prefix_tokens=prefix)
        self.rel_pos_k: RelativePosition2d | None = None
        self.rel_pos_v: RelativePosition2d | None = None
        if relative_position:
            self.rel_pos_k, self.rel_pos_v = (
                RelativePosition2d(
                    self.head_dim,
                    self.grid,
                    relative_position,
                    num_prefix_tokens=self.num_prefix_tokens,
                )
                for _ in range(2)
            )

    def set_grid(self, grid: Grid) -> None:
        """Tables of relative positions on keys and values stay: they go by distance in patches."""
        self._take_grid(grid)
        if self.rel_pos is not None:
            self.rel_pos.set_grid(grid)

    def see_grid(self, grid: Grid) -> None:
        self._take_grid(grid)
        if self.rel_pos is not None:
            self.rel_pos.grid = grid

    def _take_grid(self, grid: Grid) -> None:
        super().set_grid(grid)
        for table in (self.rel_pos_k, self.rel_pos_v):
            if table is not None:
                table.grid = grid

    def axes(self) -> dict[str, Axes]:
        axes = super().axes()
        if self.has_qv_bias:
            axes |= {"q_bias": self.inner_axes, "v_bias": self.inner_axes}
        if self.has_qk_norm:
            head: Axes = (("head_dim", self.head_dim),)
            axes |= {f"{part}_norm.{name}": head for part in "qk" for name in ("weight", "bias")}
        return axes

    def initialize_own(self, generator: torch.Generator | None) -> None:
        if self.has_qv_bias:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)

    def project(self, x_BND: Tensor) -> Tensor:
        if not self.has_qv_bias:
            return super().project(x_BND)
        return functional.linear(x_BND, self.qkv.weight, self._bias())

    def _bias(self) -> Tensor | None:
        """Of queries, keys and values side by side."""
        if not self.has_qv_bias:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def mix_picked(self, x_BND: Tensor, kept: Kept | None, picked: Picked) -> Tensor:
        """Without positions that are added to the logits (`check_selections`)."""
        parts = [*self.split_picked(x_BND, kept, picked)]
        sizes = Kept(log_size_BN=None if kept is None else kept.log_size_BN)
        out_BND = self.merge(self._core_of(parts, sizes))
        return out_BND if self.proj_drop is None else self.proj_drop(out_BND)

    def split_picked(self, x_BND: Tensor, kept: Kept | None, picked: Picked) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the tokens picked, keys and values of all, turned."""
        rows_BM = None if kept is None else kept.rows_BN
        inner, weight = self.num_heads * self.head_dim, self.qkv.weight
        bias = self._bias()
        kv = functional.linear(x_BND, weight[inner:], None if bias is None else bias[inner:])
        k_BAMK, v_BAMK = kv.unflatten(2, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q_BNI = functional.linear(picked.of(x_BND), weight[:inner], None if bias is None else bias[:inner])
        q_BANK = q_BNI.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        del q_BNI, bias
        (q_BANK,) = self.rotary(self.q_norm(q_BANK), rows_BN=picked.rows_BN)
        (k_BAMK,) = self.rotary(self.k_norm(k_BAMK), rows_BN=rows_BM)
        return q_BANK, k_BAMK, v_BAMK

    def attention(self, x_BND: Tensor, kept: Kept | None = None, picked: Picked | None = None) -> Tensor:
        """(B, A, N, M) how much each token looks at each, in float32 at least; of the tokens picked where some are.

        Without positions that are added to the logits.
        """
        if picked is None:
            q_BANK, k_BAMK, _ = self._turned(x_BND, None if kept is None else kept.rows_BN)
        else:
            q_BANK, k_BAMK, _ = self.split_picked(x_BND, kept, picked)
        scores_BANM = (q_BANK * self.scale) @ k_BAMK.transpose(2, 3)
        return scores_BANM.to(torch.promote_types(scores_BANM.dtype, torch.float32)).softmax(-1)

    def split(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BANK, k_BANK, v_BANK = super().split(x_BND)
        return (
            (self.q_norm(q_BANK), self.k_norm(k_BANK), v_BANK)
            if self.has_qk_norm
            else (q_BANK, k_BANK, v_BANK)
        )

    def core(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor) -> Tensor:
        return self.core_kept(q_BANK, k_BANK, v_BANK, Kept())

    def core_kept(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor, kept: Kept) -> Tensor:
        if self.rel_pos is not None:
            bias_1ANN = self.rel_pos().to(q_BANK.dtype)
            return functional.scaled_dot_product_attention(
                q_BANK, k_BANK, v_BANK, attn_mask=bias_1ANN, scale=self.scale
            )
        if self.rel_pos_k is None or self.rel_pos_v is None:
            return self._attend(q_BANK, k_BANK, v_BANK, kept)
        return self._relative(q_BANK, k_BANK, v_BANK, self.rel_pos_k, self.rel_pos_v, kept)

    def look(self, x_BND: Tensor, kept: Kept | None, asked: Asked) -> tuple[Tensor, Tensor]:
        kept = kept or Kept()
        parts = [*self.split(x_BND)]
        if asked == "keys":  # before they are turned: by what they hold
            told = parts[1].mean(1)[:, self.num_prefix_tokens :]
        parts[:2] = self.rotary(*parts[:2], rows_BN=kept.rows_BN)
        if asked != "keys":
            told = self._attention(parts[0], parts[1], kept, asked)
        out_BND = self.merge(self._core_of(parts, kept))
        return out_BND if self.proj_drop is None else self.proj_drop(out_BND), told

    def _core_of(self, parts: list[Tensor], kept: Kept) -> Tensor:
        q_BANK, k_BANK, v_BANK = parts
        parts.clear()  # they are gone when heads are merged
        return self.core_kept(q_BANK, k_BANK, v_BANK, kept)

    def _attention(self, q_BANK: Tensor, k_BANK: Tensor, kept: Kept, asked: Asked) -> Tensor:
        """Attention of the class token to each patch, mean over heads; or the mean of all tokens that are kept.

        Relative positions add the same to all keys of a class token, so they change nothing there.
        """
        prefix, mask_BN = self.num_prefix_tokens, kept.mask_BN
        if asked == "class":
            q_BANK = q_BANK[:, :, :1]
        scores_BANN = (q_BANK * self.scale) @ k_BANK.transpose(2, 3)
        del q_BANK, k_BANK
        if mask_BN is None:
            return scores_BANN.softmax(-1).mean((1, 2))[:, prefix:]
        masked_BANN = scores_BANN.masked_fill(mask_BN[:, None, None] == 0, -torch.inf)
        seen_BNN = masked_BANN.softmax(-1).mean(1)
        if asked == "class":
            return seen_BNN[:, 0, prefix:]
        return masked_mean(seen_BNN, mask_BN.detach())[:, prefix:]

    def _attend(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor, kept: Kept) -> Tensor:
        mask_BN = kept.mask_BN
        if mask_BN is None:
            sizes = kept.log_size_BN
            bias = None if sizes is None else sizes[:, None, None].to(q_BANK.dtype)
            return functional.scaled_dot_product_attention(
                q_BANK, k_BANK, v_BANK, attn_mask=bias, scale=self.scale
            )
        if mask_BN.dtype == torch.bool:
            return functional.scaled_dot_product_attention(
                q_BANK, k_BANK, v_BANK, attn_mask=sees(mask_BN), scale=self.scale
            )
        scores_BANN = (q_BANK * self.scale) @ k_BANK.transpose(2, 3)  # a mask with a gradient
        return masked_attention(scores_BANN, sees(mask_BN), v_BANK)

    def _relative(
        self,
        q_BANK: Tensor,
        k_BANK: Tensor,
        v_BANK: Tensor,
        keys: RelativePosition2d,
        values: RelativePosition2d,
        kept: Kept,
    ) -> Tensor:
        lines = of_rows(
            line_features(keys.grid, keys.num_prefix_tokens, q_BANK.device, q_BANK.dtype), kept.rows_BN
        ).expand(*k_BANK.shape[:2], -1, -1)
        out = self._attend(
            torch.cat([q_BANK, keys.scores(q_BANK, kept.rows_BN).to(q_BANK.dtype)], dim=-1),
            torch.cat([k_BANK, lines], dim=-1),
            torch.cat([v_BANK, lines], dim=-1),
            kept,
        )
        return out[..., : self.head_dim] + values.combine(out[..., self.head_dim :], kept.rows_BN)

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        tokens, inner = shape.tokens, shape.inner
        macs = 2 * (tokens + shape.keys) * shape.dim * inner + 2 * tokens * shape.keys * inner
        if shape.asked in ("class", "all"):
            macs += (1 if shape.asked == "class" else tokens) * tokens * inner
        if shape.rel_pos_bias != "none":
            macs += _bias_cost(shape).macs
        if shape.relative_position and convention == "executed":
            features = sum(shape.grid) + bool(shape.num_prefix_tokens)
            macs += 2 * tokens**2 * shape.num_heads * features  # the wider q, k and v
            macs += 2 * tokens * _entries(shape) * inner  # products with the tables
        elif shape.relative_position and convention == "dense_relative":
            macs += 2 * tokens**2 * inner
        return macs

    @staticmethod
    def params(shape: MixerShape) -> int:
        tables = 4 * (2 * shape.relative_position + 2) * shape.head_dim if shape.relative_position else 0
        if shape.rel_pos_bias != "none":
            tables = _bias_cost(shape).params
        return shared_params(shape) + tables + (4 * shape.head_dim if shape.qk_norm else 0)

    @staticmethod
    def memory(shape: MixerShape) -> int:
        if shape.came is not None:
            return _picked_memory(shape)
        tokens, heads, inner = shape.tokens, shape.num_heads, shape.inner
        looking = beside = 0
        early = tokens * shape.head_dim if shape.asked == "keys" else 0
        if early:
            beside = early
        elif shape.asked != "none":  # attention of some queries to all keys, twice, beside its mean
            queries, beside = 1 if shape.asked == "class" else tokens, tokens
            scores = queries * heads * tokens
            looking = scores + max(queries * inner, scores + tokens)
        core = _relative_memory(shape) if shape.relative_position else tokens * (inner + heads)
        if shape.rel_pos_bias != "none":
            bias = _bias_cost(shape)
            core = max(bias.making, bias.made + core)
        copies = bool(shape.relative_position)
        return heads_memory(shape, max(looking, core + beside), copies=copies, beside=beside, early=early)


def _bias_cost(shape: MixerShape) -> BiasCost:
    return PositionBias.cost(shape.rel_pos_bias, shape.num_heads, shape.grid, shape.num_prefix_tokens)


def _picked_memory(shape: MixerShape) -> int:
    """Elements beside the input where queries are of some of the tokens alone."""
    tokens, keys, inner = shape.tokens, shape.keys, shape.inner
    whole = prod(shape.grid) + shape.num_prefix_tokens
    projecting = (
        tokens * shape.dim if shape.keep else 0
    )  # the tokens picked; those before the patches are a view
    projecting += 3 * inner if shape.qkv_bias == "qv" else 0
    turned, turning = 0, 0
    for side in (tokens, keys):
        of_grid = 0 if side == whole else whole
        turned, own = rotary_memory(shape.rotary, side, shape.head_dim, inner, whole=of_grid)
        normed = side * inner if shape.qk_norm else 0
        turning = max(turning, normed + own)
    made = keys * inner if shape.qk_norm or turned else 0  # keys beside those that came out of the projection
    core = max(projecting, turning, made + tokens * (inner + shape.num_heads))
    return max((2 * keys + tokens) * inner + core, tokens * (inner + shape.dim))


def _relative_memory(shape: MixerShape) -> int:
    """Elements beside queries, keys and values, which stay alive, at the peak with relative positions: in attention, or
    with narrow heads on a fine grid when the index into the tables is made or the weights meet them."""
    tokens, heads, inner = shape.tokens, shape.num_heads, shape.inner
    prefix, (rows, cols), longer = shape.num_prefix_tokens, shape.grid, max(shape.grid)
    patches, features, entries = rows * cols, rows + cols + bool(prefix), _entries(shape)
    whole = patches + prefix
    lines, wide = tokens * features, tokens * heads * (shape.head_dim + features)
    products = heads * tokens * entries
    index = 2 * tokens * (rows + cols)  # of 64-bit integers
    making = 2 * whole * (2 * rows + 3 * cols) + 2 * longer * (longer + 1 + prefix)
    lining = 0
    if shape.keep is not None:  # tables of the whole grid are made, then those rows taken that are left
        joining = (
            (patches * (rows + cols + 1 + features), (patches + prefix + whole) * features) if prefix else ()
        )
        lining = max(longer**2 + 2 * patches * (rows + cols), *joining, (whole + tokens) * features)
    attention = 4 * wide + tokens * heads  # q, k, v and output, each with its line features
    scores = products + max(making, index + heads * tokens * (2 * features + bool(prefix)))
    # The weights are gone when the class token's part is added.
    meeting = max(products + max(products, tokens * inner), 3 * tokens * inner if prefix else 0)
    combine = wide + entries * shape.head_dim + max(making, index + meeting)
    return max(lining, lines + max(attention, scores, combine))


def _entries(shape: MixerShape) -> int:
    """Entries of both tables that are within reach."""
    return 2 * (2 * min(shape.relative_position, max(shape.grid) - 1) + 2)
