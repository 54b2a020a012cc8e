"""Sources: what a dataset string opens to. Indexed images that are read one by one, not yet resized.

Folders and Hugging Face datasets have sources in their own files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Numbers:
    """What is measured of an image, in the order of its source's names."""

    values: tuple[float, ...]


# A class number, those of an image that may have several, or what is measured of it.
Target: TypeAlias = int | tuple[int, ...] | Numbers
NO_LABEL = -1  # the target of each image of a source that has no class names


class Source(Protocol):
    """Images of one split with their classes; `read` may raise any of `images.UNREADABLE`.

    Without labels there are no class names, and each target is NO_LABEL; all targets are of one kind. Of Numbers the
    class names say what was measured.
    """

    class_names: tuple[str, ...]
    targets: list[Target]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Image.Image: ...


class _Numbered:
    """Images that are called by their place."""

    def __init__(self, targets: Sequence[Target], class_names: Sequence[str], prefix: str) -> None:
        self.targets: list[Target] = list(targets)
        self.class_names = tuple(class_names)
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return f"{self.prefix}/{index}"


class ArraySource(_Numbered):
    """Images that are already in memory, as uint8 NHWC."""

    def __init__(
        self, pixels_NHWC: Pixels, targets: Sequence[Target], class_names: Sequence[str], prefix: str
    ) -> None:
        super().__init__(targets, class_names, prefix)
        self.pixels_NHWC = pixels_NHWC

    def read(self, index: int) -> Image.Image:
        return to_pil(self.pixels_NHWC[index])


class ListSource(_Numbered):
    """Pictures that were streamed into memory; sizes and modes may differ."""

    def __init__(
        self,
        pictures: Sequence[Image.Image],
        targets: Sequence[Target],
        class_names: Sequence[str],
        prefix: str,
    ) -> None:
        super().__init__(targets, class_names, prefix)
        self.pictures = list(pictures)

    def read(self, index: int) -> Image.Image:
        return self.pictures[index]


class TorchSource(_Numbered):
    """A dataset of torchvision's, opened by `open_sources`, which gives the picture itself."""

    def __init__(
        self, dataset: Any, targets: Sequence[Target], class_names: Sequence[str], prefix: str
    ) -> None:
        super().__init__(targets, class_names, prefix)
        self.dataset = dataset

    def read(self, index: int) -> Image.Image:
        image: Image.Image = self.dataset[index][0]
        return image


class Subset:
    """Some images of another source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source = source
        self.indices = list(indices)
        self.class_names = source.class_names
        self.targets = [source.targets[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def read(self, index: int) -> Image.Image:
        return self.source.read(self.indices[index])


def numbers_in(targets: Iterable[Target]) -> set[int]:
    """All class numbers that occur."""
    return {number for target in targets for number in classes_of(target)}


def classes_of(target: Target) -> tuple[int, ...]:
    """The class numbers of a target."""
    if isinstance(target, Numbers):
        return ()
    return (target,) if isinstance(target, int) else target


def renumbered(targets: Iterable[Target], number: Sequence[int]) -> list[Target]:
    """With each class number replaced by `number` at its place."""
    return [
        target
        if isinstance(target, Numbers)
        else number[target]
        if isinstance(target, int)
        else tuple(sorted({number[each] for each in target}))
        for target in targets
    ]


def without_labels(source: Source) -> Source:
    """The same images, of no class."""
    source.targets, source.class_names = [NO_LABEL] * len(source), ()
    return source


def shrink(image: Image.Image, sides: tuple[int, int], interpolation: str) -> Image.Image:
    """Make an image as small as it can be without a side below `sides` (height, width); its shape stays."""
    (width, height), (low, narrow) = image.size, sides
    if width <= narrow or height <= low:
        return image
    new, old = (low, height) if low * width >= narrow * height else (narrow, width)
    whole = int if low == narrow else round  # as the evaluation transforms of torchvision and of timm do
    size = max(narrow, whole(new * width / old)), max(low, whole(new * height / old))
    return image.resize(size, Image.Resampling[interpolation.upper()])


def to_pil(pixels_HWC: Pixels) -> Image.Image:
    """Return uint8 pixels, (H, W, 1) or (H, W, 3), as a picture."""
    return Image.fromarray(pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC)


def from_pil(image: Image.Image) -> Pixels:
    """A copy of its pixels; grey ones have a channel too."""
    pixels: Pixels = np.array(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
