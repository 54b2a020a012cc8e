"""The Space's contract for the AutoFormer spaces, and for one small enough to count by hand."""

from __future__ import annotations

from typing import ClassVar

import pytest

from vitnas.space import Space, autoformer, mixer_space
from vitnas.testing import SpaceContract


class TestTiny(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return autoformer("tiny")


class TestMicro(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return autoformer("micro", image_size=32, patch_size=4, num_classes=10, in_chans=1)


class TestCountable(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return autoformer(
            "tiny",
            image_size=32,
            embed_dims=(64, 96),
            depths=(1, 2, 4),
            num_heads=(1, 2),
            mlp_ratios=(1.0, 1.5, 2.0),
            relative_position=0,
        )


class TestMixers(SpaceContract):
    """A mixer with fewer multiply-accumulates may own more weights and hold more at once."""

    quantities: ClassVar[tuple[str, ...]] = ("macs",)

    @pytest.fixture
    def space(self) -> Space:
        return mixer_space("micro", image_size=32, patch_size=4)


class TestMixersCountable(SpaceContract):
    quantities: ClassVar[tuple[str, ...]] = ("macs",)

    @pytest.fixture
    def space(self) -> Space:
        return mixer_space(
            "micro",
            image_size=8,
            patch_size=2,
            mixers=("softmax", "fourier", "token_mlp"),
            embed_dims=(16,),
            depths=(1, 2),
            num_heads=(1, 2),
            mlp_ratios=(1.0, 2.0),
            positions=("none", "rotary"),
        )
