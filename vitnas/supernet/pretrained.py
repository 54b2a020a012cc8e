"""Start a Supernet from a trained network: a good beginning when images are few or time is short."""

from __future__ import annotations

import copy
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.layers.axes import Axes, merge_axes, named_axes, named_tensors
from vitnas.model import Model
from vitnas.model.timm_keys import from_timm
from vitnas.model.vit import HEADS
from vitnas.supernet.supernet import Supernet
from vitnas.supernet.tensors import shared_name

# What weights of another kind would make no sense without, and what is resampled or cut to size.
MUST_AGREE = (
    "stem",
    "reg_tokens",
    "no_embed_class",
    "pre_norm",
    "layer_scale",
    "act",
    "scale_mlp_norm",
    "qk_norm",
    "rel_pos_bias",
)
FITTED = ("image_size", "patch_size", "in_chans", "num_classes", "stages", "stem_width")


def start_from_timm(supernet: Supernet, network: nn.Module) -> str:
    """Copy a network's weights into the shared tensors, as far as both have the same entries.

    A Supernet of the Space around the network is then the network, bit for bit, at its largest. For another Space the
    first entries on every axis are copied (heads, hidden units, blocks, channels), so that each Arch gets a prefix of
    the network. Positions and patch weights are resampled to the Space's grid; what the network lacks (relative
    positions, extra blocks, a classifier for other classes) keeps its initial weights.

    Args:
        network: a Model, or a timm ViT that an Arch can say.

    Returns:
        One sentence: how much of the Supernet was copied, and in what the Space's Archs differ in kind.

    Raises:
        UserError: a network that no Arch can say or whose weights would mean something else here; private sharing.
    """
    largest, name = supernet.space.largest(), type(network).__name__
    if supernet.sharing.private or (supernet.space.merged and not isinstance(network, Model)):
        raise UserError(
            f"{supernet.space.name} cannot start from a pretrained model; its heads divide widths anew or its tensors "
            "are private, and a ViT's are neither. Leave `pretrained` out, or use the autoformer space."
        )
    model = network if isinstance(network, Model) else from_timm(network)
    _refuse_other_parts(model.arch, largest)
    told = _differences(model.arch, largest)
    if (model.arch.image_size, model.arch.patch_size) != (largest.image_size, largest.patch_size):
        model = copy.deepcopy(model) if model is network else model
        model.set_input_size(img_size=largest.image_size, patch_size=largest.patch_size)
    copied = _copy(model, supernet, largest)
    total = sum(parameter.numel() for parameter in supernet.parameters())
    said = f"started from a pretrained {name}: {copied / total:.0%} of the supernet's weights are copied"
    return f"{said}, but its Archs differ in kind, so answers do: {told}" if told else said


def _refuse_other_parts(given: Arch, largest: Arch) -> None:
    if given.stem != largest.stem or len(given.stages) != len(largest.stages):
        raise UserError(
            f"the space has {len(largest.stages)} stages and stem {largest.stem!r}; the pretrained model has "
            f"{len(given.stages)} and stem {given.stem!r}, so its weights would mean something else. Leave "
            "`pretrained` out to start anew."
        )
    widths = given.blocks[0].head_dim, largest.blocks[0].head_dim
    if widths[0] != widths[1]:
        raise UserError(
            f"the pretrained model's heads are {widths[0]} wide; the space's are {widths[1]}. Set the "
            f"space's head_dim to {widths[0]}, or start from another model."
        )
    other = [name for name in MUST_AGREE if getattr(given, name) != getattr(largest, name)]
    if other:
        told = ", ".join(f"{name} {getattr(given, name)!r}" for name in other)
        raise UserError(
            f"the pretrained model has {told}; the space's Archs have "
            f"{', '.join(repr(getattr(largest, name)) for name in other)}, so its weights would mean something else. "
            "Start from a model that has the space's."
        )


def _differences(given: Arch, largest: Arch) -> str:
    """What is no matter of size: `global_pool 'avg' (was 'token')` and so on."""
    names = [field.name for field in fields(Arch) if field.name not in (*FITTED, *MUST_AGREE)]
    told = [
        f"{name} {getattr(largest, name)!r} (was {getattr(given, name)!r})"
        for name in names
        if getattr(given, name) != getattr(largest, name)
    ]
    mixers = [sorted({block.mixer for block in arch.blocks}) for arch in (largest, given)]
    if mixers[0] != mixers[1]:
        told.append(f"mixers {', '.join(mixers[0])} (was {', '.join(mixers[1])})")
    return "; ".join(told)


@torch.no_grad()
def _copy(model: Model, supernet: Supernet, largest: Arch) -> int:
    """Copy what both have; returns how many numbers of parameters that were."""
    weights, patches = named_tensors(model), "patch_embed.proj.weight"
    if model.arch.stem == "linear":  # others read pixels elsewhere
        weights[patches] = _adapt_channels(weights[patches], largest.in_chans)
    elif model.arch.in_chans != largest.in_chans:
        raise UserError(
            f"the pretrained model sees {model.arch.in_chans} channels through stem {model.arch.stem!r}; the space's "
            f"{largest.in_chans} cannot be made of them. Leave `pretrained` out, or use such images."
        )
    axes, slots, copied = named_axes(model), supernet.space.slots(largest), 0
    shared = named_tensors(supernet)
    for name, value in weights.items():
        if name.partition(".")[0] in HEADS and model.num_classes != largest.num_classes:
            continue
        if name.startswith(("blocks.", "selections.")) and int(name.split(".")[1]) >= len(slots):
            continue  # a block more than the Space has
        home = shared_name(name, slots)[0]
        target = shared.get(home)
        if target is None:
            continue
        if name == "pos_embed":
            value = _realigned(value, _first_places(model.arch), target, _first_places(largest))
            one, (tokens, _), dim = axes[name]
            axes[name] = (one, (tokens, value.shape[1]), dim)
        if name in axes:
            own = supernet.sharing.taken(home, merge_axes(axes[name], supernet.space.merged))
            number = _copy_overlap(target.data, supernet.axes[home], value, own)
            copied += number if isinstance(target, nn.Parameter) else 0
        elif target.shape == value.shape:
            target.copy_(value)
    return copied


def _copy_overlap(target: Tensor, target_axes: Axes, source: Tensor, source_axes: Axes) -> int:
    """Copy the first entries on every axis; returns how many numbers were copied."""
    if [name for name, _ in target_axes] != [name for name, _ in source_axes]:
        return 0  # another mixer's tensor of the same name
    # Channels were adapted.
    sizes = [source.shape[1] if name == "in_chans" else size for name, size in source_axes]
    region = tuple(slice(0, min(a, b)) for (_, a), b in zip(target_axes, sizes, strict=True))
    part = source.reshape(sizes)[region]
    target.view([size for _, size in target_axes])[region].copy_(part)
    return part.numel()


def _first_places(arch: Arch) -> int:
    """Positions of class and distillation token; those of registers and patches follow."""
    return 0 if arch.no_embed_class else arch.class_token + arch.distill_token


def _realigned(given_1ND: Tensor, given: int, target_1ND: Tensor, wanted: int) -> Tensor:
    """Positions with `wanted` instead of `given` ones before those of registers and patches; the target's where some
    are missing."""
    missing_1ND = target_1ND[:, given:wanted, : given_1ND.shape[2]]
    missing_1ND = functional.pad(missing_1ND, (0, given_1ND.shape[2] - missing_1ND.shape[2]))
    return torch.cat([given_1ND[:, : min(given, wanted)], missing_1ND, given_1ND[:, given:]], dim=1)


def _adapt_channels(weight_DCPP: Tensor, in_chans: int) -> Tensor:
    """For images of other channels: the channels' sum for grey (a grey image equals its three channels), else their
    mean repeated, scaled to keep the output's size."""
    if weight_DCPP.shape[1] == in_chans:
        return weight_DCPP
    total = weight_DCPP.sum(1, keepdim=True)
    return (total / in_chans).expand(-1, in_chans, -1, -1)
