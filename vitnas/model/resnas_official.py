"""The checkpoints of ViT-ResNAS's authors (yilunliao/vit-search), read by name into our names.

Their `blocks` count reductions too, and blocks that do not exist take a number without weights. Head widths cannot be
told from weights, so an Arch is needed, for example from `parse_network_def`. A supernet's checkpoint is that of its
largest Arch: weights are shared by prefix, as ours, and `Supernet.load_state_dict` takes what `resnas_tensors` gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vitnas.arch import Arch
from vitnas.model.build import build
from vitnas.model.official import foreign, model_with, read_checkpoint
from vitnas.model.registry import fit_weights
from vitnas.model.vit import Model

TOP = {
    "cls_head": "head",
    "dst_head": "head_dist",
    "patch_head": "patch_head",
    "norm": "norm",
    "patch_embed.proj": "patch_embed.proj",
    "patch_embed.conv_proj": "patch_embed.proj",
}
REDUCTION = {"norm": "norm", "patch_reduce": "conv", "token_transform": "prefix"}
BLOCK = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def resnas_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under our names.

    Raises:
        UserError: names that a ViT-ResNAS does not have.
    """
    numbers = sorted({int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)})
    reductions = [n for n in numbers if f"blocks.{n}.patch_reduce.weight" in state]
    blocks = [n for n in numbers if n not in reductions]
    places = {n: f"reductions.{index}" for index, n in enumerate(reductions)}
    places |= {n: f"blocks.{index}" for index, n in enumerate(blocks)}
    tensors: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        if name == "tokens":
            tensors |= dict(zip(("cls_token", "dist_token"), tensor.split(1, dim=1), strict=False))
        elif (ours := _our_name(name, places)) is not None:
            tensors[ours] = tensor
        else:
            unknown.append(name)
    if unknown or not tensors:
        raise foreign(unknown, "a ViT-ResNAS", "code")
    return tensors


def load_resnas_model(source: str | Path | Mapping[str, Tensor], arch: Arch) -> Model:
    """The Model of `arch`, in evaluation mode, with the authors' weights.

    Positions are resampled where `arch` has another image size; a patch head that `arch` has not is left out.

    Raises:
        UserError: the checkpoint cannot be read, is of another kind or does not hold `arch`; what differs is named.
    """
    tensors = resnas_tensors(read_checkpoint(source))
    if not arch.patch_head:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("patch_head.")}
    return model_with(fit_weights(tensors, build(arch, device="meta")), arch, "its network_def")


def _our_name(name: str, places: Mapping[int, str]) -> str | None:
    stem, _, leaf = name.rpartition(".")
    if name == "pos_embed":
        return name
    if stem in TOP:
        return f"{TOP[stem]}.{leaf}"
    if found := re.fullmatch(r"patch_embed\.conv([123])\.(conv|bn)", stem):
        return f"patch_embed.{'conv' if found[2] == 'conv' else 'norm'}{found[1]}.{leaf}"
    if not (found := re.fullmatch(r"blocks\.(\d+)\.(.+)", name)):
        return None
    place, rest = places[int(found[1])], found[2]
    inner, _, leaf = rest.rpartition(".")
    if place.startswith("reductions"):
        if rest == "pos_embed":
            return f"{place}.pos_embed"
        return f"{place}.{REDUCTION[inner]}.{leaf}" if inner in REDUCTION else None
    return f"{place}.{inner}.{leaf}" if inner in BLOCK else None
