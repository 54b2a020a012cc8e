"""The batched augmentations against plain loops, and timm's through the same door."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitnas.data import Augment
from vitnas.data.augment import Augmenter, seed_from, seeded_globals
from vitnas.data.images import Form


def form(size: int = 8, chans: int = 3) -> Form:
    """Normalisation that keeps pixels as they are, from 0 to 1."""
    return Form(
        image_size=size,
        in_chans=chans,
        mean=(0.0,) * chans,
        std=(1.0,) * chans,
        interpolation="bicubic",
        crop_pct=1.0,
    )


def noise(count: int, size: int = 8, chans: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, chans, size, size), dtype=torch.uint8, generator=generator)


def apply(augment: Augment, images_BCHW: Tensor, seed: int = 0) -> Tensor:
    made = Augmenter(augment, form(images_BCHW.shape[-1], images_BCHW.shape[1]))
    return made.batch(images_BCHW, torch.Generator().manual_seed(seed)) * 255


def shifted(image_CHW: Tensor, down: int, right: int, flip: bool) -> Tensor:
    """The plain way: a black canvas with the image in the middle, and a window on it."""
    size = image_CHW.shape[-1]
    canvas = torch.zeros(image_CHW.shape[0], 3 * size, 3 * size, dtype=image_CHW.dtype)
    canvas[:, size : 2 * size, size : 2 * size] = image_CHW
    window = canvas[:, size + down : 2 * size + down, size + right : 2 * size + right]
    return window.flip(2) if flip else window


def test_nothing_by_default() -> None:
    images_BCHW = noise(4)
    torch.testing.assert_close(apply(Augment(), images_BCHW), images_BCHW.float(), rtol=0, atol=1e-4)


def test_shift_and_flip_are_whole_pixel_moves() -> None:
    images_BCHW = noise(64)
    moved_BCHW = apply(Augment(shift=0.25, hflip=0.5), images_BCHW).round().to(torch.uint8)
    seen = set()
    for image_CHW, moved_CHW in zip(images_BCHW, moved_BCHW, strict=True):
        moves = [
            (down, right, flip)
            for down in range(-2, 3)
            for right in range(-2, 3)
            for flip in (False, True)
            if torch.equal(shifted(image_CHW, down, right, flip), moved_CHW)
        ]
        assert len(moves) == 1, "the image is not a shifted, perhaps mirrored, copy"
        seen.add(moves[0])
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == {-2, -1, 0, 1, 2}
    assert {flip for _, _, flip in seen} == {False, True}


def test_warping_by_nothing_equals_moving() -> None:
    """The same draws, once through the gather and once through the sampling grid."""
    images_BCHW = noise(32)
    moved = apply(Augment(shift=0.25, hflip=0.5), images_BCHW)
    warped = apply(Augment(shift=0.25, hflip=0.5, rotate=1e-6), images_BCHW)
    torch.testing.assert_close(warped, moved, rtol=0, atol=0.05)


def test_rotation_turns_about_the_centre() -> None:
    """A bar turned by up to 90 degrees keeps its centre and lies at the drawn angle."""
    size = 33
    images_BCHW = torch.zeros(16, 1, size, size, dtype=torch.uint8)
    images_BCHW[:, :, 16, 8:25] = 255
    turned_BHW = apply(Augment(rotate=90.0), images_BCHW)[:, 0]
    offsets = torch.arange(size) - 16.0
    angles = []
    for turned in turned_BHW:
        assert turned[16, 16] > 200
        xx, xy = (turned * offsets**2).sum(), (turned * offsets * offsets[:, None]).sum()
        yy = (turned * offsets[:, None] ** 2).sum()
        angles.append(math.degrees(0.5 * math.atan2(2 * xy, xx - yy)))
    assert max(angles) - min(angles) > 60


def test_zoom_magnifies() -> None:
    images_BCHW = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    images_BCHW[:, :, 12:20, 12:20] = 255
    area = float((apply(Augment(zoom=(2.0, 2.0)), images_BCHW) > 127).sum())
    assert area == pytest.approx(256, abs=40)


def test_random_erasing_is_timms() -> None:
    images_BCHW = noise(32, size=16)
    with seeded_globals(0):
        erased = apply(Augment(re_prob=1.0, re_mode="const"), images_BCHW)
    assert (erased == 0).all(1).flatten(1).any(1).all()


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(scale=(0.3, 1.0)),
        Augment(color_jitter=0.4),
        Augment(auto_augment="rand-m9-mstd0.5-inc1"),
        Augment(auto_augment="augmix-m5-w4-d2"),
        Augment(auto_augment="original-mstd0.5"),
        Augment(auto_augment="3a"),
    ],
    ids=["crop", "jitter", "rand", "augmix", "original", "3a"],
)
def test_timm_stages_give_images_of_the_right_size(augment: Augment, chans: int) -> None:
    made = Augmenter(augment, form(16, chans))
    image_HWC = noise(1, 16, chans)[0].permute(1, 2, 0).contiguous().numpy()
    with seeded_globals(seed_from("test")):
        out = [made.per_image(image_HWC) for _ in range(20)]
    assert all((image.shape, image.dtype) == ((chans, 16, 16), torch.uint8) for image in out)
    assert any(not torch.equal(image, out[0]) for image in out)


def test_posterize_at_its_strongest_keeps_a_bit() -> None:
    """timm asks Pillow for 0 bits there, which Pillow refuses."""
    made = Augmenter(Augment(auto_augment="rand-m10-inc1-n8"), form(16))
    image_HWC = noise(1, 16)[0].permute(1, 2, 0).contiguous().numpy()
    with seeded_globals(0):
        for _ in range(40):
            made.per_image(image_HWC)


def test_seeds_depend_on_every_part() -> None:
    assert seed_from("a", 1, 2) == seed_from("a", 1, 2)
    assert len({seed_from("a", 1, 2), seed_from("a", 1, 3), seed_from("b", 1, 2), seed_from("a", 12)}) == 4
