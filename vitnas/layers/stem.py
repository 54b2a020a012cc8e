"""Stems: from images to a grid of patch embeddings. `STEMS` maps an Arch's word to its class.

Every stem takes (B, C, H, W) images and gives (B, R, S, D) patches, has `set_input_size` as timm's `PatchEmbed`, and
says what it costs (memory without the images).

Shapes: B images, CHW image, R rows and S columns of patches, D embed_dim.
"""

from __future__ import annotations

import torch
from timm.layers import PatchEmbed, resample_patch_embed
from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.grids import Grid, size_text
from vitnas.layers.axes import Axes
from vitnas.layers.cost import LayerCost


class LinearStem(PatchEmbed):  # type: ignore[misc]  # timm leaves it untyped
    """One linear layer per patch (ViT): timm's `PatchEmbed`, with named axes."""

    first_conv = "proj"

    def __init__(
        self, image_size: Grid, patch_size: int, in_chans: int, dim: int, width: int = 0, *, bias: bool = True
    ) -> None:
        super().__init__(image_size, patch_size, in_chans, dim, output_fmt="NHWC", flatten=False, bias=bias)

    def axes(self) -> dict[str, Axes]:
        return conv_axes(self.proj, "proj", "in_chans", "dim")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, R, S, D)."""
        check_images(images_BCHW, self.img_size)
        patches_BRSD: Tensor = super().forward(images_BCHW)
        return patches_BRSD

    @staticmethod
    def cost(image_size: Grid, patch_size: int, in_chans: int, dim: int, width: int = 0) -> LayerCost:
        patches, kernel = _cells(image_size, patch_size), in_chans * patch_size**2
        return LayerCost(macs=patches * dim * kernel, params=dim * kernel + dim, memory=patches * dim)


class ConvStem(nn.Module):
    """Three 3x3 convolutions at half the resolution, the last two with a bypass, then one linear layer per patch.

    u1 = ReLU(BN(conv(images), stride 2)), u3 = two more such convolutions of u1 (stride 1), patches = projection of
    u1 + u3 with a kernel and stride of half the patch. Paper: ViT-ResNAS (arXiv 2109.00642, section 3), where the
    patch is 14 and the projection 7x7.
    """

    first_conv = "conv1"

    def __init__(self, image_size: Grid, patch_size: int, in_chans: int, dim: int, width: int) -> None:
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        self.conv1 = nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, dim, patch_size // 2, stride=patch_size // 2)

    def axes(self) -> dict[str, Axes]:
        axes = conv_axes(self.conv1, "conv1", "in_chans", "stem") | conv_axes(
            self.proj, "proj", "stem", "dim"
        )
        for index in (2, 3):
            axes |= conv_axes(self.get_submodule(f"conv{index}"), f"conv{index}", "stem", "stem")
        stem: Axes = (("stem", self.norm1.num_features),)
        for index in (1, 2, 3):
            axes |= {
                f"norm{index}.{name}": stem for name in ("weight", "bias", "running_mean", "running_var")
            }
        return axes

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, R, S, D)."""
        check_images(images_BCHW, self.image_size)
        first = x = torch.relu_(self.norm1(self.conv1(images_BCHW)))
        for conv, norm in ((self.conv2, self.norm2), (self.conv3, self.norm3)):
            x = conv(x)
            x = torch.relu_(norm(x))
        x = x + first
        del first  # the projection's output is large enough
        out_BDRS: Tensor = self.proj(x)
        return out_BDRS.permute(0, 2, 3, 1)

    def set_input_size(self, img_size: Grid, patch_size: int) -> None:
        """Take images and patches of other sizes; the projection is resampled as timm does for patches."""
        if patch_size != self.patch_size:
            old, side = self.proj, patch_size // 2
            self.proj = nn.Conv2d(old.in_channels, old.out_channels, side, stride=side).to(old.weight)
            with torch.no_grad():
                self.proj.weight.copy_(resample_patch_embed(old.weight, [side, side]))
                if self.proj.bias is not None and old.bias is not None:
                    self.proj.bias.copy_(old.bias)
        self.image_size, self.patch_size = img_size, patch_size

    @staticmethod
    def cost(image_size: Grid, patch_size: int, in_chans: int, dim: int, width: int) -> LayerCost:
        pixels, patches = _cells(image_size, 2), _cells(image_size, patch_size)
        convs, kernel = 9 * width * (in_chans + 2 * width), width * (patch_size // 2) ** 2
        return LayerCost(
            macs=pixels * convs + patches * dim * kernel,
            params=convs + 6 * width + dim * kernel + dim,
            # A convolution's output and its norm beside u1; then the patches beside u1 + u3.
            memory=max(3 * pixels * width, pixels * width + patches * dim),
        )


class PlainConvStem(nn.Module):
    """Three 3x3 convolutions in a row; the first ones halve the image, as many as the patch needs."""

    first_conv = "conv1"
    widths: tuple[int, int]  # channels behind the first and the second
    bias: bool
    memory_after: int  # peak elements of what follows a convolution, in units of its output

    def __init__(self, image_size: Grid, patch_size: int, in_chans: int, dim: int, width: int = 0) -> None:
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        sizes = (in_chans, *self.widths, dim)
        for index, stride in enumerate(strides(patch_size)):
            conv = nn.Conv2d(sizes[index], sizes[index + 1], 3, stride=stride, padding=1, bias=self.bias)
            self.add_module(f"conv{index + 1}", conv)

    def axes(self) -> dict[str, Axes]:
        names = ("in_chans", "stem_first", "stem_second", "dim")
        axes: dict[str, Axes] = {}
        for index in range(3):
            name = f"conv{index + 1}"
            axes |= conv_axes(self.get_submodule(name), name, names[index], names[index + 1])
        return axes

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, R, S, D)."""
        check_images(images_BCHW, self.image_size)
        x = images_BCHW
        for index in range(3):
            x = self.get_submodule(f"conv{index + 1}")(x)
            x = self.after(x)
        return x.permute(0, 2, 3, 1)

    def after(self, x_BCHW: Tensor) -> Tensor:
        """What follows each convolution."""
        raise NotImplementedError

    def set_input_size(self, img_size: Grid, patch_size: int) -> None:
        """Take images and patches of other sizes; the weights fit any."""
        self.image_size, self.patch_size = img_size, patch_size
        for index, stride in enumerate(strides(patch_size)):
            conv = self.get_submodule(f"conv{index + 1}")
            assert isinstance(conv, nn.Conv2d)
            conv.stride = (stride, stride)

    @classmethod
    def cost(cls, image_size: Grid, patch_size: int, in_chans: int, dim: int, width: int = 0) -> LayerCost:
        sizes, step, macs, params, memory, held = (in_chans, *cls.widths, dim), 1, 0, 0, 0, 0
        for index, stride in enumerate(strides(patch_size)):
            step *= stride
            pixels = _cells(image_size, step)
            kernel, out = 9 * sizes[index] * sizes[index + 1], pixels * sizes[index + 1]
            macs += pixels * kernel
            params += kernel + (sizes[index + 1] if cls.bias else 0)
            memory = max(memory, held + out, cls.memory_after * out)
            held = out
        return LayerCost(macs=macs, params=params, memory=memory)


class HybridStem(PlainConvStem):
    """The convolutions and nothing else: a linear map. Paper: Vision X-formers (arXiv 2107.02239), "Hybrid"."""

    widths, bias, memory_after = (32, 64), True, 1

    def after(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW


class CctStem(PlainConvStem):
    """Each convolution with ReLU and a 3x3 maximum of stride 1. Paper: Hassani et al., "Escaping the Big Data Paradigm
    with Compact Transformers" (arXiv 2104.05704), section 3.3, with the widths and strides of Vision X-formers."""

    widths, bias, memory_after = (64, 64), False, 4  # the maximum also gives its places, 64-bit integers

    def after(self, x_BCHW: Tensor) -> Tensor:
        return nn.functional.max_pool2d(torch.relu_(x_BCHW), 3, stride=1, padding=1)


STEMS: dict[str, type[LinearStem] | type[ConvStem] | type[PlainConvStem]] = {
    "linear": LinearStem,
    "conv": ConvStem,
    "hybrid": HybridStem,
    "cct": CctStem,
}


def strides(patch_size: int) -> tuple[int, int, int]:
    """Strides of three convolutions that together make one patch of 1, 2, 4 or 8 pixels."""
    halvings = patch_size.bit_length() - 1
    return tuple(2 if index < halvings else 1 for index in range(3))  # type: ignore[return-value]


def check_images(images_BCHW: Tensor, size: Grid) -> None:
    """Raise UserError for images of another size than the stem was made for."""
    if tuple(images_BCHW.shape[-2:]) != tuple(size):
        raise UserError(
            f"the images are {tuple(images_BCHW.shape[-2:])}; the model takes {size_text(size)} pixels. Resize them, "
            "or call set_input_size."
        )


def at_size(images_BCHW: Tensor, size: Grid, work_size: Grid) -> Tensor:
    """(B, C, H, W) images of `size`, resized to `work_size` by linear interpolation where that is another one."""
    if work_size == size:
        return images_BCHW
    check_images(images_BCHW, size)
    return nn.functional.interpolate(images_BCHW, work_size, mode="bilinear", align_corners=False)


def _cells(image_size: Grid, side: int) -> int:
    """Squares of `side` pixels in an image."""
    return (image_size[0] // side) * (image_size[1] // side)


def conv_axes(conv: nn.Module, name: str, inside: str, outside: str) -> dict[str, Axes]:
    """Axes of a convolution's weight and bias, whose channels are called `inside` and `outside`."""
    assert isinstance(conv, nn.Conv2d)
    out: Axes = ((outside, conv.out_channels),)
    kernel: Axes = (("patch_h", conv.kernel_size[0]), ("patch_w", conv.kernel_size[1]))
    axes = {f"{name}.weight": (*out, (inside, conv.in_channels), *kernel)}
    return axes | ({f"{name}.bias": out} if conv.bias is not None else {})
