"""Varying train images: shifts, flips, small turns and zooms on whole uint8 batches, the rest by timm on PIL.

Legend: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional

from vitnas.data.config import Augment
from vitnas.data.images import Form
from vitnas.data.sources import Pixels, from_pil, to_pil
from vitnas.grids import sides_of


class Augmenter:
    """Applies an Augment: `per_image` (timm, on PIL, only when `needs_pil`), then `batch`."""

    def __init__(self, augment: Augment, form: Form) -> None:
        self.augment = augment
        self.form = form
        self.shifts = tuple(round(augment.shift * side) for side in sides_of(form.image_size))  # down, right
        self.needs_whole = augment.scale is not None
        self.needs_pil = self.needs_whole or augment.color_jitter > 0 or bool(augment.auto_augment)
        self.needs_globals = self.needs_pil or augment.re_prob > 0
        self._stages: list[Callable[[Any], Any]] = _timm_stages(augment, form) if self.needs_pil else []
        self._erase = RandomErasing(augment.re_prob, mode=augment.re_mode, device="cpu")

    def per_image(self, pixels_HWC: Pixels) -> Tensor:
        """Apply timm's crops and colours; uint8 HWC in, uint8 CHW out. Draws from the global RNGs."""
        image = to_pil(pixels_HWC)
        if self.augment.auto_augment and image.mode == "L":  # timm's operations fill with colours
            image = image.convert("RGB")
        for stage in self._stages:
            image = stage(image)
        image = image.convert("L") if self.form.in_chans == 1 else image
        return torch.from_numpy(from_pil(image)).permute(2, 0, 1)

    def stack(self, images: Sequence[Tensor]) -> Tensor:
        """What `per_image` gave, as a batch."""
        return torch.stack([*images])

    def batch(self, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Shift, turn, zoom, flip, normalise and erase a uint8 batch; float32 BCHW out."""
        if self.augment.rotate or self.augment.zoom != (1.0, 1.0):
            images_BCHW = self._warp(images_BCHW, generator)
        elif any(self.shifts) or self.augment.hflip:
            images_BCHW = self._move(images_BCHW, generator)
        images_BCHW = self.form.normalise(images_BCHW)
        if self.augment.re_prob:
            images_BCHW = self._erase(images_BCHW)
        return images_BCHW

    def _draw_moves(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Whole-pixel moves down and right, and which images to mirror."""
        down_B, right_B = (
            torch.randint(-shift, shift + 1, (count,), generator=generator) for shift in self.shifts
        )
        flip_B = torch.rand(count, generator=generator) < self.augment.hflip
        return down_B, right_B, flip_B

    def _move(self, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Pad with black, then take each image's window (mirrored or not) in one gather."""
        count, (height, width), (below, beside) = len(images_BCHW), images_BCHW.shape[2:], self.shifts
        down_B, right_B, flip_B = self._draw_moves(count, generator)
        line_W = torch.arange(width)
        columns_BW = torch.where(flip_B[:, None], line_W.flip(0), line_W) + right_B[:, None] + beside
        rows_BH = torch.arange(height) + down_B[:, None] + below
        padded_BCHW = functional.pad(images_BCHW, (beside, beside, below, below))
        at_BHW = rows_BH[:, :, None] * padded_BCHW.shape[3] + columns_BW[:, None, :]
        at_BCn = at_BHW.reshape(count, 1, -1).expand(-1, images_BCHW.shape[1], -1)
        # A gather is three times faster here than indexing with two index tensors.
        return padded_BCHW.flatten(2).gather(2, at_BCn).view_as(images_BCHW)

    def _warp(self, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Turn, zoom, shift and mirror by bilinear sampling; black outside. float 0 to 255.

        The sampling grid is written out instead of `affine_grid`, whose matrix product may round differently
        with another number of threads.
        """
        count, _, height, width = images_BCHW.shape
        down_B, right_B, flip_B = self._draw_moves(count, generator)
        draws_2B = torch.rand(2, count, generator=generator)
        angle_B = (draws_2B[0] * 2 - 1) * math.radians(self.augment.rotate)
        low, high = self.augment.zoom
        step_B = 1 / (low + draws_2B[1] * (high - low))
        cos_B11, sin_B11 = (angle_B.cos() * step_B)[:, None, None], (angle_B.sin() * step_B)[:, None, None]
        # Pixel centres from -1 to 1; a turn mixes both axes, so it must know how long each is.
        y_H, x_W = ((torch.arange(side) * 2 + 1) / side - 1 for side in (height, width))
        mirror_B11 = torch.where(flip_B, -1.0, 1.0)[:, None, None]
        x_B1W, y_BH1, shape = x_W[None, None, :] * mirror_B11, y_H[None, :, None], height / width
        grid_x_BHW = x_B1W * cos_B11 - y_BH1 * shape * sin_B11 + (right_B * 2 / width)[:, None, None]
        grid_y_BHW = x_B1W / shape * sin_B11 + y_BH1 * cos_B11 + (down_B * 2 / height)[:, None, None]
        grid_BHW2 = torch.stack([grid_x_BHW, grid_y_BHW], dim=-1)
        return functional.grid_sample(images_BCHW.float(), grid_BHW2, align_corners=False)


def _timm_stages(augment: Augment, form: Form) -> list[Callable[[Any], Any]]:
    """timm's crop and colour stages, without its tensor stage, which `Augmenter.batch` does."""
    crop, colour, _ = create_transform(
        form.input_size,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=0.0,  # done on the batch
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=form.interpolation,
        mean=form.mean if form.in_chans == 3 else form.mean * 3,
        std=form.std if form.in_chans == 3 else form.std * 3,
        separate=True,
    )
    for stage in colour.transforms:
        _keep_a_bit(stage)
    return [crop, colour] if augment.scale is not None else [colour]


def _keep_a_bit(stage: Any) -> None:
    """Keep timm's posterize from leaving 0 bits: its top magnitude asks for that, and Pillow 12 and up refuse it."""
    policies = [op for policy in getattr(stage, "policy", []) for op in policy]
    for op in [*policies, *getattr(stage, "ops", [])]:
        if getattr(op.aug_fn, "__name__", "") == "posterize":
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, max(1, bits_to_keep))


def seed_from(*parts: object) -> int:
    """Return a 63-bit seed that depends on `parts` only, the same in every process and Python version."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators and restore them after: timm's transforms use them."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed would also seed the accelerators for good
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(cpu)
