"""The LeViT- and CvT-like networks of Vision X-formers (arXiv 2107.02239, code): maps, 1x1 convolutions, no tokens.

`levin`, `levip` and `levit`: three convolutions, then four blocks without any normalisation. `cvn`, `cvp` and `cvt`:
three stages of a convolution, a norm over channels and one or two pre-norm blocks. Letters say the mixer: n Nystrom,
p Performer, t softmax. No positions; the mean over the map and a linear layer at the end. No Arch can say them: their
stages keep the grid, their norms are none or divide by the deviation plus epsilon.

Differs from the authors' code: the side of the map is not fixed at 32, so any image size works. `projection="conv"`
gives CvT's convolutional projections back (`conv_projection.py`), which the authors left out; names and counts are
those of the linear ones.

Shapes: B images, CHW image or map, N = H x W tokens, Y classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.layers.axes import Axes
from vitnas.mixers import MIXERS
from vitnas.model.build import initialize
from vitnas.model.conv_projection import Projection, mixed, projected
from vitnas.model.map_network import MapNetwork


class ChannelNorm(nn.Module):
    """(x - mean) / (deviation + eps) over the channels of a map, with a weight and a bias per channel."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def axes(self) -> dict[str, Axes]:
        dim: Axes = (("dim", len(self.weight)),)
        return {"weight": dim, "bias": dim}

    def forward(self, x_BCHW: Tensor) -> Tensor:
        centred = x_BCHW - x_BCHW.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        flat = variance == 0  # where channels are all equal, the root has no gradient: none goes through it
        deviation = variance.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)
        return centred / (deviation + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]


class MapBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), on a map."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, norms: bool) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(dim) if norms else nn.Identity()
        self.attn = mixer
        self.norm2 = ChannelNorm(dim) if norms else nn.Identity()
        self.fc1, self.act, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW + mixed(self.attn, self.norm1(x_BCHW))
        return x_BCHW + self.fc2(self.act(self.fc1(self.norm2(x_BCHW))))


class ConvXformer(MapNetwork):
    """Convolutions, blocks, more convolutions and blocks.

    Args:
        stages: per stage the (channels, stride) of its convolutions and its number of blocks.
        projection: "linear", or "conv" for CvT's convolutions in front of queries, keys and values.
        kv_stride: of those convolutions for keys and values.
    """

    def __init__(
        self,
        name: str,
        mixer: str,
        stages: Sequence[tuple[Sequence[tuple[int, int]], int]],
        *,
        norms: bool,
        num_classes: int = 200,
        in_chans: int = 3,
        heads: int = 4,
        hidden: int = 256,
        size: int | None = None,
        projection: Projection = "linear",
        kv_stride: int = 1,
        img_size: int = 64,
    ) -> None:
        super().__init__()
        kind: Any = MIXERS[mixer]
        dim, layers = in_chans, list[nn.Module]()
        for convs, depth in stages:
            for out, stride in convs:
                layers.append(nn.Conv2d(dim, out, 3, stride=stride, padding=1))
                dim = out
            layers += [ChannelNorm(dim)] if norms else []
            for _ in range(depth):
                made = kind(dim, heads, size=size, qkv_bias=mixer == "performer", num_prefix_tokens=0)
                layers.append(MapBlock(dim, projected(made, projection, kv_stride), hidden, norms))
        self.layers = nn.Sequential(*layers)
        self.end(name, dim, num_classes, (in_chans, img_size, img_size), first_conv="layers.0")
        if not next(self.parameters()).is_meta:
            initialize(self)

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        features: Tensor = self.layers(images_BCHW)
        return features


LETTERS: dict[str, tuple[str, int | None]] = {
    "n": ("nystrom", 64),
    "p": ("performer", None),
    "t": ("softmax", None),
}


def levi(letter: str, **options: Any) -> ConvXformer:
    """`levin`, `levip` or `levit`."""
    mixer, size = LETTERS[letter]
    stages = [(((32, 2), (64, 1), (128, 1)), 4)]
    return ConvXformer(f"vix_levi{letter}", mixer, stages, norms=False, size=size, **options)


def cv(letter: str, **options: Any) -> ConvXformer:
    """`cvn`, `cvp` or `cvt`."""
    mixer, size = LETTERS[letter]
    stages = [(((128, 2),), 1), (((128, 1),), 1), (((128, 1),), 2)]
    return ConvXformer(f"vix_cv{letter}", mixer, stages, norms=True, size=size, **options)
