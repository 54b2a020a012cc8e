"""The authors' AutoFormer checkpoints (microsoft/Cream, folder AutoFormer), read by name into our names and order.

Their supernet is wider than the largest Arch of its space (tiny: 256 against 240), and a published subnet is a part of
it, so what is read here is the whole table; `vitnas.supernet.official` cuts an Arch or a Supernet out of it.

Two things differ besides names. Rows of their qkv weight go q, k, v, q, k, v, ... and are put in order here. Their
qkv *bias* is not interleaved but cut as one run, so that an entry's role depends on the number of heads; it is left
as it is, and `AUTOFORMER_OFFICIAL` sharing cuts it their way.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError

NAMES = {  # theirs, ours; within a block
    "attn_layer_norm": "norm1",
    "ffn_layer_norm": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "attn.rel_pos_embed_k.embeddings_table_v": "attn.rel_pos_k.rows",
    "attn.rel_pos_embed_k.embeddings_table_h": "attn.rel_pos_k.cols",
    "attn.rel_pos_embed_v.embeddings_table_v": "attn.rel_pos_v.rows",
    "attn.rel_pos_embed_v.embeddings_table_h": "attn.rel_pos_v.cols",
}
TOP = {"patch_embed_super.proj": "patch_embed.proj", "norm": "norm", "head": "head"}
WHOLE = ("cls_token", "pos_embed")
HEAD_DIM = 64  # in all of their spaces


def autoformer_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under our names, qkv rows in the order [q; k; v].

    Raises:
        UserError: names that an AutoFormer does not have.
    """
    tensors, unknown = {}, []
    for name, tensor in state.items():
        ours = _our_name(name)
        if ours is None:
            unknown.append(name)
        else:
            weight = ours.endswith("attn.qkv.weight")
            tensors[ours] = torch.cat([tensor[part::3] for part in range(3)]) if weight else tensor
    if unknown or not tensors:
        raise UserError(
            f"the checkpoint has {len(unknown)} names that an AutoFormer lacks ({', '.join(unknown[:4])}); it must "
            "be a state dict of the authors' AutoFormer code. Choose another file."
        )
    return tensors


def arch_of_autoformer(
    tensors: Mapping[str, Tensor], *, global_pool: Literal["token", "avg"] = "avg"
) -> Arch:
    """The Arch that all of `tensors` (from `autoformer_tensors`) make together.

    Args:
        global_pool: "avg" for weights trained with their `--gp`, as all published ones are; the file does not say.

    Raises:
        UserError: a tensor that every AutoFormer has is missing.
    """
    try:
        dim, in_chans, patch, _ = tensors["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        blocks = tuple(
            Block(
                num_heads=tensors[f"blocks.{index}.attn.proj.weight"].shape[1] // HEAD_DIM,
                head_dim=HEAD_DIM,
                mlp_hidden=tensors[f"blocks.{index}.mlp.fc1.weight"].shape[0],
            )
            for index in range(depth)
        )
        classes, num_tokens = tensors["head.weight"].shape[0], tensors["pos_embed"].shape[1]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the checkpoint is not a whole AutoFormer ({error} is missing or has another shape); it needs patches, "
            "positions, blocks and a head. Choose another file."
        ) from error
    table = tensors.get("blocks.0.attn.rel_pos_k.rows")
    return Arch(
        image_size=round((num_tokens - 1) ** 0.5) * patch,
        patch_size=patch,
        in_chans=in_chans,
        num_classes=classes,
        stages=(Stage(embed_dim=dim, blocks=blocks),),
        relative_position=0 if table is None else (table.shape[0] - 2) // 2,
        global_pool=global_pool,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        norm_eps=1e-5,
    )


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, or from a torch file of which only tensors and plain values are read.

    A torch file may hold the state dict itself or, as the authors' do, under "model".

    Raises:
        UserError: no such file, or none that holds a state dict.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        # Their files also keep the command line, a harmless Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({' '.join(str(error).split())[:120]}); it must be safetensors "
            "or a torch file of tensors. Check the path, or convert it."
        ) from error
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict; a name must lead to a tensor. Choose another file.")
    return dict(state)


def _our_name(name: str) -> str | None:
    if name in WHOLE:
        return name
    stem, _, leaf = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{leaf}"
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if not found:
        return None
    index, rest = found.groups()
    inner, _, leaf = rest.rpartition(".")
    if rest in NAMES:
        return f"blocks.{index}.{NAMES[rest]}"
    return f"blocks.{index}.{NAMES[inner]}.{leaf}" if inner in NAMES else None
