"""Checkpoints: one safetensors file with weights, optimizer state and step, written aside and renamed.

Nothing about random numbers is stored: data order, augmentation, Archs and dropout are functions of (seed, step).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vitnas.errors import UserError
from vitnas.runs import load_tensors, parse_json, save_tensors

# Fields of a TrainConfig that may change between a run and its resumption: what is learned is the same.
FREE = {"checkpoint_minutes", "log_every", "monitor_every"}


def save_checkpoint(path: Path, parts: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    """Write `parts` (state dicts by name) and `meta` (JSON) as one file, in one step."""
    tensors = {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    save_tensors(path, tensors, {"vitnas": json.dumps(dict(meta))})


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises:
        UserError: the file is damaged or is no checkpoint of vitnas.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        tensors, header = load_tensors(path)
        meta = parse_json(header["vitnas"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); it must be a checkpoint that vitnas wrote. Delete it to start that "
            "stage anew."
        ) from error
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts, meta


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """An optimizer's state as tensors by name, and JSON that says where each belongs.

    Optimizers keep more than one tensor per weight: lists of them (kron), step counts in a group (lamb), dtypes
    (adafactorbv), the state of a generator (kron).

    Raises:
        UserError: it keeps something else, which would have to be pickled.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _split(optimizer.state_dict(), "", tensors)


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], tree: Any) -> None:
    """Undo `optimizer_tensors`."""
    optimizer.load_state_dict(_join(tree, tensors))


def take_over(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`new` with the state of `old`, as a checkpoint would carry it over."""
    tensors, tree = optimizer_tensors(old)
    text = json.dumps(tree)
    restore_optimizer(new, {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(text))
    return new


def _split(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):  # pairs, as keys may be numbers
        return {"dict": [[key, _split(each, f"{name}.{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        each = [_split(each, f"{name}.{index}", tensors) for index, each in enumerate(value)]
        return {type(value).__name__: each}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"its state holds a {type(value).__name__} ({name.strip('.')}), which cannot be saved")


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _join(each, tensors) for key, each in value}
    if kind == "dtype":
        return getattr(torch, value)
    return {"list": list, "tuple": tuple}[kind](_join(each, tensors) for each in value)


def check_identity(path: Path, meta: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise UserError where the checkpoint at `path` is of a run with other values."""
    for key, value in identity.items():
        if changed := difference(meta.get(key), value):
            raise UserError(
                f"{path} is of a run with another {key} ({changed}). Use the same values, another run folder, or "
                "delete the checkpoint to start this stage anew."
            )


def difference(old: Any, new: Any) -> str:
    """What changed between two values of a run, as a person reads it; empty where its result is the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        changed = (name for name, value in new.items() if name not in FREE and old.get(name) != value)
        return ", ".join(f"{name}: {old.get(name)!r} then, {new[name]!r} now" for name in changed)
    return "" if old == new else f"{old!r} then, {new!r} now"
