"""Rotary positions: queries and keys are turned by angles that grow with the token's place, so that their product
depends on the distance.

Source: Su et al., "RoFormer" (arXiv 2104.09864), section 3.2: entries 2i and 2i + 1 of a head are turned by
position x 10000^(-2i / K). `rotary` counts tokens in a row, class token first, as Vision X-formers does
(arXiv 2107.02239). `rotary_2d` gives the first half of a head the patch's row and the second half its column, and
leaves the class token as it is; EVA-02 (Fang et al., arXiv 2303.11331) stretches rows and columns onto those of a
reference grid. `rotary_dinov3` (DINOv3, arXiv 2508.10104) does so with places from -1 to 1 times 2 pi and another base,
and turns entry i with entry i + K / 2 of a head.

Shapes: B images, A heads, N tokens, K head_dim, J = K / 2 angles, G the longer side of the grid.
"""

from __future__ import annotations

from math import prod
from typing import Literal, cast

import torch
from torch import Tensor

from vitnas.errors import UserError
from vitnas.grids import NO_GRID, Grid, size_text

RotaryKind = Literal["none", "rotary", "rotary_2d", "rotary_dinov3"]
BASES: dict[str, float] = {"rotary": 10000.0, "rotary_2d": 10000.0, "rotary_dinov3": 100.0}
STEPS: dict[RotaryKind, int] = {"none": 1, "rotary": 2, "rotary_2d": 4, "rotary_dinov3": 4}
"""What must divide head_dim."""


def rotary_of(position: str) -> RotaryKind:
    """The kind of rotary positions that an Arch's `position` asks for."""
    kind = position.removeprefix("learned_")
    return cast(RotaryKind, kind) if kind in BASES else "none"


class Rotary:
    """Turns queries and keys; holds sizes only, no weights.

    Args:
        grid: rows and columns of patches; `rotary` does not need it.
        num_prefix_tokens: tokens before the patches, which only `rotary` turns.
        base: whose powers the angles fall by; None for the kind's own.
        reference: rows, and as many columns, of the grid that `rotary_2d` stretches its own onto; 0 for none.
    """

    def __init__(
        self,
        kind: RotaryKind,
        head_dim: int,
        *,
        grid: Grid,
        num_prefix_tokens: int,
        base: float | None = None,
        reference: int = 0,
    ) -> None:
        self.kind, self.head_dim = kind, head_dim
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self.base, self.reference = base or BASES.get(kind, 1.0), reference
        self.turns_halves = kind == "rotary_dinov3"

    def __call__(self, *heads_BANK: Tensor, rows_BN: Tensor | None = None) -> tuple[Tensor, ...]:
        """Each of the (B, A, N, K) tensors, turned; unchanged for the kind `none`.

        Args:
            rows_BN: numbers of the tokens that are left of the grid's, if some were dropped.

        Raises:
            UserError: `rotary_2d` of another number of tokens than its grid's.
        """
        if self.kind == "none":
            return heads_BANK
        first, whole = heads_BANK[0], prod(self.grid) + self.num_prefix_tokens
        tokens = first.shape[2] if rows_BN is None else whole
        if self.kind != "rotary" and (self.grid == NO_GRID or tokens != whole):
            raise UserError(
                f"position {self.kind!r} was given {int(tokens)} tokens; it was made for {whole} (a grid of "
                f"{size_text(self.grid)} and {self.num_prefix_tokens} class token). Give grid, or that many tokens."
            )
        cos, sin = self.tables(tokens, first.device, first.dtype)
        if rows_BN is not None:
            cos, sin = cos[rows_BN], sin[rows_BN]  # (B, N, J, 1)
        return tuple(turn(x_BANK, cos, sin, self.turns_halves) for x_BANK in heads_BANK)

    def tables(self, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token's angles, each (N, J, 1)."""
        # Angles need more digits than bfloat16 has.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles_NJ = self._angles(tokens, device, wide).unsqueeze(-1)
        return angles_NJ.cos().to(dtype), angles_NJ.sin().to(dtype)

    def _angles(self, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.kind == "rotary":
            place = torch.arange(tokens, device=device, dtype=dtype)
            return place[:, None] * self._frequencies(self.head_dim, device, dtype)
        (rows, columns), falling = self.grid, self._frequencies(self.head_dim // 2, device, dtype)
        by_row, by_column = (self._places(side, device, dtype)[:, None] * falling for side in self.grid)
        patches = torch.cat([by_row.repeat_interleave(columns, 0), by_column.repeat(rows, 1)], dim=1)
        return torch.cat([patches.new_zeros(self.num_prefix_tokens, patches.shape[1]), patches])

    def _places(self, side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Place of each row or column, of which there are `side`."""
        line = torch.arange(side, device=device, dtype=dtype)
        if self.kind == "rotary_dinov3":
            return 2 * torch.pi * (2 * (line + 0.5) / side - 1)
        return line / side * self.reference if self.reference else line

    def _frequencies(self, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Angle per step of each pair of a head `dim` wide: (dim / 2,)."""
        falling: Tensor = self.base ** (-torch.arange(0, dim, 2, device=device, dtype=dtype) / dim)
        return falling


def turn(x_BANK: Tensor, cos_NJ1: Tensor, sin_NJ1: Tensor, halves: bool = False) -> Tensor:
    """Turn entries 2i and 2i + 1 by angle i, or i and i + J with `halves`; the angles may differ by image,
    (B, N, J, 1)."""
    axis, shape = (-2, (2, -1)) if halves else (-1, (-1, 2))
    # Heads are kept side by side in memory, as the projections leave them.
    first, second = x_BANK.transpose(1, 2).unflatten(-1, shape).split(1, dim=axis)
    cos, sin = ((angle.transpose(-1, -2) if halves else angle).unsqueeze(-3) for angle in (cos_NJ1, sin_NJ1))
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=axis)
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
