"""What every token mixer offers: a forward pass in timm's signature, named axes, and its exact cost beside it.

A mixer is a `Mixer`; one that has queries, keys and values is a `HeadMixer`, whose projections `qkv` and `proj` have
the same names, axes and rows in every mixer. So trained projections can move from one mixer to another, and a Supernet
shares them across mixers while everything else a mixer owns has a name of its own.

Shapes: B images, N tokens, D dim, A heads, K head_dim, I = A x K inner width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from math import prod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.grids import NO_GRID, Grid, size_text
from vitnas.layers.axes import Axes
from vitnas.layers.rotary import Rotary, RotaryKind, rotary_memory
from vitnas.layers.select import Asked, Kept, Picked

QkvBias = bool | Literal["qv"]
Convention = Literal["executed", "plain", "dense_relative", "patch_tokens"]


class MixerShape(NamedTuple):
    """All that the cost of a mixer depends on. A tuple, as it is hashed in the fastest path of counting.

    `size` is the mixer's own number (features, rank, landmarks, hidden units), 0 for mixers that have none.
    """

    dim: int
    num_heads: int
    head_dim: int
    size: int = 0
    grid: Grid = NO_GRID
    num_prefix_tokens: int = 1
    relative_position: int = 0
    rotary: RotaryKind = "none"
    qkv_bias: QkvBias = True
    qk_norm: bool = False
    rel_pos_bias: str = "none"
    keep: int | None = None  # patches that are left of the grid, None for all
    asked: Asked = "none"
    came: int | None = None  # patches that give keys and values, None for those that are left
    sized: bool = False  # these stand for different numbers of patches
    window: int | None = None  # None for the mixer's default
    window_bias: str = "step"

    @property
    def tokens(self) -> int:
        return (prod(self.grid) if self.keep is None else self.keep) + self.num_prefix_tokens

    @property
    def keys(self) -> int:
        """Tokens that give keys and values."""
        return self.tokens if self.came is None else self.came + self.num_prefix_tokens

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim


class Mixer(nn.Module, ABC):
    """A token mixer: (B, N, D) to (B, N, D). The constructor takes what `HeadMixer`'s takes.

    What an Arch, counting, spaces and swapping need to know of a mixer is said here by the mixer itself.
    """

    word: ClassVar[str]  # an Arch's word for it
    variant_of: ClassVar[str] = ""  # the mixer of which it is another paper's form
    has_heads: ClassVar[bool] = False  # False: num_heads, head_dim and rotary positions change nothing
    size_means: ClassVar[str] = ""  # what `size` is; empty: the mixer has no such number
    size_below_tokens: ClassVar[bool] = False  # `size` counts what tokens are compressed to
    fixed_tokens: ClassVar[bool] = False  # weights per token: another grid means resampled weights
    needs_grid: ClassVar[bool] = False  # patches must form rows and columns
    takes_class_token: ClassVar[bool] = True
    takes_relative_position: ClassVar[bool] = False  # has the argument `relative_position`
    takes_attention_parts: ClassVar[bool] = False  # has `qk_norm_eps`, `rel_pos_bias`; `qkv_bias` may be "qv"
    default_window: ClassVar[int] = 0  # the longest side of its windows in patches; 0: it has none
    has_own_bias: ClassVar[bool] = False  # its logits have a bias of their own, whatever `rel_pos_bias` is
    takes_selection: ClassVar[bool] = False  # tokens may be dropped or masked in front of it
    gives_attention: ClassVar[bool] = False  # has `look`, which also tells its attention or its keys
    takes_picked: ClassVar[bool] = False  # has `mix_picked`: queries of some tokens alone

    def __init__(self, *sizes: object, **options: object) -> None:
        super().__init__()
        self.proj_drop: nn.Module | None = None  # dropout of the result; swapped timm models may bring one

    @staticmethod
    @abstractmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        """Multiply-accumulates of one image; see `vitnas.counting` for the conventions."""

    @staticmethod
    @abstractmethod
    def params(shape: MixerShape) -> int:
        """Elements of all parameters."""

    @staticmethod
    @abstractmethod
    def memory(shape: MixerShape) -> int:
        """Elements alive at the peak of a forward pass of one image, besides the input of the mixer."""

    @staticmethod
    def default_size(head_dim: int) -> int:
        """The `size` when none is given."""
        return 0

    @staticmethod
    def size_for(tokens: int) -> int | None:
        """The `size` that a Space of nets with so many tokens starts from; None for the default."""
        return None

    @abstractmethod
    def axes(self) -> dict[str, Axes]:
        """Named axes of all parameters."""

    @abstractmethod
    def mix(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""

    def forward(
        self,
        x_BND: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        kept: Kept | None = None,
    ) -> Tensor:
        """(B, N, D) to (B, N, D). `attn_mask` and `is_causal` are those of timm's attention, and must stay unused.

        Args:
            kept: which tokens selections left, for a mixer that `takes_selection`.

        Raises:
            UserError: a mask, or causal attention.
        """
        if attn_mask is not None or is_causal:
            raise UserError(
                f"{type(self).__name__} was given a mask; mixers see all tokens of an image. Leave the mask out."
            )
        out_BND = self.mix(x_BND) if kept is None else self.mix_kept(x_BND, kept)
        return out_BND if self.proj_drop is None else self.proj_drop(out_BND)

    def mix_kept(self, x_BND: Tensor, kept: Kept) -> Tensor:
        """The same for tokens that selections left. Only mixers that `takes_selection` have it."""
        raise LookupError(f"{self.word} takes no selected tokens")

    def mix_picked(self, x_BND: Tensor, kept: Kept | None, picked: Picked) -> Tensor:
        """The same for those tokens alone, by keys and values of all. Only mixers that have `takes_picked`."""
        raise LookupError(f"{self.word} gives what it takes")

    def look(self, x_BND: Tensor, kept: Kept | None, asked: Asked) -> tuple[Tensor, Tensor]:
        """The same, and what is asked of it (see `Asked`). Only mixers that have `gives_attention`."""
        raise LookupError(f"{self.word} has no attention to tell of")

    def set_grid(self, grid: Grid) -> None:
        """Take images of another grid from now on; weights per token are resampled."""

    def see_grid(self, grid: Grid) -> None:
        """Take images of another grid, not larger, with the weights as they are.

        Raises:
            UserError: it has weights per token.
        """
        if self.fixed_tokens:
            raise UserError(
                f"{self.word} has weights per token, which fit one image size alone. Use another mixer, or images of "
                "one size."
            )
        self.set_grid(grid)

    def initialize_own(self, generator: torch.Generator | None) -> None:
        """Give values to what the Model's rule of initialisation does not fit."""

    @classmethod
    def resolve_size(cls, size: int | None, head_dim: int, tokens: int) -> int:
        """The `size` to use.

        Raises:
            UserError: a size for a mixer that has none, or one that cannot work at so many tokens.
        """
        if size is None:
            size = cls.default_size(head_dim)
            if not (cls.size_below_tokens and cls.fixed_tokens):
                return size
        if not cls.size_means:
            raise UserError(f"mixer_size is {size}; {cls.word} has no such number. Leave it out.")
        if size < 1:
            raise UserError(
                f"mixer_size is {size}; {cls.word} needs at least 1 ({cls.size_means}). Raise it."
            )
        if cls.size_below_tokens and tokens and size > tokens:
            raise UserError(
                f"mixer_size is {size}; {cls.word} compresses {tokens} tokens and cannot have more {cls.size_means} "
                f"than tokens. Nearest: {tokens}."
            )
        return size


class HeadMixer(Mixer):
    """A mixer of queries, keys and values in heads. Parameter names are timm's: `qkv`, `proj`.

    Args:
        dim: width of the tokens.
        num_heads, head_dim: the inner width is their product; head_dim is `dim // num_heads` by default.
        size: the mixer's own number, see its class; None for its default.
        qkv_bias: biases on queries, keys and values; "qv" for all but the keys, for a mixer that takes it.
        rotary, rotary_base, rotary_grid: rotary positions on queries and keys (`layers/rotary.py`).
        grid: rows and columns of patches; 2-D positions, windows and weights per token need it.
        num_prefix_tokens: tokens before the patches.
        scale: factor on the logits; `head_dim**-0.5` by default.
    """

    has_heads: ClassVar[bool] = True
    has_values: ClassVar[bool] = True  # False: trained values would have no place in it
    takes_qkv: ClassVar[bool] = True  # `core` works on queries, keys and values that another layer made
    takes_fewer_keys: ClassVar[bool] = False  # and on fewer keys than queries

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        size: int | None = None,
        qkv_bias: QkvBias = True,
        rotary: RotaryKind = "none",
        rotary_base: float | None = None,
        rotary_grid: int = 0,
        grid: Grid = NO_GRID,
        num_prefix_tokens: int = 1,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim if head_dim is not None else dim // num_heads
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        tokens = 0 if grid == NO_GRID else prod(grid) + num_prefix_tokens
        if self.fixed_tokens or self.needs_grid:
            check_grid(self.word, grid)
        self.size = self.resolve_size(size, self.head_dim, tokens)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.rotary = Rotary(
            rotary,
            self.head_dim,
            grid=grid,
            num_prefix_tokens=num_prefix_tokens,
            base=rotary_base,
            reference=rotary_grid,
        )
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias is True)
        self.proj = nn.Linear(inner, dim)

    def axes(self) -> dict[str, Axes]:
        rows: Axes = (("qkv", 3), *self.inner_axes)
        dim: Axes = (("dim", self.proj.out_features),)
        axes = {"qkv.weight": rows + dim, "proj.weight": dim + rows[1:], "proj.bias": dim}
        return axes | ({"qkv.bias": rows} if self.qkv.bias is not None else {})

    @property
    def inner_axes(self) -> Axes:
        return ("heads", self.num_heads), ("head_dim", self.head_dim)

    def set_grid(self, grid: Grid) -> None:
        self.grid = self.rotary.grid = grid

    def mix(self, x_BND: Tensor) -> Tensor:
        return self.merge(self._attended(x_BND))  # queries, keys and values are gone when heads are merged

    def _attended(self, x_BND: Tensor) -> Tensor:
        return self.core(*self._turned(x_BND))

    def mix_kept(self, x_BND: Tensor, kept: Kept) -> Tensor:
        return self.merge(self.core_kept(*self._turned(x_BND, kept.rows_BN), kept))

    def _turned(self, x_BND: Tensor, rows_BN: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q_BANK, k_BANK, v_BANK = self.split(x_BND)
        q_BANK, k_BANK = self.rotary(q_BANK, k_BANK, rows_BN=rows_BN)
        return q_BANK, k_BANK, v_BANK

    def core_kept(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor, kept: Kept) -> Tensor:
        """`core` of tokens that selections left."""
        raise LookupError(f"{self.word} takes no selected tokens")

    def split(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, A, N, K)."""
        qkv = self.project(x_BND).unflatten(2, (3, self.num_heads, self.head_dim))
        q_BANK, k_BANK, v_BANK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q_BANK, k_BANK, v_BANK

    def project(self, x_BND: Tensor) -> Tensor:
        """Queries, keys and values side by side, (B, N, 3 I)."""
        rows: Tensor = self.qkv(x_BND)
        return rows

    def merge(self, out_BANK: Tensor) -> Tensor:
        """Heads side by side, then the output projection: (B, A, N, K) to (B, N, D)."""
        out_BNI = out_BANK.transpose(1, 2).flatten(2)
        del out_BANK
        return self.proj(out_BNI)

    @abstractmethod
    def core(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor) -> Tensor:
        """Queries, keys and values (whose width may differ from K) to (B, A, N, K_v)."""

    def count_tokens(self, x: Tensor, dim: int) -> int:
        """Tokens of `x` on axis `dim`, which must be as many as the mixer was made for.

        Raises:
            UserError: another number of tokens.
        """
        return check_tokens(self.word, x.shape[dim], self.grid, self.num_prefix_tokens)


def check_grid(name: str, grid: Grid) -> None:
    """Raise UserError where a mixer that needs a grid is given none."""
    if min(grid) < 1:
        raise UserError(f"grid is {grid}; {name} needs the rows and columns of patches, at least 1. Give it.")


def check_tokens(name: str, tokens: int, grid: Grid, num_prefix_tokens: int) -> int:
    """`tokens`, if they are a class token or none and the grid that a mixer was made for.

    Raises:
        UserError: another number of tokens.
    """
    want = prod(grid) + num_prefix_tokens
    if tokens != want:
        raise UserError(
            f"{name} was given {tokens} tokens; it was made for {want} ({size_text(grid)} patches and "
            f"{num_prefix_tokens} class token). Call set_input_size, or give images of that size."
        )
    return tokens


def heads_memory(shape: MixerShape, core: int, *, copies: bool, beside: int = 0, early: int = 0) -> int:
    """Peak of a mixer of queries, keys and values: projections, positions, then `core` elements at most, then merging.

    Args:
        copies: the core's output has its heads apart, so that laying them side by side copies it.
        beside: elements that stay alive beside the merging.
        early: those of these that are there before positions.
    """
    tokens, inner = shape.tokens, shape.inner
    whole = prod(shape.grid) + shape.num_prefix_tokens if shape.keep is not None else 0
    turned, turning = rotary_memory(shape.rotary, tokens, shape.head_dim, inner, inner, whole=whole)
    merging = tokens * (inner + max(shape.dim, inner if copies else 0)) + beside
    normed = 2 * tokens * inner if shape.qk_norm else 0
    projecting = 3 * inner if shape.qkv_bias == "qv" else 0  # the bias, put together
    return max(
        3 * tokens * inner + max(projecting, normed + early + turning, max(normed, turned) + core), merging
    )


def shared_params(shape: MixerShape) -> int:
    """Elements of `qkv` and `proj`."""
    biases = 2 if shape.qkv_bias == "qv" else 3 if shape.qkv_bias else 0
    return 4 * shape.dim * shape.inner + biases * shape.inner + shape.dim


def in_full_precision(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, in float32 where half precision would overflow or lose its digits."""
    dtype = tensors[0].dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return function(*tensors)
    kind = tensors[0].device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return function(*(tensor.float() for tensor in tensors)).to(dtype)


def quarter_of(tokens: int) -> int:
    """A quarter of the tokens, from 4 to 64, or all where there are fewer: what Spaces compress to."""
    return min(64, tokens, max(4, tokens // 4))
