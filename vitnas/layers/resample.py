"""Weights per token, resampled to another grid of patches."""

from __future__ import annotations

from math import prod

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vitnas.grids import Grid


def resample_tokens(
    weight_NX: Tensor, *, old_grid: Grid, new_grid: Grid, num_prefix_tokens: int, keep_sum: bool
) -> nn.Parameter:
    """Rows of `weight_NX`, one per token (class token first), for another grid; bicubic, as timm resamples positions.

    Args:
        keep_sum: for weights that are summed over tokens; rows shrink as the patches grow in number.
    """
    table = resample_abs_pos_embed(
        weight_NX.detach()[None], [*new_grid], [*old_grid], num_prefix_tokens=num_prefix_tokens
    )[0]
    if keep_sum:
        scale = torch.ones(len(table), 1, dtype=table.dtype, device=table.device)
        scale[num_prefix_tokens:] = prod(old_grid) / prod(new_grid)
        table = table * scale
    return nn.Parameter(table.contiguous(), requires_grad=weight_NX.requires_grad)


def seen_positions(
    positions_1ND: Tensor | None, own: Grid, seen: Grid, *, num_prefix_tokens: int = 0
) -> Tensor | None:
    """Positions of a grid at the places of another one's, with gradient: bicubic, as DINO takes them for small crops.
    None stays None."""
    if own == seen or positions_1ND is None:
        return positions_1ND
    found: Tensor = resample_abs_pos_embed(
        positions_1ND, [*seen], [*own], num_prefix_tokens=num_prefix_tokens, antialias=False
    )
    return found
