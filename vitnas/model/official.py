"""The authors' AutoFormer checkpoints (microsoft/Cream, folder AutoFormer), read by name into our names and order.

Their supernet is wider than the largest Arch of its space (tiny: 256 against 240), and a published subnet is a part of
it, so what is read here is the whole table; `vitnas.supernet.official` cuts an Arch or a Supernet out of it.

Two things differ besides names. Rows of their qkv weight go q, k, v, q, k, v, ... and are put in order here. Their
qkv *bias* is not interleaved but cut as one run, so that an entry's role depends on the number of heads; it is left
as it is, and `AUTOFORMER_OFFICIAL` sharing cuts it their way.

What every loader of authors' weights needs is here too: `read_checkpoint`, `foreign`, `model_with`.
"""

from __future__ import annotations

import argparse
import codecs
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.model.build import build
from vitnas.model.vit import Model

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
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "averaged_model", "teacher"),
    *("model_state_dict", "state_dict", "model", "module", "network", "net", "student", "backbone"),
)
# Of DDP and EMA, of torch.compile, of a class around the network.
PREFIXES = ("module.", "_orig_mod.", "model.")
AVERAGE = re.compile(r"\bema|ema\b|teacher|averag", re.IGNORECASE)
NUMPY_TYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


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
        raise foreign(unknown, "an AutoFormer", "AutoFormer code")
    return tensors


def foreign(unknown: Sequence[str], kind: str, work: str) -> UserError:
    """The refusal of a checkpoint with names that `kind` lacks; `work` of its authors writes the right ones."""
    return UserError(
        f"the checkpoint has {len(unknown)} names that {kind} lacks ({', '.join(unknown[:4])}); it must be a state "
        f"dict of the authors' {work}. Choose another file."
    )


def model_with(weights: Mapping[str, Tensor], arch: Arch, source: str) -> Model:
    """The Model of `arch`, in evaluation mode, with exactly these weights; `source` says where its Arch is found.

    Raises:
        UserError: names or shapes differ; the first few are named.
    """
    model = build(arch, device="meta").to_empty(device="cpu")
    wanted = model.state_dict()
    reasons = [f"{name} is missing" for name in wanted if name not in weights]
    reasons += [f"{name} is unknown" for name in weights if name not in wanted]
    reasons += [
        f"{name} is {tuple(weights[name].shape)}, needed {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if reasons:
        told = "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")
        raise UserError(f"the checkpoint is not of {arch.id}: {told}. Give the Arch of {source}.")
    model.load_state_dict(weights)
    return model.eval()


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


def read_checkpoint(
    source: str | Path | Mapping[str, Any], wanted: Collection[str] = ()
) -> dict[str, Tensor]:
    """A state dict, out of what training code wraps it in; every loader of foreign weights asks here.

    A file is safetensors, or torch's, of which only tensors and plain values are read. The weights may lie under one
    of `WRAPPERS` (an average comes first), their names may all begin with one of `PREFIXES`. Where the names are known,
    the weights may lie anywhere and their names begin with anything: what has most of these names is taken, and what
    does not begin as they do is another network's.

    Args:
        source: a file, or what it held.
        wanted: names of the network that the weights are for.

    Raises:
        UserError: no such file, or none that holds a state dict.
    """
    content = source if isinstance(source, Mapping) else _content(Path(source))
    states = list(_states(content, anywhere=bool(wanted)))
    if not states:
        raise UserError(
            f"{'what was given' if isinstance(source, Mapping) else source} holds no state dict; a name must lead to a "
            "tensor. Choose another file."
        )
    found = [_named(state, frozenset(wanted)) for state in states]
    return max(found, key=lambda state: len(state.keys() & wanted)) if wanted else found[0]


def _states(content: Any, *, anywhere: bool, depth: int = 0) -> Iterator[dict[str, Tensor]]:
    """The state dicts in what a file held, the likeliest first."""
    if not isinstance(content, Mapping) or depth > 4:
        return
    for key in WRAPPERS:
        yield from _states(content.get(key), anywhere=anywhere, depth=depth + 1)
    own = {
        name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)
    }
    own.pop("n_averaged", None)
    if own:
        yield own
    for key, value in content.items() if anywhere else ():
        if key not in WRAPPERS:
            yield from _states(value, anywhere=True, depth=depth + 1)


def _named(state: dict[str, Tensor], wanted: frozenset[str]) -> dict[str, Tensor]:
    """A state dict without what its names begin with."""
    hits = Counter(
        name[:at]
        for name in state
        for at in (0, *(i + 1 for i, letter in enumerate(name) if letter == "."))
        if name[at:] in wanted
    )
    if hits:
        # Of a network and its average or teacher side by side, the latter.
        start, _ = max(hits.items(), key=lambda hit: (hit[1], bool(AVERAGE.search(hit[0])), -len(hit[0])))
        return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    while prefix := next((each for each in PREFIXES if all(name.startswith(each) for name in state)), ""):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _content(path: Path) -> Any:
    """What a file holds; nothing in it is run."""
    number, array = (value.__reduce__()[0] for value in (numpy.float64(0), numpy.zeros(1)))
    # Scores beside the weights are often numpy's, and the settings of a training a Namespace.
    allowed: list[Any] = [numpy.dtype, numpy.ndarray, codecs.encode, argparse.Namespace]
    allowed += [type(numpy.dtype(word)) for word in NUMPY_TYPES]
    for package in ("numpy.core", "numpy._core"):  # before numpy 2 and since
        allowed += [(number, f"{package}.multiarray.scalar"), (array, f"{package}.multiarray._reconstruct")]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in any way
        words = " ".join(str(error).split()) or type(error).__name__
        if (
            "weights_only" in words.lower() or "Unsupported global" in words
        ):  # torch's advice is to run the file's code
            words = f"it holds {_objects(path)} besides tensors and plain values"
        elif isinstance(error, FileNotFoundError):
            words = "there is no such file"
        raise UserError(
            f"{path} cannot be read as a checkpoint ({words[:160]}); it must be safetensors or a torch file of "
            "tensors. Check the path, or save the state dict alone."
        ) from error


def _objects(path: Path) -> str:
    """The pickled things in a torch file, by name; nothing of it is run."""
    with suppress(Exception):  # files of torch before 1.6 do not say
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path)[:4]) or "other objects"
    return "other objects"


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
