"""The Supernet's contract for the AutoFormer space, with the default and with the authors' sharing."""

from __future__ import annotations

import pytest
import torch

from vitnas.space import UnifiedSpace, UnifiedStage, autoformer, mixer_space
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


class TestUnified(SupernetContract):
    """Stems, grids and numbers of stages that have tensors of their own, and a mixer with weights per patch."""

    num_random = 6

    @pytest.fixture
    def supernet(self) -> Supernet:
        stages = tuple(
            UnifiedStage(
                depth=depth,
                embed_dims=dims,
                num_heads=(1, 2),
                head_dim=8,
                mlp_ratios=(1.0,),
                mixers=("token_mlp", "long_short"),
                mixer_sizes=(("token_mlp", 4), ("long_short", 2)),
            )
            for depth, dims in ((2, (12, 16)), (1, (16, 20)))
        )
        space = UnifiedSpace(
            image_size=16,
            num_classes=5,
            stems=("linear", "conv", "hybrid", "cct"),
            patch_sizes=(2, 4),
            work_sizes=(8, 16),
            positions=("rotary", "learned"),
            reductions=("patch",),
            num_stages=(1, 2),
            stages=stages,
            stem_width=4,
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
