"""`as_data(images)`: images of a library's user, in whatever form they come, as Data.

Legend: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vitnas.data.config import DataConfig
from vitnas.data.images import RAM_BYTES, has_labels
from vitnas.data.open import IMAGENET, Constants, Data, open_data
from vitnas.errors import UserError

Given: TypeAlias = Data | str | Path | Tensor | np.ndarray | Iterable[Any]
SLACK = 2.0  # of 255 levels by which rounding may leave the range of pixels


def as_data(images: Given, config: DataConfig | None = None, *, constants: Constants = IMAGENET) -> Data:
    """Images for a search or a slimming, out of what is at hand.

    Args:
        images: Data as it is; a dataset string or a folder; an array or tensor of images, uint8 (N, C, H, W) or
            (N, H, W, C), or float (N, C, H, W); or an iterable of such tensors, of single images (C, H, W), or of pairs
            of them and their class numbers, as a DataLoader gives. Floats are taken as a network takes them, normalised
            by `constants`, and kept as the 8-bit pixels that they come from. An iterable is read once, into memory.
        config: holdout, augment and the rest, for all but Data; its mean and std come before `constants`.
        constants: mean and std of the network that will see the images.

    Raises:
        UserError: nothing of these, images of several shapes, floats that are not normalised so, or too many.
    """
    if isinstance(images, Data):
        return images
    config = config or DataConfig()
    if isinstance(images, str | Path):
        named = replace(config, dataset=str(images))
        return open_data(replace(named, mean=config.mean or constants[0], std=config.std or constants[1]))
    if isinstance(images, Tensor | np.ndarray):
        pixels, targets = torch.as_tensor(images), None
    else:
        pixels, targets = _gathered(images)
    mean, std = config.mean or constants[0], config.std or constants[1]
    if pixels.dtype.is_floating_point:
        config = replace(config, mean=tuple(mean), std=tuple(std))
        pixels = _as_bytes(pixels, tuple(mean), tuple(std))
    elif pixels.dim() == 4 and 3 in (pixels.shape[1], pixels.shape[3]):
        config = replace(config, mean=tuple(mean), std=tuple(std))
    return Data.from_arrays(train=(pixels, targets), config=config, name="images")


def _gathered(images: Iterable[Any]) -> tuple[Tensor, Tensor | None]:
    """All images of an iterable in one tensor, and their class numbers if each came with one."""
    pixels: list[Tensor] = []
    targets: list[Tensor] = []
    taken = 0
    try:
        for item in images:
            image, target = item[:2] if isinstance(item, tuple | list) else (item, None)
            batch = torch.as_tensor(image)
            pixels.append(batch if batch.dim() == 4 else batch[None])
            if target is not None and has_labels(
                target := torch.as_tensor(target).reshape(len(pixels[-1]), -1).squeeze(1)
            ):
                targets.append(target)
            taken += pixels[-1].nbytes
            if taken > RAM_BYTES:
                raise UserError(
                    f"images go on beyond {RAM_BYTES >> 30} GiB; an iterable is kept in memory. Give fewer, or their "
                    "folder."
                )
        if pixels:
            return torch.cat(pixels), torch.cat(targets) if len(targets) == len(pixels) else None
        reason = "none came"
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:160]
    raise UserError(
        f"images cannot be read ({reason}); they must be Data, a folder, a dataset string, a tensor (N, C, H, W), or "
        "an iterable of tensors of one size. Give one of these."
    )


def _as_bytes(images_NCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised images as the pixels they were made of; the inverse of `Form.normalise`."""
    if images_NCHW.dim() != 4 or images_NCHW.shape[1] != len(mean):
        raise UserError(
            f"the images have shape {tuple(images_NCHW.shape)}; float images must be (N, C, H, W) with {len(mean)} "
            f"channels, for which mean and std are known. Reshape them, or give a DataConfig with mean and std."
        )
    scale_C11, shift_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    pixels_NCHW = images_NCHW.float().mul(scale_C11).add_(shift_C11).mul_(255)
    low, high = (float(end) for end in pixels_NCHW.aminmax())
    if not (low >= -SLACK and high <= 255 + SLACK):
        raise UserError(
            f"the images go from {low / 255:.2f} to {high / 255:.2f} without their mean {mean} and std {std}; float "
            "images must be normalised by these, from pixels of 0 to 1. Normalise them so, or give uint8 images."
        )
    return pixels_NCHW.round_().clamp_(0, 255).to(torch.uint8)
