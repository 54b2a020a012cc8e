"""Networks that take images of other sizes beside their own, with the weights that they have: small crops of images.

Positions are taken at the places of the smaller grid, with gradient; tables of steps from patch to patch give the steps
that are left. `set_input_size` is for good, and makes other weights.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from timm.layers import Format
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.errors import UserError, first_line
from vitnas.grids import Grid, ImageSize, sides_of, size_text
from vitnas.model.blocks import check_mixer_sizes, resized, see_grids
from vitnas.model.modes import evaluating
from vitnas.model.outputs import read_outputs

GLOBAL, LOCAL = 224, 96  # sides of DINO's crops


class Twins:
    """A Model for each other size of images: the same weights in modules that know another grid.

    They are made when first needed and kept, as making one takes some milliseconds.
    """

    def __init__(self) -> None:
        self._kept: dict[Grid, Any] = {}
        self._weights: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Twins:
        return Twins()

    def of(self, model: Any, images_BCHW: Tensor) -> Any:
        """The one for these images, in the mode of `model`; None where they are of its own size."""
        size = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if size == sides_of(model.arch.image_size):
            return None
        tensors = [*model.parameters(), *model.buffers()]
        weights = [id(model.arch), *map(id, model.modules()), *map(id, tensors)]
        if weights != self._weights:  # other modules, or weights of another kind or place
            self._kept, self._weights = {}, weights
        twin = self._kept.get(size)
        if twin is None:
            twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
            twin.dynamic_img_size = False
            see(twin, size)
            self._kept[size] = twin
        if twin.training != model.training:
            twin.train(model.training)
        return twin


def see(model: Any, size: Grid) -> None:
    """Let a Model take images of `size`, not larger than its own, and no others.

    Raises:
        UserError: it cannot.
    """
    arch: Arch = model.arch
    own = sides_of(arch.image_size)
    if any(new > old for new, old in zip(size, own, strict=True)):
        raise UserError(
            f"images of {size_text(size)} pixels are larger than the network's, {size_text(arch.image_size)}; crops "
            "are of its size or smaller. Use smaller ones, or call set_input_size."
        )
    if arch.work_size is not None:
        raise UserError(
            f"{arch.id} resizes images of {size_text(arch.image_size)} pixels first, and takes these alone. Use a "
            "network with work_size=None, or crops of that size."
        )
    if arch.selector is not None:
        raise UserError(
            f"{arch.id} keeps a part of its patches, by number; it takes images of {size_text(arch.image_size)} pixels "
            "alone. Use a network that keeps all, or crops of that size."
        )
    seen = resized(arch, size, arch.patch_size)
    see_grids(model.blocks, model.reductions, seen)
    check_mixer_sizes(seen)
    model.patch_embed.set_input_size(img_size=size, patch_size=arch.patch_size)
    model.seen = seen.grids[0]


def local_size(network: nn.Module, whole: ImageSize) -> int:
    """The side of a small crop: 96/224 of the image's, in whole cells of the network's last grid, at least one."""
    cell, side = cell_of(network), min(sides_of(whole))
    return max(1, round(side * LOCAL / GLOBAL / cell)) * cell


def cell_of(network: Any) -> int:
    """Pixels of an image's side per cell of the last grid."""
    space = getattr(network, "space", None)
    arch = getattr(network, "arch", None) if space is None else space.largest()
    if isinstance(arch, Arch):
        return int(arch.patch_size << (len(arch.stages) - 1))
    known = getattr(network, "feature_info", None)
    return int(max((info["reduction"] for info in known), default=1)) if known else 1


def take_other_sizes(network: Any, input_size: tuple[int, int, int], size: ImageSize) -> None:
    """Let `network`, of ours or timm's, take images of `size` from now on, beside its own; tried with one image.

    Raises:
        UserError: it cannot, or they are smaller than a patch.
    """
    _check_patch(network, size)
    if hasattr(network, "dynamic_img_size"):
        network.dynamic_img_size = True
    ours = hasattr(network, "output_names")
    embed: Any = getattr(network, "patch_embed", None)
    if not ours and hasattr(embed, "strict_img_size"):
        embed.strict_img_size = False
        if hasattr(network, "dynamic_img_size"):  # positions are then added to a map
            embed.flatten, embed.output_fmt = False, Format.NHWC
    for module in [] if ours else network.modules():
        if isinstance(module, SwinTransformerBlock):
            module.dynamic_mask = True
            module._attn = MethodType(_swin_attention, module)
    space = getattr(network, "space", None)
    like = next(network.parameters())
    image_1CHW = torch.zeros(1, input_size[0], *sides_of(size), device=like.device)
    for arch in (None,) if space is None else (space.smallest(), space.largest()):
        try:
            with torch.no_grad(), evaluating(network):
                read_outputs(network, image_1CHW, ("pooled?", "tokens?"), arch=arch)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{type(network).__name__} cannot take images of {size_text(size)} pixels ({first_line(error)}); small "
                "crops are of that size. Use another local_crops_size, local_crops_number=0, or another network."
            ) from error


def _swin_attention(block: SwinTransformerBlock, x_BRSD: Tensor) -> Tensor:
    """Attention of shifted windows in a map that is filled up first, and then shifted, as in Swin's own code: the mask
    of windows counts on that. timm shifts first, which is the same where nothing is filled up; it stays so for images
    of the network's own size, for which others will run it."""
    _, rows, columns, dim = x_BRSD.shape
    if (rows, columns) == tuple(block.input_resolution):
        kept: Tensor = type(block)._attn(block, x_BRSD)
        return kept
    (height, width), (down, across) = block.window_size, block.shift_size
    x = functional.pad(x_BRSD, (0, 0, 0, -columns % width, 0, -rows % height))
    x = x.roll((-down, -across), dims=(1, 2))
    windows = window_partition(x, block.window_size).flatten(1, 2)
    windows = block.attn(windows, mask=block.get_attn_mask(x))
    x = window_reverse(windows.view(-1, height, width, dim), block.window_size, *x.shape[1:3])
    x = x.roll((down, across), dims=(1, 2))
    return x[:, :rows, :columns].contiguous()


def _check_patch(network: Any, size: ImageSize) -> None:
    """Refuse crops smaller than a patch (of ours, than a cell of the last grid)."""
    if hasattr(network, "output_names"):
        least = cell_of(network)
    else:
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
        least = max(patch) if isinstance(patch, tuple | list) else int(patch)
    if min(sides_of(size)) < least:
        raise UserError(
            f"small crops are of {size_text(size)} pixels, and the network's cells of {least}; a crop must hold at "
            f"least one. Use local_crops_size={least} or more, or local_crops_number=0."
        )
