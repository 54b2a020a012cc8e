"""Several crops of each image, varied apart: what self-distillation learns from.

Source: DINO (arXiv 2104.14294, section 3.1 and appendix C), as EsViT (arXiv 2106.09785) takes it: two large crops and
some small ones, each mirrored, its colours jittered or taken out, blurred; the second is sometimes solarized.

All of it runs on whole batches, with numbers drawn per image: torchvision's functions take one factor for a batch, and
calling them image by image takes longer than a small network's step. Where images lie in memory at their final size,
crops are cut and resized in one bilinear sampling; else by Pillow, image by image. Brightness, saturation, hue and grey
are one matrix per image, which keeps them exact; hue turns around the grey axis (YIQ) instead of going by HSV.

Legend: B images, C channels, H rows, W columns, S the rows or columns of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vitnas.data.images import Form
from vitnas.data.sources import Pixels, from_pil, to_pil
from vitnas.errors import UserError
from vitnas.grids import Grid, ImageSize, sides_of

LUMA = (0.299, 0.587, 0.114)  # what grey is made of
TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))
TRIES = 10  # of a box, as in torchvision's random resized crop
BLUR_SIDE, BLUR_SIGMA = 224, (0.1, 2.0)  # DINO's blur is for crops of that side; others have it by their size
LEAST_BLUR = 0.5  # pixels; less than that changes nothing


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Which crops, and how they are varied.

    The `global_number` first are of the images' own size and of `global_scale` of their area, the others of
    `local_size` and `local_scale`. `color_jitter` is of brightness, contrast, saturation and hue. `blur` and `solarize`
    are the chances of the first, the second and every other crop.
    """

    local_number: int
    local_size: ImageSize
    global_number: int = 2
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    color_jitter_prob: float = 0.8
    grayscale_prob: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)

    def __post_init__(self) -> None:
        for name in ("global_scale", "local_scale", "ratio"):
            low, high = getattr(self, name)
            most = 1.0 if name != "ratio" else math.inf
            if not 0 < low <= high <= most:
                raise UserError(
                    f"{name} is {[low, high]}; it must be two rising numbers above 0"
                    f"{' and at most 1, shares of the area' if most == 1 else ''}. Give the lower one first."
                )
        if self.local_number < 0 or self.global_number < 1:
            raise UserError(
                f"there are {self.global_number} global and {self.local_number} local crops; at least one global crop "
                "is needed, and none can be fewer than 0. Raise them."
            )


class Cropper:
    """Makes the crops of a batch: float32, normalised, a tensor per crop.

    Args:
        fixed: the images lie in memory at their final size; else they come whole, one by one.
    """

    def __init__(self, crops: Crops, form: Form, *, fixed: bool) -> None:
        self.crops, self.form = crops, form
        self.needs_pil = self.needs_whole = self.needs_globals = not fixed
        whole, small = sides_of(form.image_size), sides_of(crops.local_size)
        self.sizes: list[Grid] = [whole] * crops.global_number + [small] * crops.local_number
        self.scales = [crops.global_scale] * crops.global_number + [crops.local_scale] * crops.local_number

    def per_image(self, pixels_HWC: Pixels) -> tuple[Tensor, ...]:
        """Cut and resize the crops of one image; uint8 CHW. Draws from the global generator."""
        image = to_pil(pixels_HWC)
        return tuple(
            self._cut(image, _boxes(1, image.size[::-1], scale, self.crops.ratio, None), size)
            for scale, size in zip(self.scales, self.sizes, strict=True)
        )

    def _cut(self, image: Image.Image, boxes_4B: Tensor, size: Grid) -> Tensor:
        top, left, height, width = boxes_4B[:, 0].tolist()
        how = Image.Resampling.BILINEAR if self.form.interpolation == "bilinear" else Image.Resampling.BICUBIC
        cut = image.resize(size[::-1], how, box=(left, top, left + width, top + height))
        return torch.from_numpy(from_pil(cut)).permute(2, 0, 1)

    def stack(self, images: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `per_image` gave, as batches."""
        return tuple(torch.stack(crop) for crop in zip(*images, strict=True))

    def batch(self, given: Tensor | tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """The crops of whole uint8 images BCHW, or of what `stack` gave."""
        made = []
        for number, (scale, size) in enumerate(zip(self.scales, self.sizes, strict=True)):
            if isinstance(given, Tensor):
                boxes_4B = _boxes(len(given), given.shape[2:], scale, self.crops.ratio, generator)
                x_BCHW = _sample(given, boxes_4B, size)
            else:
                x_BCHW = given[number].float()
            made.append(self.form.normalise(self._vary(x_BCHW, min(number, 2), generator)))
        return tuple(made)

    def _vary(self, x_BCHW: Tensor, which: int, generator: torch.Generator) -> Tensor:
        """Mirror, colours, blur and solarize; 0 to 255."""
        crops, count = self.crops, len(x_BCHW)
        mirrored_B, jittered_B, grey_B, blurred_B, solar_B = (
            torch.rand(count, generator=generator) < chance
            for chance in (
                crops.hflip,
                crops.color_jitter_prob,
                crops.grayscale_prob,
                crops.blur[which],
                crops.solarize[which],
            )
        )
        draws_4B = torch.rand(4, count, generator=generator) * 2 - 1
        strength_41 = torch.tensor(crops.color_jitter)[:, None]
        x_BCHW = torch.where(mirrored_B[:, None, None, None], x_BCHW.flip(3), x_BCHW)
        x_BCHW = recolour(x_BCHW, draws_4B * strength_41 * jittered_B, grey_B)
        low, high = BLUR_SIGMA
        share_B = torch.rand(count, generator=generator)
        if blurred_B.any():
            side = min(x_BCHW.shape[2:])
            most = max(LEAST_BLUR, high * side / BLUR_SIDE)
            sigma_B = low + share_B[blurred_B] * (most - low)
            x_BCHW[blurred_B] = blur(x_BCHW[blurred_B], sigma_B, radius=max(1, side // 20))
        return torch.where(solar_B[:, None, None, None] & (x_BCHW >= 128), 255 - x_BCHW, x_BCHW)


def _boxes(
    count: int,
    sides: Sequence[int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator | None,
) -> Tensor:
    """(4, B) top, left, height and width of random boxes in an image, as torchvision's random resized crop has."""
    height, width = sides
    draws_3TB = torch.rand(3, TRIES, count, generator=generator)
    low, high = (math.log(side) for side in ratio)
    area_TB = height * width * (scale[0] + draws_3TB[0] * (scale[1] - scale[0]))
    aspect_TB = torch.exp(low + draws_3TB[1] * (high - low))
    down_TB, across_TB = ((area_TB / aspect_TB).sqrt().round(), (area_TB * aspect_TB).sqrt().round())
    fits_TB = (down_TB <= height) & (across_TB <= width)
    first_1B = fits_TB.int().argmax(0, keepdim=True)
    down_B = down_TB.gather(0, first_1B)[0].clamp(1, height)
    across_B = across_TB.gather(0, first_1B)[0].clamp(1, width)
    top_B = (draws_3TB[2, 0] * (height - down_B + 1)).floor()
    left_B = (torch.rand(count, generator=generator) * (width - across_B + 1)).floor()
    return torch.stack([top_B, left_B, down_B, across_B])


def _sample(images_BCHW: Tensor, boxes_4B: Tensor, size: Grid) -> Tensor:
    """The boxes of uint8 images, resized bilinearly. float 0 to 255."""
    lines = []
    for start_B, length_B, side, new in zip(
        boxes_4B[:2], boxes_4B[2:], images_BCHW.shape[2:], size, strict=True
    ):
        place_BS = start_B[:, None] + (torch.arange(new) + 0.5) * (length_B / new)[:, None]
        lines.append(place_BS * 2 / side - 1)
    grid_BSS2 = torch.stack(
        [lines[1][:, None, :].expand(-1, size[0], -1), lines[0][:, :, None].expand(-1, -1, size[1])], dim=-1
    )
    return functional.grid_sample(
        images_BCHW.float(), grid_BSS2, mode="bilinear", padding_mode="border", align_corners=False
    )


def recolour(x_BCHW: Tensor, change_4B: Tensor, grey_B: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue changed per image, or without colour. 0 to 255 in and out.

    Args:
        change_4B: what is added to a factor of 1, of hue to 0 (in turns).
    """
    bright_B, contrast_B, colour_B = (1 + change_4B[:3]).clamp_min(0)
    channels = x_BCHW.shape[1]
    if channels == 1:
        x_BCHW = x_BCHW * bright_B[:, None, None, None]
        luma_B = x_BCHW.mean((1, 2, 3))
    else:
        matrix_B33 = _turn(change_4B[3])
        luma_3 = torch.tensor(LUMA)
        colour_B11 = torch.where(grey_B, 0.0, colour_B)[:, None, None]
        # Saturation, then hue; both leave grey as it is, so contrast may come last.
        matrix_B33 = matrix_B33 * colour_B11 + (1 - colour_B11) * luma_3
        matrix_B33 = matrix_B33 * bright_B[:, None, None]
        luma_B = bright_B * sum(w * x_BCHW[:, c].mean((1, 2)) for c, w in enumerate(LUMA))
        # Sums written out: a matrix product may round differently with another number of threads.
        first, second, third = (matrix_B33[:, :, c, None, None] * x_BCHW[:, c, None] for c in range(3))
        x_BCHW = first + second + third
    contrast_B111 = contrast_B[:, None, None, None]
    return (x_BCHW * contrast_B111 + (1 - contrast_B111) * luma_B[:, None, None, None]).clamp_(0, 255)


def _turn(hue_B: Tensor) -> Tensor:
    """(B, 3, 3) turns of colours around the grey axis."""
    to_33 = torch.tensor(TO_YIQ, dtype=torch.float64)
    back_33 = torch.linalg.inv(to_33)
    angle_B = hue_B.double() * -2 * math.pi  # red to green, as by HSV
    cos_B11, sin_B11 = angle_B.cos()[:, None, None], angle_B.sin()[:, None, None]
    y, i, q = (back_33[:, [c]] for c in range(3))
    luma, first, second = (to_33[[c]] for c in range(3))
    turned = (i * first + q * second) * cos_B11 + (q * first - i * second) * sin_B11
    return (y * luma + turned).float()


def blur(x_BCHW: Tensor, sigma_B: Tensor, *, radius: int) -> Tensor:
    """Gaussian blur, each image by its own sigma (pixels), edges reflected."""
    steps = torch.arange(-radius, radius + 1)
    weight_BK = torch.exp(-(steps**2) / (2 * sigma_B[:, None] ** 2))
    weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
    for dim in (2, 3):
        edge = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        wide, side = functional.pad(x_BCHW, edge, mode="reflect"), x_BCHW.shape[dim]
        x_BCHW = torch.zeros_like(x_BCHW)
        for step in range(2 * radius + 1):
            x_BCHW.addcmul_(wide.narrow(dim, step, side), weight_BK[:, step, None, None, None])
    return x_BCHW
