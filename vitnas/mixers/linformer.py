"""Linformer: attention to a few learned mixtures of the tokens, linear in the number of tokens.

Source: Wang et al., "Linformer" (arXiv 2006.04768), section 4: with P_k, P_v (N x R) per layer, shared by heads,

    out = softmax(s q (P_k^T k)^T) (P_v^T v)

The weights P belong to a fixed number of tokens: another number is an error, another image size resamples them.

Vision X-formers (arXiv 2107.02239, code) takes the keys for values as well, with keys per head (`linformer_shared`) or
one head of keys for all (`linformer_one_head`).

How it is computed. Without rotary positions P^T (x W) is (P^T x) W, which costs R rows of W instead of N.

Shapes: B images, A heads, N tokens, D dim, K head_dim, R rank.
"""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.grids import Grid
from vitnas.layers.axes import Axes
from vitnas.layers.resample import resample_tokens
from vitnas.layers.rotary import rotary_memory
from vitnas.mixers.mixer import Convention, HeadMixer, MixerShape, heads_memory, quarter_of, shared_params

RANK = 64


class Linformer(HeadMixer):
    """Linformer attention. `size` is the rank R, at most as many as tokens and 64 by default; it needs `grid`."""

    word = "linformer"
    size_means = "rank"
    size_below_tokens = True
    fixed_tokens = True

    def __init__(self, dim: int, num_heads: int, **options: object) -> None:
        super().__init__(dim, num_heads, **options)  # type: ignore[arg-type]
        tokens = prod(self.grid) + self.num_prefix_tokens
        self.proj_k = nn.Parameter(torch.empty(tokens, self.size))
        self.proj_v = nn.Parameter(torch.empty(tokens, self.size))

    @staticmethod
    def default_size(head_dim: int) -> int:
        return RANK

    @staticmethod
    def size_for(tokens: int) -> int:
        return quarter_of(tokens)

    def axes(self) -> dict[str, Axes]:
        axes: Axes = (("tokens", self.proj_k.shape[0]), ("rank", self.size))
        return super().axes() | {"proj_k": axes, "proj_v": axes}

    def initialize_own(self, generator: torch.Generator | None) -> None:
        for weight in (self.proj_k, self.proj_v):
            initialize_projection(weight, generator)

    def set_grid(self, grid: Grid) -> None:
        self.proj_k, self.proj_v = (_resampled(self, weight, grid) for weight in (self.proj_k, self.proj_v))
        super().set_grid(grid)

    def mix(self, x_BND: Tensor) -> Tensor:
        self.count_tokens(x_BND, 1)
        return super().mix(x_BND)

    def _attended(self, x_BND: Tensor) -> Tensor:
        if self.rotary.kind != "none":
            return super()._attended(x_BND)
        weights = self.qkv.weight.chunk(3)
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        heads = (self.num_heads, self.head_dim)
        k_BRI = project_first(x_BND, self.proj_k, weights[1], biases[1])
        v_BRI = project_first(x_BND, self.proj_v, weights[2], biases[2])
        q_BANK, k_BARK, v_BARK = (
            part.unflatten(2, heads).transpose(1, 2)
            for part in (functional.linear(x_BND, weights[0], biases[0]), k_BRI, v_BRI)
        )
        del k_BRI, v_BRI
        return self._attend(q_BANK, k_BARK, v_BARK)

    def core(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor) -> Tensor:
        self.count_tokens(k_BANK, 2)
        return self._attend(q_BANK, self.proj_k.t() @ k_BANK, self.proj_v.t() @ v_BANK)

    def _attend(self, q_BANK: Tensor, k_BARK: Tensor, v_BARK: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q_BANK, k_BARK, v_BARK, scale=self.scale)

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        tokens, rank, inner = shape.tokens, shape.size, shape.inner
        ends = 2 * tokens * shape.dim * inner  # queries and output projection
        if shape.rotary != "none":
            return 2 * ends + 4 * tokens * rank * inner
        return ends + 2 * rank * shape.dim * (tokens + inner) + 2 * tokens * rank * inner

    @staticmethod
    def params(shape: MixerShape) -> int:
        return shared_params(shape) + 2 * shape.tokens * shape.size

    @staticmethod
    def memory(shape: MixerShape) -> int:
        tokens, mixed, inner = shape.tokens, shape.size * shape.inner, shape.inner
        attending = 2 * mixed + tokens * (inner + shape.num_heads)
        if shape.rotary != "none":
            return heads_memory(shape, attending, copies=False)
        mixing = mixed + _mixing_memory(shape, mixed)
        return max(mixing, attending + tokens * inner, tokens * (inner + shape.dim))


class LinformerShared(HeadMixer):
    """Vision X-formers' Linformer: values are the keys, one mixture for both. Weights: `q`, `k`, `proj_k`, `proj`. Its
    default rank of 64 needs as many tokens."""

    word = "linformer_shared"
    variant_of = "linformer"
    has_values = False
    takes_qkv = False
    size_means = "rank"
    size_below_tokens = True
    fixed_tokens = True
    one_head: ClassVar[bool] = False

    def __init__(self, dim: int, num_heads: int, **options: object) -> None:
        super().__init__(dim, num_heads, **options)  # type: ignore[arg-type]
        bias = self.qkv.bias is not None
        del self.qkv
        tokens = prod(self.grid) + self.num_prefix_tokens
        self.kv_heads = 1 if self.one_head else num_heads
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.proj_k = nn.Parameter(torch.empty(tokens, self.size))

    @staticmethod
    def default_size(head_dim: int) -> int:
        return RANK

    @staticmethod
    def size_for(tokens: int) -> int:
        return quarter_of(tokens)

    def axes(self) -> dict[str, Axes]:
        dim: Axes = (("dim", self.proj.out_features),)
        keys: Axes = (("kv_heads", self.kv_heads), ("head_dim", self.head_dim))
        axes = {
            "q.weight": self.inner_axes + dim,
            "k.weight": keys + dim,
            "proj_k": (("tokens", self.proj_k.shape[0]), ("rank", self.size)),
            "proj.weight": dim + self.inner_axes,
            "proj.bias": dim,
        }
        return axes | ({"q.bias": self.inner_axes, "k.bias": keys} if self.q.bias is not None else {})

    def initialize_own(self, generator: torch.Generator | None) -> None:
        initialize_projection(self.proj_k, generator)

    def set_grid(self, grid: Grid) -> None:
        self.proj_k = _resampled(self, self.proj_k, grid)
        super().set_grid(grid)

    def mix(self, x_BND: Tensor) -> Tensor:
        self.count_tokens(x_BND, 1)
        return super().mix(x_BND)

    def _attended(self, x_BND: Tensor) -> Tensor:
        q_BANK = self.q(x_BND).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        if self.rotary.kind == "none":
            k_BRI = project_first(x_BND, self.proj_k, self.k.weight, self.k.bias)
            k_BARK = k_BRI.unflatten(2, (self.kv_heads, self.head_dim)).transpose(1, 2)
            return self._attend(q_BANK, k_BARK, k_BARK)
        k_BANK = self.k(x_BND).unflatten(2, (self.kv_heads, self.head_dim)).transpose(1, 2)
        q_BANK, turned_BANK = self.rotary(q_BANK, k_BANK)
        return self.core(q_BANK, turned_BANK, k_BANK)

    def core(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor) -> Tensor:
        mixture_RN = self.proj_k.t()
        return self._attend(q_BANK, mixture_RN @ k_BANK, mixture_RN @ v_BANK)

    def _attend(self, q_BANK: Tensor, k_BARK: Tensor, v_BARK: Tensor) -> Tensor:
        k_BARK, v_BARK = (part.expand(-1, self.num_heads, -1, -1) for part in (k_BARK, v_BARK))
        return functional.scaled_dot_product_attention(q_BANK, k_BARK, v_BARK, scale=self.scale)

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        return _shared_macs(shape, shape.inner)

    @staticmethod
    def params(shape: MixerShape) -> int:
        return _shared_keys_params(shape, shape.inner)

    @staticmethod
    def memory(shape: MixerShape) -> int:
        return _shared_keys_memory(shape, shape.inner)


class LinformerOneHead(LinformerShared):
    """The same with one head of keys for all heads of queries."""

    word = "linformer_one_head"
    one_head = True

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        return _shared_macs(shape, shape.head_dim)

    @staticmethod
    def params(shape: MixerShape) -> int:
        return _shared_keys_params(shape, shape.head_dim)

    @staticmethod
    def memory(shape: MixerShape) -> int:
        return _shared_keys_memory(shape, shape.head_dim)


def project_first(x_BND: Tensor, mixture_NR: Tensor, weight_ID: Tensor, bias_I: Tensor | None) -> Tensor:
    """P^T (x W^T + b) as (P^T x) W^T + (sums of P) b: (B, R, I)."""
    mixed_BRD = torch.bmm(mixture_NR.t().expand(x_BND.shape[0], -1, -1), x_BND)
    out_BRI = functional.linear(mixed_BRD, weight_ID)
    return out_BRI if bias_I is None else out_BRI + mixture_NR.sum(0)[:, None] * bias_I


def initialize_projection(weight_NR: Tensor, generator: torch.Generator | None) -> None:
    """Uniform within 1 / sqrt(R), as the packages in use do; the paper does not say."""
    bound = weight_NR.shape[1] ** -0.5
    nn.init.uniform_(weight_NR, -bound, bound, generator=generator)


def _resampled(mixer: HeadMixer, weight_NR: nn.Parameter, grid: Grid) -> nn.Parameter:
    return resample_tokens(
        weight_NR,
        old_grid=mixer.grid,
        new_grid=grid,
        num_prefix_tokens=mixer.num_prefix_tokens,
        keep_sum=True,
    )


def _shared_macs(shape: MixerShape, keys: int) -> int:
    tokens, rank, inner = shape.tokens, shape.size, shape.inner
    ends = 2 * tokens * shape.dim * inner + 2 * tokens * rank * inner
    if shape.rotary != "none":
        return ends + tokens * shape.dim * keys + 2 * tokens * rank * keys
    return ends + rank * shape.dim * (tokens + keys)


def _shared_keys_params(shape: MixerShape, keys: int) -> int:
    biases = shape.inner + keys if shape.qkv_bias else 0
    return shape.dim * (2 * shape.inner + keys) + biases + shape.dim + shape.tokens * shape.size


def _mixing_memory(shape: MixerShape, mixed: int) -> int:
    """Peak of `project_first`, for an output of `mixed` elements."""
    return shape.size * shape.dim + (3 if shape.qkv_bias else 1) * mixed


def _shared_keys_memory(shape: MixerShape, keys: int) -> int:
    tokens, inner, mixed = shape.tokens, shape.inner, shape.size * keys
    attending, merging = tokens * (inner + shape.num_heads), tokens * (inner + shape.dim)
    if shape.rotary == "none":
        return max(tokens * inner + max(_mixing_memory(shape, mixed), mixed + attending), merging)
    turned, turning = rotary_memory(shape.rotary, tokens, shape.head_dim, inner, keys)
    turning += tokens * (inner + keys)
    return max(turning, tokens * keys + turned + 2 * mixed + attending, merging)
