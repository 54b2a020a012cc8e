"""The batched augmentations against plain loops, and timm's through the same door."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vitnas.data import Augment
from vitnas.data.augment import Augmenter, seed_from, seeded_globals
from vitnas.data.images import Form
from vitnas.grids import ImageSize, as_image_size, sides_of


def form(size: ImageSize = 8, chans: int = 3) -> Form:
    """Normalisation that keeps pixels as they are, from 0 to 1."""
    return Form(
        image_size=size,
        in_chans=chans,
        mean=(0.0,) * chans,
        std=(1.0,) * chans,
        interpolation="bicubic",
        crop_pct=1.0,
    )


def noise(count: int, size: ImageSize = 8, chans: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, chans, *sides_of(size)), dtype=torch.uint8, generator=generator)


def apply(augment: Augment, images_BCHW: Tensor, seed: int = 0) -> Tensor:
    made = Augmenter(augment, form(as_image_size("size", images_BCHW.shape[2:]), images_BCHW.shape[1]))
    return made.batch(images_BCHW, torch.Generator().manual_seed(seed)) * 255


def shifted(image_CHW: Tensor, down: int, right: int, flip: bool) -> Tensor:
    """The plain way: a black canvas with the image in the middle, and a window on it."""
    chans, high, wide = image_CHW.shape
    canvas = torch.zeros(chans, 3 * high, 3 * wide, dtype=image_CHW.dtype)
    canvas[:, high : 2 * high, wide : 2 * wide] = image_CHW
    window = canvas[:, high + down : 2 * high + down, wide + right : 2 * wide + right]
    return window.flip(2) if flip else window


def test_nothing_by_default() -> None:
    images_BCHW = noise(4)
    torch.testing.assert_close(apply(Augment(), images_BCHW), images_BCHW.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "most"), [(8, (2, 2)), ((4, 12), (1, 3))], ids=str)
def test_shift_and_flip_are_whole_pixel_moves(size: ImageSize, most: tuple[int, int]) -> None:
    images_BCHW = noise(96, size)
    moved_BCHW = apply(Augment(shift=0.25, hflip=0.5), images_BCHW).round().to(torch.uint8)
    seen = set()
    for image_CHW, moved_CHW in zip(images_BCHW, moved_BCHW, strict=True):
        moves = [
            (down, right, flip)
            for down in range(-most[0], most[0] + 1)
            for right in range(-most[1], most[1] + 1)
            for flip in (False, True)
            if torch.equal(shifted(image_CHW, down, right, flip), moved_CHW)
        ]
        assert len(moves) == 1, "the image is not a shifted, perhaps mirrored, copy"
        seen.add(moves[0])
    assert {down for down, _, _ in seen} == set(range(-most[0], most[0] + 1))
    assert {right for _, right, _ in seen} == set(range(-most[1], most[1] + 1))
    assert {flip for _, _, flip in seen} == {False, True}


@pytest.mark.parametrize("size", [8, (4, 12)], ids=str)
def test_warping_by_nothing_equals_moving(size: ImageSize) -> None:
    """The same draws, once through the gather and once through the sampling grid."""
    images_BCHW = noise(32, size)
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


def test_a_turn_keeps_lengths_where_height_and_width_differ() -> None:
    """A square turned by any angle keeps its area, and a disk its place."""
    images_BCHW = torch.zeros(32, 1, 24, 72, dtype=torch.uint8)
    images_BCHW[:, :, 8:16, 32:40] = 255
    turned_BHW = apply(Augment(rotate=180.0), images_BCHW)[:, 0] / 255
    area_B, rows_B, columns_B = turned_BHW.sum((1, 2)), turned_BHW.sum(2), turned_BHW.sum(1)
    torch.testing.assert_close(area_B, torch.full((32,), 64.0), rtol=0.03, atol=0)
    for line_BL, side in ((rows_B, 24), (columns_B, 72)):  # as wide as it is high, within its diagonal
        spread_B = (line_BL * (torch.arange(side) - (side - 1) / 2) ** 2).sum(1) / area_B
        torch.testing.assert_close(spread_B, torch.full((32,), 5.25), rtol=0.1, atol=0)


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
@pytest.mark.parametrize("size", [16, (12, 20)], ids=str)
def test_timm_stages_give_images_of_the_right_size(augment: Augment, chans: int, size: ImageSize) -> None:
    made = Augmenter(augment, form(size, chans))
    image_HWC = noise(1, size, chans)[0].permute(1, 2, 0).contiguous().numpy()
    with seeded_globals(seed_from("test")):
        out = [made.per_image(image_HWC) for _ in range(20)]
    assert all((image.shape, image.dtype) == ((chans, *sides_of(size)), torch.uint8) for image in out)
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
