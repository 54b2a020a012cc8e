"""The Supernet's contract where the patches kept are genes: a selection's weights go by the slot of its block."""

from __future__ import annotations

import pytest

from vitnas.space import StageSpace, autoformer, mixer_space, vit_resnas, vitas
from vitnas.supernet import Supernet
from vitnas.testing import SupernetContract

KEEP = (1.0, 0.7, 0.5)
SMALL = {"image_size": 16, "num_classes": 5, "keep": KEEP}


class TestPredictor(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(autoformer("micro", patch_size=4, depths=(2, 3), keep_places=(1, 2), **SMALL)).eval()


class TestFixed(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        space = mixer_space(
            "micro",
            patch_size=4,
            depths=(2, 3),
            mixers=("softmax", "performer"),
            stems=("linear",),
            positions=("learned",),
            keep_places=(0, 2),
            selector="fixed",
            **SMALL,
        )
        return Supernet(space).eval()


class TestAttention(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        stage = StageSpace(depth=1, embed_dims=(8, 16), num_heads=(1, 2), head_dim=8, mlp_hidden=(16,))
        last = StageSpace(
            depth=3,
            embed_dims=(16, 24),
            num_heads=(1, 2),
            head_dim=8,
            mlp_hidden=(16, 24),
            skip=((1, 0.5), (2, 0.5)),
        )
        space = vit_resnas(
            "micro", patch_size=2, stages=(stage, last), keep_places=(1, 2), selector="attention", **SMALL
        )
        return Supernet(space).eval()


class TestSlotIndexed(SupernetContract):
    """A selection may stand in front of every slot, and there are two patch sizes."""

    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(vitas("micro", shifted=False, num_slots=3, keep_places=(0, 1), **SMALL)).eval()
