"""DataConfig and Augment refuse bad values where they are made, each in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from vitnas.data import AUGMENTS, Augment, DataConfig
from vitnas.data.config import augment_for
from vitnas.errors import UserError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image_size": 0},
            r"image_size is 0; it must be a whole number of at least 1, or two of them",
        ),
        ({"image_size": (32, 0)}, r"image_size is \(32, 0\); it must be a whole number"),
        ({"image_size": (8, 8, 3)}, r"image_size is \(8, 8, 3\); it must be a whole number"),
        ({"max_images": -3}, r"max_images is -3; it must be at least 1"),
        ({"batch_size": 1}, r"batch_size is 1; it must be at least 2"),
        ({"workers": -1}, r"workers is -1; it must be 0 .* or more"),
        ({"holdout": 0}, r"holdout is 0; it must be a share between 0 and 1 or a whole number"),
        ({"holdout": 1.0}, r"holdout is 1\.0; it must be a share between 0 and 1"),
        ({"in_chans": 2}, r"in_chans is 2; it must be 1 \(grey\) or 3 \(colour\)"),
        ({"on_corrupt": "skipp"}, r"on_corrupt is 'skipp'; it must be 'skip' or 'raise'.* Nearest: 'skip'"),
        ({"interpolation": "bicubik"}, r"interpolation is 'bicubik'; .* Nearest: 'bicubic'"),
        ({"crop_pct": 1.5}, r"crop_pct is 1\.5; it must be from 0\.1 to 1"),
        ({"augment": "weka"}, r"augment is 'weka'; it must be one of auto, none, .* Nearest: 'weak'"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hflip": 1.5}, r"augment\.hflip is 1\.5; it must be from 0 to 1"),
        ({"shift": 0.6}, r"augment\.shift is 0\.6; it must be from 0 to 0\.5"),
        ({"rotate": -1.0}, r"augment\.rotate is -1\.0; it must be from 0 to 180"),
        ({"mixup": -0.1}, r"augment\.mixup is -0\.1; it must be from 0"),
        ({"zoom": (1.2, 0.8)}, r"augment\.zoom is \(1\.2, 0\.8\); it must be two rising numbers"),
        ({"scale": (0.0, 1.0)}, r"augment\.scale is \(0\.0, 1\.0\); it must be two rising numbers"),
        ({"re_mode": "pixle"}, r"augment\.re_mode is 'pixle'; .* Nearest: 'pixel'"),
        (
            {"auto_augment": "randm9"},
            r"augment\.auto_augment is 'randm9'; timm knows strings that start with",
        ),
    ],
)
def test_augment_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Augment(**fields)


def test_auto_augment_goes_by_the_images() -> None:
    assert augment_for("auto", image_size=8, in_chans=1) == AUGMENTS["digits"]
    assert augment_for("auto", image_size=32, in_chans=3) == AUGMENTS["weak"]
    assert augment_for("auto", image_size=224, in_chans=3) == AUGMENTS["strong"]
    assert augment_for("none", image_size=224, in_chans=3) == Augment()
    own = Augment(hflip=0.3)
    assert augment_for(own, image_size=224, in_chans=3) is own
