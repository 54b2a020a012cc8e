"""Small Models that the export tests share."""

from __future__ import annotations

from typing import TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitnas.arch import Arch, Block, Stage
from vitnas.model import Model, build
from vitnas.testing import randomize_

ModelT = TypeVar("ModelT", bound=nn.Module)


def tiny_model(*, relative_position: int = 2) -> Model:
    """Two unequal blocks on 16 px images, AutoFormer's kind, every parameter random (nothing at 0 or 1)."""
    blocks = (Block(num_heads=2, head_dim=8, mlp_hidden=40), Block(num_heads=3, head_dim=8, mlp_hidden=24))
    arch = Arch(
        image_size=16,
        patch_size=4,
        num_classes=4,
        stages=(Stage(embed_dim=24, blocks=blocks),),
        relative_position=relative_position,
    )
    return randomize(build(arch))


def staged_model() -> Model:
    """Two stages on 32 px images, ViT-ResNAS's kind, with a patch head, every parameter and statistic random."""
    block = Block(num_heads=2, head_dim=8, mlp_hidden=40)
    arch = Arch(
        image_size=32,
        patch_size=4,
        num_classes=4,
        stages=(Stage(embed_dim=24, blocks=(block,)), Stage(embed_dim=40, blocks=(block,))),
        stem="conv",
        stem_width=6,
        patch_head=True,
    )
    model = build(arch)
    randomize_(model, torch.Generator().manual_seed(0))
    return model.eval()


def tiny_timm() -> VisionTransformer:
    """A ViT of timm's own class on 16 px images."""
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=4)
    return randomize(model)


def randomize(model: ModelT) -> ModelT:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def images(n: int, size: int = 16) -> torch.Tensor:
    """Noise that stands for real images."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
