"""The Space's contract for ViTAS spaces: published, shifted, slot-indexed, without identity, and one to count by
hand."""

from __future__ import annotations

import pytest

from vitnas.space import Space, vitas
from vitnas.testing import SpaceContract


class TestShifted(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return vitas("micro", image_size=8, num_classes=10, in_chans=1)


class TestSlotIndexed(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return vitas("micro", image_size=8, num_classes=10, in_chans=1, shifted=False, num_slots=8)


class TestWithoutIdentity(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return vitas("mini", image_size=32, num_classes=10, identity=False, num_slots=3)


class TestPublished(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return vitas("1g")


class TestCountable(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return vitas(
            "micro",
            image_size=8,
            num_slots=3,
            widest=(32, 32, 32),
            ratios=(0.5, 1.0),
            num_heads=(2,),
            patch_size=2,
        )
