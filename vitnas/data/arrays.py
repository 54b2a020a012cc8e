"""Images and targets that are in memory, as sources have them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from vitnas.data.config import LabelKind
from vitnas.data.sources import Numbers, Pixels, Target, numbers_in
from vitnas.errors import UserError


def as_pixels(images: Any, what: str) -> Pixels:
    """uint8 NHWC.

    Raises:
        UserError: they are not 8-bit, or have other channels.
    """
    array = images.numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise UserError(
            f"{what} are {array.dtype} with {array.ndim} axes; they must be uint8, NHWC, NCHW or NHW. "
            "Convert them."
        )
    if array.ndim == 3:
        array = array[:, :, :, None]
    elif array.shape[3] not in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.shape[3] not in (1, 3):
        raise UserError(f"{what} have shape {array.shape}; 1 or 3 channels are needed. Drop the others.")
    return np.ascontiguousarray(array)


def width_of(target: Target) -> int:
    """How many names a target asks for."""
    return len(target.values) if isinstance(target, Numbers) else max(numbers_in([target]), default=-1) + 1


def _measured_of(rows: list[Any], count: int) -> list[Target]:
    found = [tuple(map(float, row)) if isinstance(row, list | tuple) else (float(row),) for row in rows]
    if len(found) != count or len({len(row) for row in found}) != 1 or not np.isfinite(found).all():
        raise UserError(
            f"There are {len(found)} targets for {count} images; each image needs the same finite numbers, (N,) or "
            "(N, T). Correct them."
        )
    return [Numbers(row) for row in found]


def as_targets(targets: Any, count: int, kind: LabelKind) -> list[Target]:
    """One per image, of the kind that is asked for.

    Raises:
        UserError: there are others, or not so many.
    """
    rows = targets.tolist() if hasattr(targets, "tolist") else list(targets)
    if kind == "numbers":
        return _measured_of(rows, count)
    if any(isinstance(row, float) and not row.is_integer() for row in rows):
        raise UserError(
            "The targets have fractions; classes are numbered from 0 up. Round them, or give config="
            "DataConfig(label_kind='numbers') for numbers that are to be told."
        )
    labels: list[Target] = []
    if rows and all(isinstance(row, list | tuple) and {*row} <= {0, 1} for row in rows):
        labels += [tuple(number for number, has in enumerate(row) if has) for row in rows]
    elif not any(isinstance(row, list | tuple) for row in rows):
        labels += [int(target) for target in rows]
    if len(labels) != count or not labels or min(numbers_in(labels), default=0) < 0:
        raise UserError(
            f"There are {len(labels)} targets for {count} images; one class number from 0 up is needed per "
            "image, or (N, Y) of 0 and 1."
        )
    return labels
