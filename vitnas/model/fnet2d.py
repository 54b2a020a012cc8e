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


class FNet2d(nn.Module):
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
        self.num_classes, self.num_features = num_classes, dim
        self.patch_embed = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, padding=1), nn.Conv2d(dim // 2, dim, 3, padding=1)
        )
        self.blocks = nn.Sequential(*(FourierBlock(dim, hidden, dropout) for _ in range(depth)))
        self.head: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.pretrained_cfg: dict[str, Any] = {
            "architecture": "vix_fnet2d",
            "num_classes": num_classes,
            "input_size": (in_chans, img_size, img_size),
            "mean": (0.5,) * in_chans,
            "std": (0.5,) * in_chans,
            "first_conv": "patch_embed.0",
            "classifier": "head",
        }
        self.default_cfg = self.pretrained_cfg

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, Y) logits."""
        return self.forward_head(self.forward_features(images_BCHW))

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to a (B, D, H, W) map."""
        features: Tensor = self.blocks(self.patch_embed(images_BCHW))
        return features

    def forward_head(self, x_BDHW: Tensor, pre_logits: bool = False) -> Tensor:
        """A map to (B, Y) logits, or to (B, D) pooled features."""
        pooled = x_BDHW.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0: none)."""
        like = next(self.parameters())
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()


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
