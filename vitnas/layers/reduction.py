"""Reductions: from a stage's tokens to the next one's, on a grid of half the rows and columns.

Residual spatial reduction. Paper: ViT-ResNAS (Liao, Karaman, Sze, arXiv 2109.00642, section 3.1). With x the tokens
of the grid and n(x) their LayerNorm:

    patches = conv3x3(n(x), stride 2) + positions          class = linear(n(x))
    residual: 2x2 mean of x's patches, x's class token, both with zeros appended up to the new width

Without the residual it is a plain strided convolution, as in other multi-stage transformers.

Patch reduction. Paper: Transformer-LS for images (Zhu et al., arXiv 2107.02192, section 4.3, after ViL). The tokens
before the patches are left behind:

    patches = LayerNorm(conv2x2(x, stride 2)) + positions          class = a learned token

Shapes: B images, N tokens (class token first), D width before, E width behind.
"""

from __future__ import annotations

from math import prod

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from vitnas.grids import Grid
from vitnas.layers.axes import Axes
from vitnas.layers.cost import LayerCost
from vitnas.layers.resample import seen_positions
from vitnas.layers.stem import conv_axes


class Reduction(nn.Module):
    """What the reductions have in common: grids, and positions on the smaller one."""

    def __init__(self, grid: Grid, out_dim: int, *, num_prefix_tokens: int, has_positions: bool) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        self._own_grid = grid
        self.pos_embed = nn.Parameter(torch.empty(1, prod(halved(grid)), out_dim)) if has_positions else None

    def _places(self) -> Tensor | None:
        return seen_positions(self.pos_embed, halved(self._own_grid), halved(self.grid))

    def _grid(self, x_BND: Tensor) -> Tensor:
        patches = x_BND[:, self.num_prefix_tokens :].transpose(1, 2)
        return patches.unflatten(2, self.grid)

    def _axes_of_positions(self, out: Axes) -> dict[str, Axes]:
        if self.pos_embed is None:
            return {}
        return {"pos_embed": (("one", 1), ("tokens", self.pos_embed.shape[1]), *out)}

    def set_grid(self, grid: Grid) -> None:
        """Take another grid; positions are resampled as timm does."""
        old, new = halved(self._own_grid), halved(grid)
        if self.pos_embed is not None and new != old:
            table = resample_abs_pos_embed(self.pos_embed, [*new], [*old], num_prefix_tokens=0)
            self.pos_embed = nn.Parameter(table.detach(), requires_grad=self.pos_embed.requires_grad)
        self.grid = self._own_grid = grid

    def see_grid(self, grid: Grid) -> None:
        """Take images of another grid, with the weights as they are."""
        self.grid = grid


class SpatialReduction(Reduction):
    """(B, N, D) tokens of a grid to (B, N', E) tokens of the halved grid.

    Args:
        dim, out_dim: width before and behind; with the residual it must not fall.
        grid: rows and columns of patches before; even.
        num_prefix_tokens: class and distillation tokens.
        has_positions: add learned positions to the new patches.
        residual: add the mean of the old patches.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        grid: Grid,
        num_prefix_tokens: int,
        norm_eps: float,
        has_positions: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__(grid, out_dim, num_prefix_tokens=num_prefix_tokens, has_positions=has_positions)
        self.residual, self.extra = residual, out_dim - dim
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.prefix = nn.Linear(dim, out_dim) if num_prefix_tokens else None

    def axes(self) -> dict[str, Axes]:
        dim: Axes = (("dim", self.conv.in_channels),)
        out: Axes = (("dim", self.conv.out_channels),)
        axes = {
            "norm.weight": dim,
            "norm.bias": dim,
            "conv.weight": out + dim + (("patch_h", 3), ("patch_w", 3)),
            "conv.bias": out,
        }
        if self.prefix is not None:
            axes |= {"prefix.weight": out + dim, "prefix.bias": out}
        return axes | self._axes_of_positions(out)

    def forward(self, x_BND: Tensor) -> Tensor:
        normed_BND = self.norm(x_BND)
        prefix = None
        if (
            self.prefix is not None
        ):  # contiguous: else the kernel, and so rounding, would follow the weight's strides
            prefix = self.prefix(normed_BND[:, : self.num_prefix_tokens].contiguous())
        out = self.conv(self._grid(normed_BND)).flatten(2).transpose(1, 2)
        del normed_BND
        if (places := self._places()) is not None:
            out = out + places
        if prefix is not None:
            out = torch.cat([prefix, out], dim=1)
            del prefix
        return out + self._shortcut(x_BND) if self.residual else out

    def _shortcut(self, x_BND: Tensor) -> Tensor:
        short = functional.avg_pool2d(self._grid(x_BND), 2).flatten(2).transpose(1, 2)
        if self.num_prefix_tokens:
            short = torch.cat([x_BND[:, : self.num_prefix_tokens], short], dim=1)
        return functional.pad(short, (0, self.extra)) if self.extra else short

    @staticmethod
    def cost(
        dim: int,
        out_dim: int,
        *,
        grid: Grid,
        num_prefix_tokens: int,
        has_positions: bool,
        residual: bool,
    ) -> LayerCost:
        """Memory with the input."""
        prefix, patches = num_prefix_tokens, prod(halved(grid))
        before, behind = (prod(grid) + prefix) * dim, (patches + prefix) * out_dim
        outputs = 3 if residual else 2 if prefix or has_positions else 1
        return LayerCost(
            macs=patches * 9 * dim * out_dim + prefix * dim * out_dim,
            params=2 * dim
            + 9 * dim * out_dim
            + out_dim
            + (dim * out_dim + out_dim if prefix else 0)
            + (patches * out_dim if has_positions else 0),
            # The input, and: its norm beside the first outputs, or the sum and its terms.
            memory=before + max(before + behind, outputs * behind),
        )


class PatchReduction(Reduction):
    """(B, N, D) tokens of a grid to (B, N', E) tokens of the halved grid; an odd last row or column is left out.

    Args:
        dim, out_dim: width before and behind.
        grid: rows and columns of patches before.
        prefix_tokens: class tokens before and behind.
        has_positions: add learned positions to the new patches.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        grid: Grid,
        prefix_tokens: tuple[int, ...],
        norm_eps: float,
        has_positions: bool = True,
    ) -> None:
        before, behind = prefix_tokens
        super().__init__(grid, out_dim, num_prefix_tokens=before, has_positions=has_positions)
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2)
        self.norm = nn.LayerNorm(out_dim, eps=norm_eps)
        self.cls_token = nn.Parameter(torch.empty(1, behind, out_dim)) if behind else None

    def axes(self) -> dict[str, Axes]:
        out: Axes = (("dim", self.conv.out_channels),)
        axes = conv_axes(self.conv, "conv", "dim", "dim") | {"norm.weight": out, "norm.bias": out}
        if self.cls_token is not None:
            axes["cls_token"] = (("one", 1), ("one", 1), *out)
        return axes | self._axes_of_positions(out)

    def forward(self, x_BND: Tensor) -> Tensor:
        out = self.conv(self._grid(x_BND)).flatten(2).transpose(1, 2)
        out = self.norm(out)
        if (places := self._places()) is not None:
            out = out + places
        if self.cls_token is None:
            return out
        return torch.cat([self.cls_token.expand(out.shape[0], -1, -1), out], dim=1)

    @staticmethod
    def cost(
        dim: int, out_dim: int, *, grid: Grid, prefix_tokens: tuple[int, ...], has_positions: bool
    ) -> LayerCost:
        """Memory with the input."""
        (before, behind), patches = prefix_tokens, prod(halved(grid))
        return LayerCost(
            macs=patches * 4 * dim * out_dim,
            params=4 * dim * out_dim + (3 + behind) * out_dim + (patches * out_dim if has_positions else 0),
            # The input, two maps as one is made of the other, and the norm's means or the class token.
            memory=(prod(grid) + before) * dim + 2 * patches * out_dim + max(2 * patches, behind * out_dim),
        )


def halved(grid: Grid) -> Grid:
    """Half the rows and half the columns."""
    return grid[0] // 2, grid[1] // 2
