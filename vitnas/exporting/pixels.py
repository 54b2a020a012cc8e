"""Preparing images inside a network: pixels of any height and width in, what the network takes out.

Pillow resizes by weights per row and per column. Both are matrices that follow from the sizes, so resizing is two
matrix products with rounding in between, which any runtime has, in any operator set; cropping is to leave rows out.

Legend: B images, H rows, W columns, C channels of the images given; h rows, w columns of those that the network takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.data.images import Form
from vitnas.grids import sides_of
from vitnas.measure.convert import model_device, model_dtype
from vitnas.model.scale import Scale, scale_of
from vitnas.model.timm_cfg import SCALE, SEVERAL

CHOICES = ("softmax", "sigmoid", "numbers", "none")  # what makes probabilities, or numbers, of logits


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _bicubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).to(x.dtype)


def _sinc(x: Tensor) -> Tensor:
    turned = x * math.pi
    return torch.where(
        x == 0, torch.ones_like(x), turned.sin() / torch.where(x == 0, torch.ones_like(x), turned)
    )


def _hamming(x: Tensor) -> Tensor:
    inside = _sinc(x) * (0.54 + 0.46 * (x * math.pi).cos())
    return torch.where(x.abs() < 1, inside, torch.zeros_like(x))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, _sinc(x) * _sinc(x / 3), torch.zeros_like(x))


# Pillow's filters, of the distance between two pixels in pixels of the coarser image (Resample.c).
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": _bilinear,
    "bicubic": _bicubic,
    "box": _box,
    "hamming": _hamming,
    "lanczos": _lanczos,
}


class Prepare(nn.Module):
    """Resize, crop and normalise as the evaluation transforms of `form` do, within one of 255 levels.

    (B, H, W, C) uint8 images become (B, C, h, w) float32. Images that have the final size already are not resized.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("mean", torch.tensor(form.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(form.std).view(-1, 1, 1), persistent=False)

    def forward(self, images_BHWC: Tensor) -> Tensor:
        device, lengths = images_BHWC.device, images_BHWC.shape[1:3]
        places = [torch.arange(length, device=device) for length in lengths]
        # Lengths as tensors: as numbers an exporter would take them for constants.
        sides = [each[-1] + 1 for each in places]
        ways = zip(places, sides, self._resized(sides), sides_of(self.form.image_size), strict=True)
        rows_hH, columns_wW = (self._weights(*each) for each in ways)
        pixels_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
        pixels_BCHw = _levels(pixels_BCHW @ columns_wW.T)  # columns first, as Pillow
        pixels_BChw = _levels(rows_hH @ pixels_BCHw)
        return (pixels_BChw / 255 - self.mean) / self.std

    def _resized(self, sides: list[Tensor]) -> list[Tensor]:
        """Height and width before the crop, as torchvision and timm have them."""
        final, (high, wide), (height, width) = sides_of(self.form.image_size), self.form.keep_sides, sides
        if self.form.crop_mode == "squash":
            resized = [torch.full_like(height, high), torch.full_like(width, wide)]
        elif high == wide:
            short = torch.minimum(height, width)
            resized = [torch.div(high * side, short, rounding_mode="floor") for side in sides]
        else:
            by_height = height * wide <= width * high
            resized = [
                torch.where(by_height, high, (height * wide / width).round().long()),
                torch.where(by_height, (width * high / height).round().long(), wide),
            ]
        same = (height == final[0]) & (width == final[1])
        return [torch.where(same, own, side) for own, side in zip(final, resized, strict=True)]

    def _weights(self, places: Tensor, length: Tensor, resized: Tensor, final: int) -> Tensor:
        """(final, length) weights of the pixels of a side for each of those that stay of it after the crop."""
        first = ((resized - final) / 2).round().long()
        kept = torch.arange(final, device=places.device) + first
        if self.form.interpolation == "nearest":
            nearest = torch.div((2 * kept + 1) * length, 2 * resized, rounding_mode="floor")
            return (places[None] == nearest[:, None]).float()
        # Distances are ratios of whole numbers, so that no rounding depends on how large the images are.
        apart = (2 * places + 1)[None] * resized - ((2 * kept + 1) * length)[:, None]
        weights = KERNELS[self.form.interpolation](
            apart.float() / (2 * torch.maximum(length, resized)).float()
        )
        return weights / weights.sum(1, keepdim=True)


def _levels(pixels: Tensor) -> Tensor:
    """Rounded to the 256 levels that Pillow keeps."""
    return (pixels + 0.5).floor().clamp(0, 255)


class Choose(nn.Module):
    """Probabilities of logits, or numbers in units of theirs."""

    def __init__(self, choice: str, scale: Scale | None = None) -> None:
        super().__init__()
        assert choice in CHOICES
        assert (choice == "numbers") == (scale is not None)
        self.choice, self.scale = choice, scale

    @classmethod
    def of(cls, model: nn.Module) -> Choose:
        """What makes an answer of what `model` gives."""
        return cls(choice_of(model), scale_of(model) if choice_of(model) == "numbers" else None)

    def forward(self, logits_BY: Tensor) -> Tensor:
        if self.choice == "none":
            return logits_BY
        if self.scale is not None:
            return self.scale.restored(logits_BY)
        return logits_BY.sigmoid() if self.choice == "sigmoid" else logits_BY.softmax(1)


class Ready(nn.Module):
    """Pixels of images in, probabilities out: what is prepared, the network, what is chosen."""

    def __init__(self, model: nn.Module, form: Form) -> None:
        super().__init__()
        self.model, self.choose = model, Choose.of(model)
        self.prepare = Prepare(form).to(model_device(model))
        self.dtype = model_dtype(model)

    def forward(self, images_BHWC: Tensor) -> Tensor:
        logits_BY: Tensor = self.model(self.prepare(images_BHWC).to(self.dtype))
        return self.choose(logits_BY.float())


class Answering(nn.Module):
    """Prepared images in, what the network says as people read it out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.choose = model, Choose.of(model)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.choose(self.model(images_BCHW).float())


def choice_of(model: nn.Module) -> str:
    """What makes an answer of what `model` gives: features stay as they are."""
    if not getattr(model, "num_classes", True):
        return "none"
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get(SCALE):
        return "numbers"
    return "sigmoid" if cfg.get(SEVERAL) else "softmax"


def pixels_of(images_BCHW: Tensor, form: Form) -> Tensor:
    """(B, H, W, C) uint8: what normalised images were made of."""
    scale, shift = (
        torch.tensor(values, device=images_BCHW.device).view(-1, 1, 1) for values in (form.std, form.mean)
    )
    levels_BCHW = images_BCHW.float().mul(scale).add(shift).mul(255).round().clamp(0, 255)
    return levels_BCHW.permute(0, 2, 3, 1).to(torch.uint8)


def other_size(images_BHWC: Tensor) -> Tensor:
    """The same images of other sides, neither of which is the network's own."""
    return images_BHWC.repeat_interleave(2, 1).repeat_interleave(3, 2).contiguous()
