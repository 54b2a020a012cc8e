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
