"""What is written beside the weights: how to prepare images, what the classes are called, which Arch it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.version import VERSION


def describe(
    model: nn.Module,
    images: Tensor,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What a user of the file needs to know, as ONNX metadata: text, or JSON as text.

    Raises:
        UserError: the number of class names is not the number of classes.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = {**config, **(data_config or {})}
    values: dict[str, Any] = {
        name: config[name]
        for name in ("mean", "std", "interpolation", "crop_pct")
        if config.get(name) is not None
    }
    values["input_size"] = list(images.shape[1:])
    arch = getattr(model, "arch", None)
    if arch is not None and hasattr(arch, "to_json"):
        values["arch"], values["arch_id"] = arch.to_json(), arch.id
    if class_names is not None:
        check_class_names(model, class_names)
        values["class_names"] = list(class_names)
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return {"vitnas_version": VERSION, **text}


def check_class_names(model: nn.Module, class_names: Sequence[str]) -> None:
    """Raise UserError unless there is one name per class of the model's classifier."""
    num_classes = getattr(model, "num_classes", None)
    if num_classes is not None and len(class_names) != num_classes:
        raise UserError(
            f"{len(class_names)} class names are given; the model has {num_classes} classes. Give one name per class."
        )
