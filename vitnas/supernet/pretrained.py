"""Start a Supernet from a pretrained timm ViT: a good beginning when images are few or time is short."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.layers.axes import named_axes
from vitnas.model import Model
from vitnas.model.timm_keys import from_timm
from vitnas.supernet.supernet import Supernet

SAME = (
    "reg_tokens",
    "no_embed_class",
    "pre_norm",
    "layer_scale",
    "act",
    "scale_mlp_norm",
    "qk_norm",
    "rel_pos_bias",
)  # fields of an Arch


def start_from_timm(supernet: Supernet, source: nn.Module) -> str:
    """Copy a plain timm ViT's weights into the shared tensors, as far as both have the same entries.

    On every axis the first entries are copied (heads, hidden units, blocks, channels), so each Arch gets a prefix of
    the pretrained network. Positions and patch weights are resampled to the Space's grid; what the ViT lacks
    (relative positions, extra blocks, a classifier for other classes) keeps its initial weights.

    Args:
        source: a timm ViT, or a Model.

    Returns:
        One sentence: what was copied and how much of the Supernet that is.

    Raises:
        UserError: a model that is no plain ViT, or whose heads are of another width; private sharing.
    """
    arch = supernet.space.largest()
    if supernet.space.merged or supernet.sharing.private:
        raise UserError(
            f"{supernet.space.name} cannot start from a pretrained model; its heads divide widths anew or its tensors "
            "are private, and a ViT's are neither. Leave `pretrained` out, or use the autoformer space."
        )
    if arch.stem != "linear" or len(arch.stages) > 1:
        raise UserError(
            f"{supernet.space.name} has {len(arch.stages)} stages and stem {arch.stem!r}; a plain ViT has one stage "
            "and stem 'linear', so its weights would mean something else. Leave `pretrained` out to start anew."
        )
    model = copy.deepcopy(source) if isinstance(source, Model) else from_timm(source)
    name, given = type(source).__name__, model.arch.blocks[0].head_dim
    if given != arch.blocks[0].head_dim:
        raise UserError(
            f"the pretrained model's heads are {given} wide; the space's are {arch.blocks[0].head_dim}. Set the "
            f"space's head_dim to {given}, or start from another model."
        )
    other = [name for name in SAME if getattr(model.arch, name) != getattr(arch, name)]
    if other:
        told = ", ".join(f"{name} {getattr(model.arch, name)!r}" for name in other)
        raise UserError(
            f"the pretrained model has {told}; the space's Archs have "
            f"{', '.join(repr(getattr(arch, name)) for name in other)}, so its weights would mean something else. "
            "Start from a model that has the space's."
        )
    model.set_input_size(img_size=arch.image_size, patch_size=arch.patch_size)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    weights["patch_embed.proj.weight"] = _adapt_channels(weights["patch_embed.proj.weight"], arch.in_chans)
    if model.num_classes != arch.num_classes:
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
    axes = named_axes(model)
    copied = 0
    with torch.no_grad():
        for key, shared in supernet.named_parameters():
            if key in weights:
                copied += _copy_overlap(shared.data, supernet.axes[key], weights[key], axes[key])
    total = sum(p.numel() for p in supernet.parameters())
    return f"started from a pretrained {name}: {copied / total:.0%} of the supernet's weights are copied"


def _copy_overlap(
    target: Tensor,
    target_axes: tuple[tuple[str, int], ...],
    source: Tensor,
    source_axes: tuple[tuple[str, int], ...],
) -> int:
    """Copy the first entries on every axis; returns how many numbers were copied."""
    sizes = [
        source.shape[1] if name == "in_chans" else size for name, size in source_axes
    ]  # channels were adapted
    region = tuple(slice(0, min(a, b)) for (_, a), b in zip(target_axes, sizes, strict=True))
    part = source.reshape(sizes)[region]
    target.view([size for _, size in target_axes])[region].copy_(part)
    return part.numel()


def _adapt_channels(weight_DCPP: Tensor, in_chans: int) -> Tensor:
    """For images of other channels: the channels' sum for grey (a grey image equals its three channels), else their
    mean repeated, scaled to keep the output's size."""
    if weight_DCPP.shape[1] == in_chans:
        return weight_DCPP
    total = weight_DCPP.sum(1, keepdim=True)
    return (total / in_chans).expand(-1, in_chans, -1, -1)
