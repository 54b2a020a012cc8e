"""A tiny set of learnable images for tests and examples: gratings whose direction is the class."""

from __future__ import annotations

import numpy as np

from vitnas.data.config import DataConfig
from vitnas.data.open import Data
from vitnas.data.sources import Pixels
from vitnas.grids import ImageSize, sides_of


def synthetic(
    num_classes: int = 4, image_size: ImageSize = 16, n: int = 256, seed: int = 0, *, in_chans: int = 3
) -> Data:
    """Return `n` train (holdout included, 1 in 4) and n // 4 test images of noisy gratings, not varied in training.

    Class k has stripes at k / num_classes of a half turn, with a random phase and spacing.
    """
    rng = np.random.default_rng(seed)
    train, test = (
        _gratings(count, num_classes, image_size, in_chans, rng) for count in (n, max(n // 4, num_classes))
    )
    config = DataConfig(augment="none", holdout=0.25, seed=seed)
    return Data.from_arrays(train=train, test=test, config=config, name="synthetic")


def _gratings(
    count: int, num_classes: int, size: ImageSize, in_chans: int, rng: np.random.Generator
) -> tuple[Pixels, list[int]]:
    height, width = sides_of(size)
    targets = np.arange(count) % num_classes
    angle = (np.pi * targets / num_classes)[:, None, None]
    y, x = np.mgrid[:height, :width][:, None] / height
    waves = rng.uniform(2.0, 3.0, (count, 1, 1))
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    grey = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    noisy = grey[:, :, :, None] * 70 + 128 + rng.normal(0, 25, (count, height, width, in_chans))
    return noisy.clip(0, 255).astype(np.uint8), targets.tolist()
