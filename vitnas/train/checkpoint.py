"""Checkpoints: one safetensors file with weights, optimizer state and step, written aside and renamed.

Nothing about random numbers is stored: data order, augmentation, Archs and dropout are functions of (seed, step).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitnas.errors import UserError
from vitnas.runs import write_with


def save_checkpoint(path: Path, parts: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    """Write `parts` (state dicts by name) and `meta` (JSON) as one file, in one step."""
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part, state in parts.items()
        for name, tensor in state.items()
    }
    write_with(path, lambda file: save_file(tensors, file, metadata={"vitnas": json.dumps(dict(meta))}))


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

    Raises:
        UserError: the file is damaged or is no checkpoint of vitnas.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["vitnas"])
            for key in file.keys():
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); it must be a checkpoint that vitnas wrote. Delete it to start that "
            "stage anew."
        ) from error
    return parts, meta


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as (tensors by `index.name`, JSON for the rest)."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            elif value is not None:
                plain[f"{index}.{name}"] = value
    return tensors, {"plain": plain, "param_groups": state["param_groups"]}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Undo `optimizer_tensors`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **meta["plain"]}.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": meta["param_groups"]})


def is_harmless(key: str, old: Any, new: Any) -> bool:
    """Fields that may change between a run and its resumption without changing its result."""
    if key != "config" or not isinstance(old, dict):
        return False
    free = {"checkpoint_minutes", "log_every", "monitor_every"}
    return all(old.get(name) == value for name, value in new.items() if name not in free)


def difference(old: Any, new: Any) -> str:
    """What changed between two values of a run, as a person reads it."""
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(
            f"{name}: {old.get(name)!r} then, {v!r} now" for name, v in new.items() if old.get(name) != v
        )
    return f"{old!r} then, {new!r} now"
