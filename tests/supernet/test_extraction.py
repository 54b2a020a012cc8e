"""Extraction gives the bits that were scored, for every Space and every way of sharing weights."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from supernet_help import ODD_WIDTHS

from vitnas.extraction import extract
from vitnas.space import Space, autoformer, mixer_space, unified, vit_resnas, vitas
from vitnas.supernet import AUTOFORMER_OFFICIAL, Sharing, Supernet, make_sharing
from vitnas.testing import randomize_
from vitnas.train import evaluate

SIZES = {"image_size": 32, "num_classes": 10}
SPACES: dict[str, Callable[[], Space]] = {
    "autoformer": lambda: autoformer("micro", patch_size=4, **SIZES),
    "mixers": lambda: mixer_space("micro", patch_size=4, stems=("linear", "hybrid", "cct"), **SIZES),
    "vit_resnas": lambda: vit_resnas("micro", patch_size=4, patch_head=True, **SIZES),
    "vit_resnas conv": lambda: vit_resnas("micro", patch_size=4, reduction="conv", **SIZES),
    "unified": lambda: unified("micro", depths=(2, 1), scales=(0.5, 1.0), patch_sizes=(4, 8), **SIZES),
    "vitas": lambda: vitas("micro", **SIZES),
    "vitas of odd widths": lambda: ODD_WIDTHS,
}
SHARINGS: dict[str, Callable[[Space], Sharing]] = {
    "prefix": lambda space: make_sharing(space),
    "bilateral": lambda space: make_sharing(space, "bilateral"),
    "autoformer official": lambda space: AUTOFORMER_OFFICIAL,
    "cyclic": lambda space: make_sharing(space, "cyclic", private_tokens=True),
    "private": lambda space: make_sharing(space, "bilateral", private_tokens=True, private_heads=True),
}
PAIRS = [
    *((space, sharing) for space in SPACES for sharing in ("prefix", "bilateral")),
    ("autoformer", "autoformer official"),
    *((space, sharing) for space in SPACES for sharing in ("cyclic", "private") if space.startswith("vitas")),
]


def differing(space: str, sharing: str, archs: int) -> list[str]:
    """Ids of those of `archs` random Archs whose Model answers otherwise than the Supernet, in any bit."""
    made = SPACES[space]()
    supernet = Supernet(made, sharing=SHARINGS[sharing](made)).eval()
    randomize_(supernet, torch.Generator().manual_seed(0))
    size = made.largest().input_size
    batches = [torch.randn(n, *size, generator=torch.Generator().manual_seed(n)) for n in (1, 5)]
    rng, found = random.Random(0), []
    with torch.no_grad():
        for _ in range(archs):
            arch = made.sample(rng)
            model = extract(supernet, arch)
            if not all(torch.equal(model(images), supernet(images, arch)) for images in batches):
                found.append(arch.id)
    return found


@pytest.mark.parametrize(("space", "sharing"), PAIRS)
def test_a_few_archs(space: str, sharing: str) -> None:
    assert differing(space, sharing, 3) == []


@pytest.mark.slow
@pytest.mark.parametrize(("space", "sharing"), PAIRS)
def test_many_archs(space: str, sharing: str) -> None:
    assert differing(space, sharing, 60) == []


def test_what_was_scored_is_what_is_extracted() -> None:
    space = SPACES["mixers"]()
    supernet = Supernet(space)
    randomize_(supernet, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(n, 3, 32, 32, generator=generator), torch.randint(0, 10, (n,), generator=generator))
        for n in (7, 4)
    ]
    rng = random.Random(1)
    for arch in (space.sample(rng) for _ in range(5)):
        assert evaluate(supernet, batches, arch) == evaluate(extract(supernet, arch), batches)
