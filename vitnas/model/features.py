"""Features of blocks for dense tasks, as timm asks for them and gives them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

from torch import Tensor

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.grids import sides_of
from vitnas.model.blocks import block_grids, block_prefixes


def take_indices(depth: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Block numbers to take (None: all; n: the last n; negative numbers count from the end) and the last of them."""
    if indices is None or isinstance(indices, int):
        take = list(range(depth - (depth if indices is None else indices), depth))
    else:
        take = [index + depth if index < 0 else index for index in indices]
    if not take or min(take) < 0 or max(take) >= depth:
        raise UserError(
            f"indices is {indices}; the model has blocks 0 to {depth - 1}. Ask for some of these."
        )
    return take, max(take)


def feature_info(arch: Arch) -> list[dict[str, Any]]:
    """Per block what timm's feature extraction asks for: module, channels, pixels per feature."""
    if arch.work_size is None:
        pixels = [arch.patch_size << index for index in range(len(arch.stages))]
    else:
        pixels = [max(1, sides_of(arch.image_size)[0] // rows) for rows, _ in arch.grids]
    maps = [(stage.embed_dim, pixels[index]) for index, stage in enumerate(arch.stages) for _ in stage.blocks]
    return [
        {"module": f"blocks.{index}", "num_chs": width, "reduction": reduction}
        for index, (width, reduction) in enumerate(maps)
    ]


def check_maps(arch: Arch, blocks: Sequence[int], features: Sequence[Tensor]) -> None:
    """Raise UserError where the (B, P, D) features of blocks are of some patches alone, which make no map."""
    whole = prod(arch.grids[-1])  # of the smallest grid
    for index, item in zip(blocks, features, strict=True):
        if item.shape[1] < whole:
            raise UserError(
                f"a map of block {index} is asked for, but {item.shape[1]} of {whole} patches come out of it; the "
                "others have no features there. Use output_fmt='NLC', and output_dict=True for their places."
            )


def stage_starts(arch: Arch) -> list[int]:
    """Number of each stage's first block."""
    return list(accumulate((len(stage.blocks) for stage in arch.stages[:-1]), initial=0))


def as_features(
    arch: Arch,
    blocks: Sequence[int],
    tokens: Sequence[Tensor],
    places: Sequence[Tensor],
    final_BND: Tensor | None,
    *,
    output_fmt: str,
    with_prefix: bool,
    by_name: bool,
) -> Any:
    """What timm's `forward_intermediates` gives of the (B, N, D) tokens of some blocks; see that of `Model`.

    Args:
        blocks: their numbers, rising.
        places: of the patches of each block, where an Arch keeps fewer.
        final_BND: the last tokens, if they are asked for.
    """
    prefixes = block_prefixes(arch)
    firsts = [prefixes[index] for index in blocks]
    prefix = []
    if any(firsts) and with_prefix:
        prefix = [item[:, :first] for item, first in zip(tokens, firsts, strict=True)]
    maps = [item[:, first:] for item, first in zip(tokens, firsts, strict=True)]
    if output_fmt == "NCHW":
        check_maps(arch, blocks, maps)
        grids = [grid for index, grid in enumerate(block_grids(arch)) if index in blocks]
        maps = [
            item.transpose(1, 2).unflatten(2, grid).contiguous()
            for item, grid in zip(maps, grids, strict=True)
        ]
    if by_name:
        named: dict[str, Any] = {"image_intermediates": maps}
        if arch.selector is not None:
            named["image_intermediates_places"] = [*places]
        if prefix:
            named["image_intermediates_prefix"] = prefix
        return named if final_BND is None else named | {"image_features": final_BND}
    features = list(zip(maps, prefix, strict=True)) if prefix else maps
    return features if final_BND is None else (final_BND, features)
