"""What is written beside the weights: how to prepare images, what the classes are called, which Arch it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vitnas.data.images import Form
from vitnas.errors import UserError
from vitnas.exporting.pixels import KERNELS
from vitnas.grids import as_image_size
from vitnas.model.timm_cfg import DATA_KEYS, SCALE, SEVERAL, knows_images
from vitnas.version import VERSION

TENSORS = "float images (batch, channels, height, width), normalised"
PIXELS = "uint8 images (batch, height, width, channels) of any height and width"


def describe(
    model: nn.Module,
    input_size: Sequence[int],
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    *,
    takes: str = TENSORS,
) -> dict[str, str]:
    """What a user of the file needs to know, as ONNX metadata: text, or JSON as text.

    Args:
        input_size: channels, height and width of the images that the network takes.
        takes: what the file takes.

    Raises:
        UserError: the number of class names is not the number of classes.
    """
    values: dict[str, Any] = {**images_of(model, data_config), "input_size": list(input_size), "input": takes}
    arch = getattr(model, "arch", None)
    if arch is not None and hasattr(arch, "to_json"):
        values["arch"], values["arch_id"] = arch.to_json(), arch.id
    if (classes := getattr(model, "num_classes", None)) is not None:
        values["num_classes"] = int(classes)
    if (getattr(model, "pretrained_cfg", None) or {}).get(SEVERAL):
        values[SEVERAL] = True
    if scale := (getattr(model, "pretrained_cfg", None) or {}).get(SCALE):
        values[SCALE] = scale
    if names := names_of(model, class_names):
        values["class_names"] = names
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return {"vitnas_version": VERSION, **text}


def images_of(model: nn.Module, data_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How images are prepared for `model`, by DATA_KEYS; nothing that is not known."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    known = cfg if knows_images(cfg) else {}
    config = {**known, **(data_config or {})}
    return {name: config[name] for name in DATA_KEYS if config.get(name) is not None}


def names_of(model: nn.Module, class_names: Sequence[str] | None = None) -> list[str]:
    """The names of a model's classes: those given, or else those that it brings; none if it has none.

    Raises:
        UserError: the number of class names is not the number of classes.
    """
    if class_names is None:
        cfg, classes = getattr(model, "pretrained_cfg", None) or {}, getattr(model, "num_classes", None)
        own = cfg.get("label_names") or ()
        return [str(name) for name in own] if len(own) == classes else []
    check_class_names(model, class_names)
    return [str(name) for name in class_names]


def form_of(
    model: nn.Module, input_size: Sequence[int], data_config: Mapping[str, Any] | None = None
) -> Form:
    """How images are prepared for `model`, in full.

    Raises:
        UserError: that is not known.
    """
    found = {"crop_mode": "center", **images_of(model, data_config)}
    if missing := [name for name in DATA_KEYS if name not in found]:
        raise UserError(
            f"{', '.join(missing)} of this {type(model).__name__}'s images are not known; they must be prepared as in "
            "training. Train it on vitnas.TrainBatches, or give data_config with them."
        )
    channels, *sides = input_size
    constants = {name: tuple(float(value) for value in found[name]) for name in ("mean", "std")}
    if {len(values) for values in constants.values()} != {channels}:
        raise UserError(
            f"mean and std are {constants['mean']} and {constants['std']} for images of {channels} channels; each "
            "channel has one. Correct data_config."
        )
    return Form(
        image_size=as_image_size("size", tuple(sides)),
        in_chans=channels,
        mean=constants["mean"],
        std=constants["std"],
        interpolation=found["interpolation"],
        crop_pct=float(found["crop_pct"]),
        crop_mode=found["crop_mode"],
    )


def prepared_inside(form: Form) -> Form:
    """`form`, where a file can prepare images so.

    Raises:
        UserError: it cannot.
    """
    words = {"crop_mode": ("center", "squash"), "interpolation": ("nearest", *KERNELS)}
    for name, known in words.items():
        if (value := getattr(form, name)) not in known:
            raise UserError(
                f"{name} of the images is {value!r}; a file that prepares images knows {', '.join(known)}. Export the "
                "file that takes prepared images."
            )
    return form


def check_class_names(model: nn.Module, class_names: Sequence[str]) -> None:
    """Raise UserError unless there is one name per class of the model's classifier."""
    num_classes = getattr(model, "num_classes", None)
    if num_classes is not None and len(class_names) != num_classes:
        raise UserError(
            f"{len(class_names)} class names are given; the model has {num_classes} classes. Give one name per class."
        )
