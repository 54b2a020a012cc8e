"""What timm asks of a model besides its layers: feature maps, input, first and last layer; and how it writes sizes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.layers.stem import STEMS


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


def square(name: str, size: int | Sequence[int]) -> int:
    """The side of a size given as one number or as two equal ones."""
    sides = (size,) if isinstance(size, int) else tuple(size)
    if len(set(sides)) != 1 or len(sides) > 2:
        raise UserError(f"{name} is {size}; both sides must be the same number of pixels. Give one number.")
    return int(sides[0])


def feature_info(arch: Arch) -> list[dict[str, Any]]:
    """Per block what timm's feature extraction asks for: module, channels, pixels per feature."""
    maps = [
        (stage.embed_dim, arch.patch_size << index)
        for index, stage in enumerate(arch.stages)
        for _ in stage.blocks
    ]
    return [
        {"module": f"blocks.{index}", "num_chs": width, "reduction": reduction}
        for index, (width, reduction) in enumerate(maps)
    ]


def check_maps(arch: Arch, blocks: Sequence[int], features: Sequence[Tensor]) -> None:
    """Raise UserError where the (B, P, D) features of blocks are of some patches alone, which make no map."""
    keeps = [index for index, block in enumerate(arch.blocks) if block.keep is not None]
    whole = prod(arch.grids[-1])
    for index, item in zip(blocks, features, strict=True):
        if keeps and index >= keeps[0] and item.shape[1] < whole:
            raise UserError(
                f"a map of block {index} is asked for, but {item.shape[1]} of {whole} patches come out of it; the "
                "others have no features there. Use output_fmt='NLC', and output_dict=True for their places."
            )


def default_cfg(arch: Arch) -> dict[str, Any]:
    """timm's description of a model: what makes it, the input that it expects, its first and last layer."""
    heads = [
        "head",
        *(
            name
            for name, used in (("head_dist", arch.distill_token), ("patch_head", arch.patch_head))
            if used
        ),
    ]
    return {
        "architecture": "vitnas_arch",
        "url": "",
        "num_classes": arch.num_classes,
        "input_size": arch.input_size,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5,) * arch.in_chans,
        "std": (0.5,) * arch.in_chans,
        "first_conv": f"patch_embed.{STEMS[arch.stem].first_conv}",
        "classifier": "head" if len(heads) == 1 else tuple(heads),
    }


def stage_starts(arch: Arch) -> list[int]:
    """Number of each stage's first block."""
    starts, count = [], 0
    for stage in arch.stages:
        starts.append(count)
        count += len(stage.blocks)
    return starts
