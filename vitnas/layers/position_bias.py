"""Relative position bias: a learned number per head for every step from patch to patch, added to the logits.

`table` (Swin, BEiT: Bao et al., arXiv 2106.08254) has one row per step and, with a class token, three more: from it, to
it, and to itself. `mlp` (Swin V2's idea with timm's coordinates) makes the rows by a small MLP of the step's signed
logarithms; tokens before the patches get 0.

How it is computed. A step's row goes by its rows and its columns apart, so two small tables of numbers pick from the
table seen as (rows, columns): no N x N index exists.

Shapes: A heads, R rows and C columns of patches, P = R C, N tokens, L = (2R - 1)(2C - 1) steps.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from timm.layers import Mlp, resize_rel_pos_bias_table
from torch import Tensor, nn
from torch.nn import functional

from vitnas.grids import Grid
from vitnas.layers.axes import Axes

MLP_HIDDEN = 128  # as in timm's networks
DROP = 0.125  # of the MLP's hidden units in training, as in timm


class BiasCost(NamedTuple):
    """Multiply-accumulates, parameters, elements alive at the peak of making the bias, and of the bias itself."""

    macs: int
    params: int
    making: int
    made: int


class PositionBias(nn.Module):
    """The bias of `word` ("table" or "mlp"): (1, A, N, N). Parameter names are timm's.

    `grid` may be set to a smaller one than the table is of, which then gives the steps that are left.
    """

    def __init__(self, word: str, num_heads: int, grid: Grid, *, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_heads, self.grid, self.num_prefix_tokens = num_heads, grid, num_prefix_tokens
        self._table_grid = grid
        self.relative_position_bias_table: nn.Parameter | None = None
        self.mlp: nn.Module | None = None
        if word == "table":
            rows = prod(_steps(grid)) + 3 * num_prefix_tokens
            self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        else:
            self.mlp = Mlp(2, MLP_HIDDEN, num_heads, act_layer=nn.ReLU, drop=(DROP, 0.0))

    def axes(self) -> dict[str, Axes]:
        heads: Axes = (("heads", self.num_heads),)
        if (table := self.relative_position_bias_table) is not None:
            return {"relative_position_bias_table": (("steps", table.shape[0]), *heads)}
        hidden: Axes = (("rel_pos_hidden", MLP_HIDDEN),)
        return {
            "mlp.fc1.weight": (*hidden, ("coords", 2)),
            "mlp.fc1.bias": hidden,
            "mlp.fc2.weight": heads + hidden,
            "mlp.fc2.bias": heads,
        }

    def forward(self) -> Tensor:
        table = self.relative_position_bias_table
        bias_NNA = self._of_mlp() if table is None else self._of_table(table)
        return bias_NNA.permute(2, 0, 1).unsqueeze(0).contiguous()

    def _of_mlp(self) -> Tensor:
        assert self.mlp is not None
        bias_PPA = self._between_patches(self.mlp(self._coordinates(next(self.mlp.parameters()))))
        edge = (self.num_prefix_tokens, 0)
        return functional.pad(bias_PPA, (0, 0, *edge, *edge)) if self.num_prefix_tokens else bias_PPA

    def _of_table(self, table: Tensor) -> Tensor:
        steps = prod(_steps(self._table_grid))
        by_step = table[:steps].unflatten(0, _steps(self._table_grid))
        for dim, (old, new) in enumerate(zip(self._table_grid, self.grid, strict=True)):
            by_step = by_step.narrow(dim, old - new, 2 * new - 1)
        bias_PPA = self._between_patches(by_step)
        return _with_class_token(bias_PPA, *table[steps:]) if self.num_prefix_tokens else bias_PPA

    def _between_patches(self, table: Tensor) -> Tensor:
        """The rows of a (2R - 1, 2C - 1, A) table for all pairs of patches: (P, P, A)."""
        by_row, by_column = (_steps_between(side, table.device) for side in self.grid)
        patches = prod(self.grid)
        return table[by_row[:, None, :, None], by_column[None, :, None, :]].reshape(patches, patches, -1)

    def _coordinates(self, like: Tensor) -> Tensor:
        """(2R - 1, 2C - 1, 2): sign times logarithm of each step, in rows and in columns."""
        lines = [torch.arange(1 - side, side, device=like.device, dtype=like.dtype) for side in self.grid]
        logs = [line.sign() * line.abs().log1p() for line in lines]
        return torch.stack(torch.meshgrid(*logs, indexing="ij"), dim=-1)

    def set_grid(self, grid: Grid) -> None:
        """Take another grid; a table is resampled as timm does."""
        if self.relative_position_bias_table is not None and grid != self._table_grid:
            old = self.relative_position_bias_table
            shape = (prod(_steps(grid)) + 3 * self.num_prefix_tokens, self.num_heads)
            table = resize_rel_pos_bias_table(old.detach(), grid, shape, self._table_grid)
            self.relative_position_bias_table = nn.Parameter(table, requires_grad=old.requires_grad)
        self.grid = self._table_grid = grid

    @staticmethod
    def cost(word: str, num_heads: int, grid: Grid, num_prefix_tokens: int) -> BiasCost:
        steps, patches, heads = prod(_steps(grid)), prod(grid), num_heads
        tokens = patches + num_prefix_tokens
        made, between = tokens**2 * heads, patches**2 * heads
        picking = between + 2 * (grid[0] ** 2 + grid[1] ** 2)  # whose numbers are 64-bit integers
        macs, params, making = 0, (steps + 3 * num_prefix_tokens) * heads, 0
        joining = 0
        if word == "mlp":
            macs = steps * MLP_HIDDEN * (2 + heads)
            params = MLP_HIDDEN * (3 + heads) + heads
            making = steps * (2 + MLP_HIDDEN + max(MLP_HIDDEN, heads))
            picking += steps * heads
            joining = between + made if num_prefix_tokens else 0
        elif num_prefix_tokens:
            wide = patches * tokens * heads
            joining = max(between + wide, between + wide + tokens * heads + made)
        last = made * (2 if heads > 1 else 1)
        return BiasCost(macs, params, max(making, picking, joining, last), made)


def _with_class_token(bias_PPA: Tensor, from_A: Tensor, to_A: Tensor, self_A: Tensor) -> Tensor:
    """A row and a column of the class token before those of the patches: (N, N, A)."""
    patches = len(bias_PPA)
    below = torch.cat([to_A.expand(patches, 1, -1), bias_PPA], dim=1)
    first = torch.cat([self_A.expand(1, 1, -1), from_A.expand(1, patches, -1)], dim=1)
    return torch.cat([first, below])


def _steps(grid: Grid) -> Grid:
    """How many steps there are, in rows and in columns."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def _steps_between(side: int, device: torch.device) -> Tensor:
    """(side, side): the number of the step from each line to each."""
    line = torch.arange(side, device=device)
    return line[:, None] - (line - (side - 1))[None]
