"""The published ViTAS spaces, and the parametric one for any images."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from vitnas.errors import UserError
from vitnas.model import build
from vitnas.space import vitas

# size: patches, widest embedding, inner (q, k and v each) and MLP, slots, log10 of the number of nets
FACTS = {
    "1g": ((14, 16, 32), 384, 480, 1440, 16, 43.1),
    "1.3g": ((16,), 384, 480, 1440, 12, 32.2),
    "4.9g": ((14, 16, 32), 768, 960, 2880, 13, 35.3),
}


@pytest.mark.parametrize("size", FACTS)
def test_published_spaces(size: str) -> None:
    patches, dim, inner, hidden, slots, digits = FACTS[size]
    space = vitas(size)
    assert (space.patch_sizes, space.num_heads, space.num_slots) == (patches, (3, 6, 12, 16), slots)
    for widths, widest in ((space.embed_dims, dim), (space.inner_dims, inner), (space.mlp_hiddens, hidden)):
        assert widths == tuple(round(k / 10 * widest) for k in range(1, 11))
    assert space.identity == (size == "1g")
    assert space.attn_scale == "embed_dim"
    assert round(math.log10(space.size()), 1) == digits


@pytest.mark.parametrize(
    ("image_size", "options"),
    [
        (32, {"patch_sizes": (2, 4, 8), "num_slots": 3}),
        (8, {"patch_size": 1, "widest": (24, 36, 40), "ratios": (1 / 3, 2 / 3, 1), "num_heads": (2, 3)}),
        (48, {"patch_sizes": (6, 12, 16), "inner_dims": (12, 36), "mlp_hiddens": (5, 9), "shifted": False}),
    ],
)
def test_any_images_patches_widths_and_depth(image_size: int, options: dict[str, Any]) -> None:
    space = vitas("micro", image_size=image_size, num_classes=4, in_chans=1, **options)
    rng, seen = random.Random(0), set()
    for _ in range(12):
        arch = space.sample(rng)
        seen.add(arch.patch_size)
        with torch.no_grad():
            assert build(arch)(torch.zeros(1, 1, image_size, image_size)).shape == (1, 4)
    assert seen == set(space.patch_sizes)


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ("2g", {}, r"size is '2g'; vitas has 1g, 1\.3g, 4\.9g, mini, micro\. Nearest: '1g'"),
        ("1g", {"heads": (3,)}, r"the vitas space has no option 'heads'\. Nearest: 'num_heads'"),
        (
            "1g",
            {"ratios": (0.5, 1.2)},
            r"ratios is \(0\.5, 1\.2\); shares of the widest lie above 0 and up to 1",
        ),
        ("1g", {"ratios": (0.5, 0.3)}, r"embed_dims is \(192, 115\); options must be positive and rise"),
        ("1g", {"widest": (384, 480)}, r"widest is \(384, 480\); it must be three widths"),
        ("1g", {"widest": (384, 470, 1440)}, r"inner_dims has 47; it must be a multiple of every num_heads"),
        ("1g", {"image_size": 225}, r"patch_sizes has 14; it must divide image_size 225\. Nearest: 15"),
        ("micro", {"image_size": 8, "num_slots": 0}, r"num_slots is 0; a network has at least 1"),
    ],
)
def test_what_cannot_be_is_refused(size: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        vitas(size, **options)
