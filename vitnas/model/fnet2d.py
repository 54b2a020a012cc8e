"""FNet2D of Vision X-formers (arXiv 2107.02239, code): Fourier mixing on the map, batch norm and 1x1 convolutions.

x + mlp(bn(Re FFT(x over rows, columns, channels))), five times, on a map made by two 3x3 convolutions without anything
between; then the mean and a linear layer. No Arch can say it: it has maps instead of tokens and batch norms.

Shapes: B images, CHW image or map, Y classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.mixers.fourier import real_transform
from vitnas.mixers.mixer import in_full_precision
from vitnas.model.map_network import MapNetwork
from vitnas.model.official import read_checkpoint


class FourierBlock(nn.Module):
    """x + mlp(bn(Re FFT(x)))."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.act, self.drop = nn.GELU(), nn.Dropout(dropout)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        mixed_BHWC = in_full_precision(lambda x: real_transform(x, (1, 2, 3)), x_BCHW.permute(0, 2, 3, 1))
        out_BCHW = self.fc1(self.norm(mixed_BHWC.permute(0, 3, 1, 2)))
        return x_BCHW + self.drop(self.fc2(self.drop(self.act(out_BCHW))))


class FNet2d(MapNetwork):
    """The network. It takes images of any size."""

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        dim: int = 128,
        depth: int = 5,
        hidden: int = 256,
        dropout: float = 0.0,
        img_size: int = 32,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, padding=1), nn.Conv2d(dim // 2, dim, 3, padding=1)
        )
        self.blocks = nn.Sequential(*(FourierBlock(dim, hidden, dropout) for _ in range(depth)))
        size = (in_chans, img_size, img_size)
        self.end("vix_fnet2d", dim, num_classes, size, first_conv="patch_embed.0")

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.patch_embed(images_BCHW))
        return features


OFFICIAL = {"ff.0": "norm", "ff.1.net.0": "fc1", "ff.1.net.3": "fc2"}


def load_fnet2d(source: str | Path | Mapping[str, Tensor], **sizes: Any) -> FNet2d:
    """The network with the authors' weights, in evaluation mode."""
    weights = {}
    for name, tensor in read_checkpoint(source).items():
        stem, _, leaf = name.rpartition(".")
        if stem.startswith("layers."):
            _, index, inner = stem.split(".", 2)
            stem = f"blocks.{index}.{OFFICIAL[inner]}"
        else:
            stem = stem.replace("conv.", "patch_embed.").replace("pool.2", "head")
        weights[f"{stem}.{leaf}"] = tensor
    with torch.device("meta"):
        model = FNet2d(**sizes)
    model = model.to_empty(device="cpu")
    model.load_state_dict(weights)
    return model.eval()
