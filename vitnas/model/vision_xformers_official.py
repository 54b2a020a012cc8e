"""The authors' Vision X-formers state dicts (github.com/pranavphoenix/VisionXformer), read by name into a Model.

`official` mixers compute what the authors' do where that is not what the papers mean: Performer's largest key over the
whole batch; Nystrom's zero tokens in front and norms over the whole batch (PAPERS.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.mixers.nystrom import Nystrom
from vitnas.mixers.performer import Performer
from vitnas.model.official import model_with, read_checkpoint
from vitnas.model.vit import Model

TOP = {  # theirs, ours
    "cls_token": "cls_token",
    "pos_embedding": "pos_embed",
    "classifier.positional_emb": "pos_embed",
    "mlp_head.0": "norm",
    "classifier.norm": "norm",
    "mlp_head.1": "head",
    "classifier.fc": "head",
    "classifier.attention_pool": "seq_pool.score",
    "to_patch_embedding.1": "patch_embed.proj",
}
HYBRID = {f"to_patch_embedding.{index}": f"patch_embed.conv{index + 1}" for index in range(3)}
TOKENIZER = {f"tokenizer.conv_layers.{index}.0": f"patch_embed.conv{index + 1}" for index in range(3)}
BLOCK = {  # theirs within a layer of a plain or a compact network, ours within a block
    "0.norm": "norm1",
    "1.norm": "norm2",
    "1.fn.net.0": "mlp.fc1",
    "1.fn.net.3": "mlp.fc2",
    "pre_norm": "norm1",
    "norm1": "norm2",
    "linear1": "mlp.fc1",
    "linear2": "mlp.fc2",
}
ATTENTION = {
    "to_qkv": "qkv",
    "qkv": "qkv",
    "to_out.0": "proj",
    "to_out": "proj",
    "proj": "proj",
    "res_conv": "conv",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "proj_k": "proj_k",
    "fast_attention.projection_matrix": "features",
}
UNUSED = re.compile(r"layer_pos_emb\.emb")  # tables of angles


def load_vision_xformer(source: str | Path | Mapping[str, Tensor], arch: Arch) -> Model:
    """The Model of `arch`, in evaluation mode and with `official` mixers, with the authors' weights.

    Raises:
        UserError: the weights are not those of `arch`; what is missing and unknown is named.
    """
    weights = vision_xformer_weights(read_checkpoint(source), arch)
    model = model_with(weights, arch, "its network")
    set_official(model)
    return model


def set_official(model: nn.Module, official: bool = True) -> None:
    """Let the mixers of `model` compute as the authors' do, or as the papers say."""
    for module in model.modules():
        if isinstance(module, Performer | Nystrom):
            module.official = official


def vision_xformer_weights(state: Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """The authors' tensors under the names of `build(arch)`, fused and laid out as ours."""
    name_of: Callable[[str], str | None] = _mixer_name if "1.weight" in state else _name(arch)
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = name_of(name)
        if ours is not None:
            weights[ours] = tensor
    if "1.weight" in state:
        weights = _finish_mixer(weights, arch)
    if arch.position != "learned":
        weights.pop("pos_embed", None)  # the authors' rotary ViT and ViL keep a table that nothing uses
    patch = weights.get("patch_embed.proj.weight")
    if patch is not None:  # theirs is linear, on (row, column, channel) of a patch
        side = (arch.patch_size, arch.patch_size, arch.in_chans)
        weights["patch_embed.proj.weight"] = patch.unflatten(1, side).permute(0, 3, 1, 2)
    for index, block in enumerate(arch.blocks):
        prefix = f"blocks.{index}.attn"
        for kind in ("weight", "bias") if block.mixer == "performer" else ():
            parts = [weights.pop(f"{prefix}.{part}.{kind}", None) for part in "qkv"]
            present = [part for part in parts if part is not None]
            if len(present) == 3:
                weights[f"{prefix}.qkv.{kind}"] = torch.cat(present)
    return weights


def _name(arch: Arch) -> Callable[[str], str | None]:
    """From the authors' names to ours; names that are not known stay as they are."""
    top = {**TOP, **(HYBRID if arch.stem == "hybrid" else {}), **TOKENIZER}

    def ours(name: str) -> str | None:
        if UNUSED.fullmatch(name):
            return None
        if name in top:
            return top[name]
        stem, _, leaf = name.rpartition(".")
        if stem in top:
            return f"{top[stem]}.{leaf}"
        found = re.fullmatch(r"(?:transformer\.layers|classifier\.blocks)\.(\d+)\.(.+)", name)
        return f"blocks.{found[1]}.{_within(found[2])}" if found else name

    return ours


def _within(name: str) -> str:
    """A name within a block."""
    stem, _, leaf = name.rpartition(".")
    if stem in BLOCK:
        return f"{BLOCK[stem]}.{leaf}"
    inner = name.removeprefix("0.fn.").removeprefix("self_attn.")
    if inner in ATTENTION:
        return f"attn.{ATTENTION[inner]}"
    stem, _, leaf = inner.rpartition(".")
    return f"attn.{ATTENTION[stem]}.{leaf}" if stem in ATTENTION else name


def _finish_mixer(weights: dict[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """The layers behind the blocks, by their numbers; convolutions of one token as linear layers."""
    last = {f"last.{arch.depth + 2}": "norm", f"last.{arch.depth + 4}": "head"}
    found = {}
    for name, tensor in weights.items():
        stem, _, leaf = name.rpartition(".")
        flat = tensor.squeeze(-1) if tensor.dim() == 3 else tensor
        found[f"{last[stem]}.{leaf}" if stem in last else name] = flat
    return found


def _mixer_name(name: str) -> str | None:
    """From the names of an MLP-Mixer, which is a list of layers: patches, blocks from 2 on, norm, pooling, head."""
    number, _, rest = name.partition(".")
    if rest in ("weight", "bias"):
        return {"1": f"patch_embed.proj.{rest}"}.get(number, f"last.{number}.{rest}")
    part, _, inner = rest.partition(".")
    names = {"norm": f"norm{int(part) + 1}", "fn.0": "fc1", "fn.3": "fc2"}
    stem, _, leaf = inner.rpartition(".")
    where = "" if stem == "norm" else "attn." if part == "0" else "mlp."
    return f"blocks.{int(number) - 2}.{where}{names[stem]}.{leaf}"
