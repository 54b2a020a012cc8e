"""Crops of images: what they show, that they come again, and that colours are torchvision's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from vitnas.data import DataConfig, TrainBatches, open_data, synthetic
from vitnas.data.crops import Cropper, Crops, blur, recolour
from vitnas.data.images import Form
from vitnas.errors import UserError

CROPS = Crops(local_number=3, local_size=8)
PLAIN = {
    "hflip": 0.0,
    "color_jitter_prob": 0.0,
    "grayscale_prob": 0.0,
    "blur": (0.0,) * 3,
    "solarize": (0.0,) * 3,
}


def form(size: int = 16, channels: int = 3) -> Form:
    ones = (1.0,) * channels
    return Form(
        image_size=size,
        in_chans=channels,
        mean=(0.0,) * channels,
        std=ones,
        interpolation="bilinear",
        crop_pct=1.0,
    )


def made(images: torch.Tensor, crops: Crops, seed: int = 0) -> tuple[torch.Tensor, ...]:
    cropper = Cropper(crops, form(images.shape[-1], images.shape[1]), fixed=True)
    return cropper.batch(images, torch.Generator().manual_seed(seed))


def pictures(count: int = 64, channels: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def folder(path: Path) -> Path:
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, size=(20 + number, 30, 3), dtype=np.uint8)
        (path / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / "images" / f"{number}.png")
    return path / "images"


@pytest.mark.parametrize("whole", [False, True])
def test_a_batch_comes_again_bit_for_bit(tmp_path: Path, whole: bool) -> None:
    """From any step on, whether images lie in memory or are photographs of many sizes."""
    if whole:
        config = DataConfig(
            dataset=str(folder(tmp_path)),
            image_size=16,
            holdout=2,
            batch_size=4,
            labels=False,
            augment="strong",
        )
        data = open_data(config)
    else:
        data = synthetic(num_classes=2, image_size=16, n=32, seed=0)
    loader = TrainBatches(data.train, CROPS, batch_size=4, seed=3)
    steps = loader.from_step(0)
    first, second = (next(steps)[0] for _ in range(2))
    assert [tuple(view.shape) for view in first] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 3
    again = next(TrainBatches(data.train, CROPS, batch_size=4, seed=3).from_step(1))[0]
    assert all(map(torch.equal, second, again))
    assert not torch.equal(first[0], second[0])
    other = next(TrainBatches(data.train, CROPS, batch_size=4, seed=4).from_step(1))[0]
    assert not torch.equal(other[0], again[0])


def test_crops_show_their_share_of_the_image() -> None:
    """Of a ramp from left to right and one from top to bottom: how far a crop reaches says what it shows."""
    ramp = torch.arange(64.0).expand(64, 64)
    images = torch.stack([ramp, ramp.t(), ramp]).to(torch.uint8).expand(200, -1, -1, -1)
    scales = {"global_scale": (0.5, 0.9), "local_scale": (0.1, 0.3)}
    views = made(images, Crops(local_number=1, local_size=32, **scales, **PLAIN))
    for view, (low, high) in [(views[0], (0.5, 0.9)), (views[1], (0.5, 0.9)), (views[2], (0.1, 0.3))]:
        reach = [view[:, axis].amax((1, 2)) - view[:, axis].amin((1, 2)) for axis in (0, 1)]
        share = (reach[0] * 255 + 1) * (reach[1] * 255 + 1) / 64**2
        assert low - 0.06 < share.min() < low + 0.1
        assert high - 0.1 < share.max() < high + 0.06
    mirrored = made(images, Crops(local_number=0, local_size=32, **{**PLAIN, "hflip": 1.0}))[0]
    assert bool((mirrored[:, 0, :, 0] > mirrored[:, 0, :, -1]).all())


def test_colours_are_torchvisions() -> None:
    image = pictures(1)[0].float() / 4 + 64  # nothing is cut off at 0 or 255
    change_41 = torch.tensor([0.2, -0.3, 0.15, 0.0])[:, None]
    found = recolour(image[None], change_41, torch.tensor([False]))[0] / 255
    want = tv.adjust_saturation(image / 255, 1.15)
    want = tv.adjust_contrast(tv.adjust_brightness(want, 1.2), 0.7)
    torch.testing.assert_close(found, want, atol=2e-3, rtol=0)
    grey = recolour(image[None], torch.zeros(4, 1), torch.tensor([True]))[0] / 255
    torch.testing.assert_close(grey, tv.rgb_to_grayscale(image / 255, 3), atol=2e-3, rtol=0)
    same = recolour(image[None], torch.zeros(4, 1), torch.tensor([False]))[0]
    torch.testing.assert_close(same, image, atol=1e-3, rtol=0)


def test_hue_turns_colours_and_keeps_grey() -> None:
    grey = torch.full((1, 3, 2, 2), 100.0)
    third = torch.tensor([0.0, 0.0, 0.0, 1 / 3])[:, None]
    torch.testing.assert_close(recolour(grey, third, torch.tensor([False])), grey, atol=1e-3, rtol=0)
    red = torch.tensor([140.0, 100.0, 100.0])[None, :, None, None]
    turned = recolour(red, third, torch.tensor([False]))[0, :, 0, 0]
    assert turned.argmax() == 1, "a third of a turn makes red green, as by HSV"


def test_blur_is_torchvisions() -> None:
    image = pictures(2).float()
    found = blur(image, torch.tensor([0.7, 1.4]), radius=2)
    for index, sigma in enumerate((0.7, 1.4)):
        want = tv.gaussian_blur(image[index], [5, 5], [sigma, sigma])
        torch.testing.assert_close(found[index], want, atol=1e-3, rtol=1e-5)


def test_each_image_has_its_own_colours() -> None:
    """About a fifth grey, in all crops; only the second crop is solarized."""
    views = made(pictures(400), Crops(local_number=1, local_size=8))
    for view in views:
        grey = (view.amax(1) - view.amin(1)).amax((1, 2)) < 1e-3
        assert 0.12 < grey.float().mean() < 0.28
    bright = torch.full((400, 3, 16, 16), 255, dtype=torch.uint8)
    jitterless = Crops(local_number=0, local_size=8, color_jitter_prob=0.0)
    first, second = made(bright, jitterless)
    assert bool((first > 0.99).all())
    assert 0.12 < (second < 0.01).flatten(1).all(1).float().mean() < 0.28


@pytest.mark.parametrize("size", [4, 8, 32])
def test_tiny_and_grey_images(size: int) -> None:
    views = made(pictures(8, 1, size), Crops(local_number=1, local_size=2))
    assert [tuple(view.shape[1:]) for view in views] == [(1, size, size)] * 2 + [(1, 2, 2)]
    assert all(bool(view.isfinite().all()) for view in views)


@pytest.mark.parametrize(
    "wrong",
    [{"global_scale": (0.9, 0.4)}, {"local_scale": (0.0, 0.4)}, {"ratio": (2.0, 1.0)}, {"local_number": -1}],
)
def test_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong)).removesuffix("_number")):
        Crops(**{"local_number": 1, "local_size": 8, **wrong})  # type: ignore[arg-type]
