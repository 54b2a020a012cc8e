"""The Supernet's contract for the AutoFormer space, with the default and with the authors' sharing."""

from __future__ import annotations

import pytest
import torch

from vitnas.space import autoformer, mixer_space
from vitnas.supernet import AUTOFORMER_OFFICIAL, Supernet
from vitnas.testing import SupernetContract

SPACE = autoformer("micro", image_size=16, patch_size=4, num_classes=5, depths=(1, 2))


class TestPrefix(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(SPACE).eval()


class TestAutoFormerOfficial(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(SPACE, sharing=AUTOFORMER_OFFICIAL).eval()


class TestWithoutRelativePosition(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        space = autoformer(
            "micro",
            image_size=16,
            patch_size=4,
            num_classes=5,
            in_chans=1,
            relative_position=0,
            depths=(1, 2),
        )
        return Supernet(space).eval()


class TestMixers(SupernetContract):
    """Projections shared across mixers, everything else a mixer's own; stems and positions too."""

    num_random = 6

    @pytest.fixture
    def supernet(self) -> Supernet:
        space = mixer_space(
            "micro",
            image_size=16,
            patch_size=4,
            num_classes=5,
            embed_dims=(16, 24),
            depths=(1, 2),
            num_heads=(1, 2),
            head_dim=8,
            stems=("linear", "hybrid", "cct"),
        )
        return Supernet(space).eval()


@pytest.mark.parametrize("positions", [("none", "learned"), ("rotary", "learned", "rotary_2d")])
def test_every_kind_of_positions_has_its_parts(positions: tuple[str, ...]) -> None:
    """Wherever in the list learned positions stand, the Supernet has a table of them."""
    space = mixer_space(
        "micro",
        image_size=16,
        num_classes=3,
        mixers=("softmax", "fourier"),
        depths=(1, 2),
        stems=("linear",),
        positions=positions,
    )
    supernet = Supernet(space).eval()
    for option in range(len(positions)):
        genes = [n - 1 for n in space.num_options]
        genes[1] = option
        assert supernet(torch.zeros(1, 3, 16, 16), space.decode(genes)).shape == (1, 3)
