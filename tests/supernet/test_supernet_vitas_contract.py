"""The Supernet's contract for the ViTAS space, with every way of sharing and several of them together."""

from __future__ import annotations

import pytest
from supernet_help import ODD_WIDTHS

from vitnas.space import autoformer, vitas
from vitnas.supernet import PRIVATE_HEADS, PRIVATE_TOKENS, Bilateral, Cyclic, Sharing, Supernet, make_sharing
from vitnas.testing import SupernetContract


class TestPrefix(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(ODD_WIDTHS).eval()


class TestBilateral(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(ODD_WIDTHS, sharing=Sharing(Bilateral())).eval()


class TestCyclic(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(ODD_WIDTHS, sharing=make_sharing(ODD_WIDTHS, "cyclic")).eval()


class TestPrivate(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(ODD_WIDTHS, sharing=Sharing(private=(PRIVATE_TOKENS, PRIVATE_HEADS))).eval()


class TestPrivateHeadsBilateral(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(ODD_WIDTHS, sharing=Sharing(Bilateral(), private=(PRIVATE_HEADS,))).eval()


class TestAllAtOnceInSlots(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        space = vitas(**SPACE_OPTIONS, shifted=False)
        sharing = Sharing(
            Bilateral(), {"dim": Cyclic(space.embed_dims)}, private=(PRIVATE_TOKENS, PRIVATE_HEADS)
        )
        return Supernet(space, sharing=sharing).eval()


class TestBilateralAutoFormer(SupernetContract):
    """Sharing is told by axis, so it serves any Space."""

    @pytest.fixture
    def supernet(self) -> Supernet:
        space = autoformer("micro", image_size=16, patch_size=4, num_classes=5, depths=(1, 2))
        return Supernet(space, sharing=Sharing(Bilateral())).eval()


SPACE_OPTIONS = {
    "size": "micro", "image_size": 8, "num_classes": 5, "in_chans": 3, "num_slots": 2, "ratios": (0.5, 1.0),
    "widest": (12, 16, 20), "patch_sizes": (2, 4),
}  # fmt: skip
