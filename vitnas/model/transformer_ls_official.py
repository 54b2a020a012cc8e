"""The checkpoints of Transformer-LS for images (github.com/NVIDIA/transformer-ls, imagenet), read by name into ours.

Their `layer3.5.mlp` counts attention and MLP apart behind a patch embedding with number 0. Absolute positions are a
table of rows and one of columns, half the width each, and one of the class token; here they are written out, and what a
class token behind a reduction gets is added to it. Biases in windows are 0 where they have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitnas.arch import Arch
from vitnas.mixers import MIXERS
from vitnas.mixers.long_short import WINDOW, steps_of
from vitnas.model.features import stage_starts
from vitnas.model.official import foreign, model_with, read_checkpoint
from vitnas.model.vit import Model

PARTS = {  # within a block: theirs, ours
    "norm": "norm",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "attn.to_dynamic_projection": "attn.dynamic",
    "attn.dual_ln_full": "attn.norm_full",
    "attn.dual_ln_dp": "attn.norm_dynamic",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
TABLES = tuple(
    f"attn.{word}"
    for word in (
        "local_relative_position_bias_table",
        "g2l_relative_position_bias",
        "g2g_relative_position_bias",
    )
)
INDEX = "attn.relative_position_index"  # computed, in their files all the same
_NAME = re.compile(r"layer(?P<stage>[1-4])\.(?P<place>\d+)\.(?P<rest>.+)")


def load_transformer_ls(source: str | Path | Mapping[str, Tensor], arch: Arch) -> Model:
    """The Model of `arch`, in evaluation mode, with the authors' weights.

    Args:
        arch: from its name, or from `transformer_ls` by the text in the authors' configuration.

    Raises:
        UserError: the checkpoint cannot be read, is of another kind or of another Arch (the first reasons are given).
    """
    tensors = transformer_ls_tensors(read_checkpoint(source), arch)
    return model_with(tensors, arch, "its name, or of `transformer_ls` and the authors' text")


def is_transformer_ls(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has their names."""
    return "layer1.0.proj.weight" in state


def transformer_ls_tensors(state: Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """Their state dict under our names.

    Raises:
        UserError: names that such a network does not have.
    """
    tensors: dict[str, Tensor] = {}
    stems: dict[int, dict[str, Tensor]] = {}
    tables: dict[int, dict[str, Tensor]] = {}
    unknown, starts = [], stage_starts(arch)
    for name, tensor in state.items():
        found = _NAME.fullmatch(name)
        if found is None:
            if name in ("norm.weight", "norm.bias", "head.weight", "head.bias"):
                tensors[name] = tensor
            else:
                unknown.append(name)
            continue
        stage, place, rest = int(found["stage"]) - 1, int(found["place"]), found["rest"]
        part, _, leaf = rest.rpartition(".")
        if stage >= len(starts):
            unknown.append(name)
        elif place == 0:
            stems.setdefault(stage, {})[rest] = tensor
        elif rest in TABLES:
            tables.setdefault(starts[stage] + (place - 1) // 2, {})[rest] = tensor
        elif part in PARTS:
            ours = PARTS[part] if part != "norm" else "norm1" if place % 2 else "norm2"
            tensors[f"blocks.{starts[stage] + (place - 1) // 2}.{ours}.{leaf}"] = tensor
        elif rest != INDEX:
            unknown.append(name)
    if unknown or not tensors:
        raise foreign(unknown, "a Transformer-LS", "imagenet code")
    for stage, given in stems.items():
        tensors |= dict(_stem(stage, given))
    return tensors | dict(_biases(arch, tables))


def _stem(stage: int, given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A stage's patch embedding: ours is the stem's, or a reduction."""
    start = f"reductions.{stage - 1}." if stage else ""
    for leaf in ("weight", "bias"):
        for theirs, ours in (("proj", "conv" if stage else "patch_embed.proj"), ("norm_embed", "norm")):
            if (tensor := given.get(f"{theirs}.{leaf}")) is not None:
                yield f"{start}{ours if stage or theirs == 'proj' else 'patch_norm'}.{leaf}", tensor
    cls_token, rows, cols = (given.get(name) for name in ("cls_token", "x_pos_embed", "y_pos_embed"))
    if rows is None or cols is None:
        if cls_token is not None:
            yield f"{start}cls_token", cls_token
        return
    size = (-1, rows.shape[1], cols.shape[1], -1)
    places_1PD = torch.cat([rows[:, :, None].expand(*size), cols[:, None].expand(*size)], dim=-1).flatten(
        1, 2
    )
    of_class = given.get("cls_pos_embed", places_1PD[:, :0])
    if stage:
        yield f"{start}pos_embed", places_1PD
        if cls_token is not None:
            yield f"{start}cls_token", cls_token + of_class
        return
    yield "pos_embed", torch.cat([of_class, places_1PD], dim=1)
    if cls_token is not None:
        yield "cls_token", cls_token


def _biases(arch: Arch, tables: Mapping[int, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each block's biases: within windows as they are, or 0; of full attention with those of the class token behind."""
    for index, block in enumerate(arch.blocks):
        local, ends, own = (tables.get(index, {}).get(name) for name in TABLES)
        if MIXERS[block.mixer].has_own_bias:
            steps = steps_of(block.window or WINDOW)
            yield (
                f"blocks.{index}.attn.bias",
                torch.zeros(steps, steps, block.num_heads) if local is None else local,
            )
        elif local is not None:
            if ends is not None and own is not None:  # from the class token, to it, to itself
                local = torch.cat([local, ends[..., 0], own[..., 0].T])
            yield f"blocks.{index}.attn.rel_pos.relative_position_bias_table", local
