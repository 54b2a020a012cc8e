"""Rotary positions: queries and keys are turned by angles that grow with the token's place, so that their product
depends on the distance.

Source: Su et al., "RoFormer" (arXiv 2104.09864), section 3.2: entries 2i and 2i + 1 of a head are turned by
position x 10000^(-2i / K). `rotary` counts tokens in a row, class token first, as Vision X-formers does
(arXiv 2107.02239). `rotary_2d` gives the first half of a head the patch's row and the second half its column, and
leaves the class token as it is.

Shapes: B images, A heads, N tokens, K head_dim, J = K / 2 angles, G the longer side of the grid.
"""

from __future__ import annotations

from math import prod
from typing import Literal, cast

import torch
from torch import Tensor

from vitnas.errors import UserError
from vitnas.grids import NO_GRID, Grid, size_text

RotaryKind = Literal["none", "rotary", "rotary_2d"]
BASE = 10000.0


def rotary_of(position: str) -> RotaryKind:
    """The kind of rotary positions that an Arch's `position` asks for."""
    return cast(RotaryKind, position) if position in ("rotary", "rotary_2d") else "none"


class Rotary:
    """Turns queries and keys; holds sizes only, no weights.

    Args:
        grid: rows and columns of patches; only `rotary_2d` needs it.
        num_prefix_tokens: tokens before the patches, which `rotary_2d` leaves alone.
    """

    def __init__(self, kind: RotaryKind, head_dim: int, *, grid: Grid, num_prefix_tokens: int) -> None:
        self.kind, self.head_dim = kind, head_dim
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens

    def __call__(self, *heads_BANK: Tensor, rows_BN: Tensor | None = None) -> tuple[Tensor, ...]:
        """Each of the (B, A, N, K) tensors, turned; unchanged for the kind `none`.

        Args:
            rows_BN: numbers of the tokens that are left of the grid's, if some were dropped.

        Raises:
            UserError: `rotary_2d` of another number of tokens than its grid's.
        """
        if self.kind == "none":
            return heads_BANK
        first = heads_BANK[0]
        if rows_BN is not None:
            whole = prod(self.grid) + self.num_prefix_tokens
            cos_NJ1, sin_NJ1 = self.tables(whole, first.device, first.dtype)
            cos_BNJ1, sin_BNJ1 = cos_NJ1[rows_BN], sin_NJ1[rows_BN]
            del cos_NJ1, sin_NJ1
            return tuple(turn(x_BANK, cos_BNJ1, sin_BNJ1) for x_BANK in heads_BANK)
        want = prod(self.grid) + self.num_prefix_tokens
        if self.kind == "rotary_2d" and (self.grid == NO_GRID or first.shape[2] != want):
            raise UserError(
                f"position 'rotary_2d' was given {int(first.shape[2])} tokens; it was made for {want} (a grid of "
                f"{size_text(self.grid)} and {self.num_prefix_tokens} class token). Give grid, or that many tokens."
            )
        cos_NJ1, sin_NJ1 = self.tables(first.shape[2], first.device, first.dtype)
        return tuple(turn(x_BANK, cos_NJ1, sin_NJ1) for x_BANK in heads_BANK)

    def tables(self, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token's angles, each (N, J, 1)."""
        # Angles need more digits than bfloat16 has.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles_NJ = self._angles(tokens, device, wide).unsqueeze(-1)
        return angles_NJ.cos().to(dtype), angles_NJ.sin().to(dtype)

    def _angles(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.kind == "rotary":
            place = torch.arange(tokens, device=device, dtype=dtype)
            return place[:, None] * frequencies(self.head_dim, device, dtype)
        rows, columns = self.grid
        line_GJ = torch.arange(max(self.grid), device=device, dtype=dtype)[:, None] * frequencies(
            self.head_dim // 2, device, dtype
        )
        by_row = line_GJ[:rows].repeat_interleave(columns, 0)
        patches = torch.cat([by_row, line_GJ[:columns].repeat(rows, 1)], dim=1)
        return torch.cat([patches.new_zeros(self.num_prefix_tokens, patches.shape[1]), patches])


def frequencies(dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Angle per step of each pair of a head `dim` wide: (dim / 2,)."""
    return BASE ** (-torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)


def turn(x_BANK: Tensor, cos_NJ1: Tensor, sin_NJ1: Tensor) -> Tensor:
    """Turn entries 2i and 2i + 1 by angle i; the angles may differ by image, (B, N, J, 1)."""
    # Heads are kept side by side in memory, as the projections leave them.
    even, odd = x_BANK.transpose(1, 2).unflatten(-1, (-1, 2)).split(1, dim=-1)
    cos, sin = cos_NJ1.unsqueeze(-3), sin_NJ1.unsqueeze(-3)
    turned = torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).transpose(1, 2)


def rotary_memory(
    kind: RotaryKind, tokens: int, head_dim: int, *widths: int, whole: int = 0
) -> tuple[int, int]:
    """Elements of tensors of inner width `widths` when turned, and of the peak while that is done.

    Args:
        whole: tokens of the whole grid, from whose angles those of the tokens left are taken; 0: all are left.
    """
    if kind == "none":
        return 0, 0
    done = peak = 0
    for width in widths:
        peak = max(peak, done + 2 * tokens * width)
        done += tokens * width
    taking = max(3 * whole * head_dim // 2, (whole + tokens) * head_dim) if whole else 0
    return done, max(peak + tokens * head_dim, taking)
