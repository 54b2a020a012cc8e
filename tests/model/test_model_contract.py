"""The Model's contract for several Archs: plain, relative, without class token, with unequal blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vitnas.arch import Arch, Block, Stage
from vitnas.model import Model, build
from vitnas.testing import ModelContract

PLAIN = Arch(
    image_size=16,
    patch_size=4,
    num_classes=5,
    stages=(
        Stage(
            embed_dim=32,
            blocks=(
                Block(num_heads=2, head_dim=16, mlp_hidden=64),
                Block(num_heads=2, head_dim=16, mlp_hidden=64),
            ),
        ),
    ),
)
UNEQUAL = Stage(
    embed_dim=24,
    blocks=(
        Block(num_heads=1, head_dim=16, mlp_hidden=40),
        Block(num_heads=3, head_dim=16, mlp_hidden=17),
        Block(num_heads=2, head_dim=8, mlp_hidden=64),
    ),
)


def made(arch: Arch) -> Model:
    return build(arch, generator=torch.Generator().manual_seed(0)).eval()


class TestPlain(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(PLAIN)


class TestAutoFormerLike(ModelContract):
    """Mean pooling with a class token: the token takes part through attention."""

    @pytest.fixture
    def model(self) -> Model:
        return made(replace(PLAIN, stages=(UNEQUAL,), relative_position=2, global_pool="avg", in_chans=1))


class TestMeanPooled(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(replace(PLAIN, class_token=False, global_pool="avg", fc_norm=True, position="none"))


class TestRelativeWithoutClassToken(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(
            replace(PLAIN, class_token=False, global_pool="avg", position="none", relative_position=14)
        )
