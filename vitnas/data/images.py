"""Images of one split: decoded once into memory when they fit, else read on access; unreadable ones are named. And
batches of them in order, for scoring.

Legend: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import logging
import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import numpy as np
import psutil
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitnas.data.sources import (
    ArraySource,
    Numbers,
    Pixels,
    Source,
    classes_of,
    from_pil,
    numbers_in,
    shrink,
    to_pil,
)
from vitnas.errors import UserError
from vitnas.grids import ImageSize, sides_of
from vitnas.model.scale import Scale

logger = logging.getLogger(__name__)
Split = Literal["train", "holdout", "test"]

# What Pillow raises for files that are cut short, garbled or not images at all.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error,
              OverflowError, Image.DecompressionBombError)  # fmt: skip
RAM_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Form:
    """What every decoded image becomes: size in pixels, channels, and the constants that normalise it."""

    image_size: ImageSize
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of a finished image."""
        return (self.in_chans, *sides_of(self.image_size))

    @property
    def keep_sides(self) -> tuple[int, int]:
        """Least height and width before the centre crop; also the largest worth keeping in memory."""
        height, width = (math.floor(side / self.crop_pct) for side in sides_of(self.image_size))
        return height, width

    @property
    def cfg(self) -> dict[str, Any]:
        """As timm's descriptions of networks have it."""
        return {key: getattr(self, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """Turn images (uint8, or float 0 to 255) into float32 of mean about 0 and std about 1, as timm does."""
        mean = torch.tensor(self.mean, dtype=torch.float32).view(-1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(-1, 1, 1)
        return images_BCHW.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


class Store:
    """Decoded images of one source.

    With `whole` images keep their aspect ratio (random resized crops need it), else they are resized and
    centre cropped to the final size. `load` decodes everything when it takes less than RAM_BYTES, and drops
    what cannot be read; a store that is too large reads on access.
    """

    def __init__(self, source: Source, form: Form, *, whole: bool, on_corrupt: str = "skip") -> None:
        self.source = source
        self.form = form
        self.whole = whole
        self.on_corrupt = on_corrupt
        self.rows = list(range(len(source)))  # rows of the source that are in use
        self.corrupt: list[str] = []
        self.fixed_NCHW: Tensor | None = None
        self.kept: list[Pixels] | None = None
        self.is_native = True  # no image had to be resized so far
        self.scale: Scale | None = None  # of numbers, once it is known what they are in train
        self._fit = create_transform(
            form.input_size,
            is_training=False,
            crop_pct=form.crop_pct,
            crop_mode=form.crop_mode,
            interpolation=form.interpolation,
            normalize=False,
        )

    def load(self, stored_bytes: int) -> None:
        """Decode all images if `stored_bytes` fits in memory; afterwards `rows` are the readable ones."""
        form = self.form
        native = (*sides_of(form.image_size), form.in_chans)
        if isinstance(self.source, ArraySource) and self.source.pixels_NHWC.shape[1:] == native:
            self.fixed_NCHW = torch.from_numpy(self.source.pixels_NHWC).permute(0, 3, 1, 2).contiguous()
            return
        if stored_bytes > RAM_BYTES:
            return
        logger.info("Decoding %d images into memory (about %d MB)", len(self.rows), stored_bytes // 10**6)
        fixed = None if self.whole else torch.empty((len(self.rows), *native), dtype=torch.uint8)
        kept: list[Pixels] = []
        good: list[int] = []
        bad: list[str] = []
        # Threads pay for large images only: with small ones the hand-over costs more than the decoding.
        with quiet_pillow(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            decoded = (pool.map if max(form.input_size) > 64 else map)(self.decode, self.rows)
            for row, pixels in zip(self.rows, decoded, strict=True):
                if pixels is None:
                    bad.append(self.source.name(row))
                    continue
                if fixed is None:
                    kept.append(pixels)
                else:
                    fixed[len(good)] = torch.from_numpy(pixels)
                good.append(row)
        self.record(bad)
        if not good:
            raise UserError(
                f"None of the {len(self.rows)} images can be read (the first is {bad[0]}); they must be "
                "whole image files. Copy them again."
            )
        self.rows = good
        if fixed is None:
            self.kept = kept
        else:
            self.fixed_NCHW = fixed[: len(good)].permute(0, 3, 1, 2).contiguous()

    def check_classes(self) -> None:
        """Refuse images of which not one of some class can be read.

        Raises:
            UserError: naming the class.
        """
        source = self.source
        lost = numbers_in(source.targets) - numbers_in([source.targets[row] for row in self.rows])
        if lost and source.class_names:
            names = ", ".join(repr(source.class_names[number]) for number in sorted(lost)[:5])
            raise UserError(
                f"not one image of the class {names} can be read (such as {self.corrupt[0]}); each class of train "
                "needs some. Copy them again, or take the class away."
            )

    def decode(self, row: int, *, whole: bool | None = None) -> Pixels | None:
        """Read a row of the source as uint8 HWC at the size worth keeping; None when it is unreadable.

        Raises:
            UserError: it is unreadable and `on_corrupt` is "raise".
        """
        try:
            image = with_channels(upright(self.source.read(row)), self.form.in_chans)
        except UNREADABLE as error:
            if self.on_corrupt == "raise":
                raise UserError(
                    f"{self.source.name(row)} cannot be read ({error}); on_corrupt is 'raise'. Mend or "
                    "remove the file, or use on_corrupt=skip."
                ) from error
            return None
        if image.size != sides_of(self.form.image_size)[::-1]:
            self.is_native = False
            if not (self.whole if whole is None else whole):
                return np.ascontiguousarray(self._fit(image).permute(1, 2, 0).numpy())
            image = shrink(image, self.form.keep_sides, self.form.interpolation)
        return from_pil(image)

    def fit(self, pixels_HWC: Pixels) -> Tensor:
        """Resize and centre crop to the final size, as timm's evaluation transform does. uint8 CHW."""
        if pixels_HWC.shape[:2] == sides_of(self.form.image_size):
            return torch.from_numpy(pixels_HWC).permute(2, 0, 1)
        fitted: Tensor = self._fit(to_pil(pixels_HWC))
        return fitted

    def record(self, names: Sequence[str]) -> None:
        """Note images that could not be read, once each, and log them."""
        known = set(self.corrupt)
        new = [name for name in dict.fromkeys(names) if name not in known]
        if new:
            self.corrupt += new
            shown = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
            logger.warning(
                "%d of %d images cannot be read and are skipped: %s", len(new), len(self.source), shown
            )


class Images:
    """Images of one split and their classes; `split` says which, so that search can refuse the test split.

    `targets` is an int64 tensor of class numbers, one per image; where images may have several classes it is (N, Y)
    bool, which they have; where numbers are told of them, float32 (N, T), standardised by `scale`; of images without
    labels it is (N, 0), which has a row per image as well and fits no loss and no comparison by mistake.
    """

    def __init__(self, store: Store, split: Split, places: Sequence[int] | None = None) -> None:
        self.store = store
        self.split = split
        # Places count the store's readable rows, so they also index its tensors.
        self.places = torch.arange(len(store.rows)) if places is None else torch.as_tensor(places)
        targets = self.targets_of(store.source)[torch.as_tensor(store.rows)][self.places]
        self.targets = targets if self.scale is None else self.scale.standardised(targets)

    def __len__(self) -> int:
        return len(self.places)

    @staticmethod
    def targets_of(source: Source) -> Tensor:
        """All targets of a source; numbers as they are."""
        if source.targets and isinstance(source.targets[0], Numbers):
            rows = [target.values for target in source.targets if isinstance(target, Numbers)]
            return torch.tensor(rows, dtype=torch.float64)
        if source.targets and isinstance(source.targets[0], tuple):
            has_NY = torch.zeros(len(source), len(source.class_names), dtype=torch.bool)
            for row, target in enumerate(source.targets):
                has_NY[row, list(classes_of(target))] = True
            return has_NY
        targets_N = torch.as_tensor(source.targets, dtype=torch.int64)
        return targets_N if source.class_names else targets_N[:, None][:, :0]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of all classes there are, or of what numbers say; none of images without labels."""
        return self.store.source.class_names

    @property
    def several(self) -> bool:
        """Whether an image may be of several classes."""
        return self.targets.dtype == torch.bool

    @property
    def scale(self) -> Scale | None:
        """What the targets are standardised by, where they are numbers."""
        return self.store.scale

    @property
    def form(self) -> Form:
        """The size, channels and normalisation of these images."""
        return self.store.form

    def name(self, position: int) -> str:
        """File name, or split and number, of an image."""
        return self.store.source.name(self.store.rows[int(self.places[position])])

    def subset(self, positions: Sequence[int]) -> Images:
        """Return the images at `positions`, of the same split and sharing the decoded pixels."""
        return Images(self.store, self.split, self.places[torch.as_tensor(positions)].tolist())

    def batches(self, batch_size: int = 256) -> EvalBatches:
        """These images in order, as networks take them."""
        return EvalBatches(self, batch_size=batch_size)

    def pixels(self, positions: Tensor) -> Tensor | None:
        """Return uint8 images BCHW at the final size when they are in memory at that size, else None."""
        fixed = self.store.fixed_NCHW
        return None if fixed is None else fixed[self.places[positions]]

    def read(self, position: int, *, whole: bool = False) -> Pixels | None:
        """Return one image as uint8 HWC, uncropped when `whole`; None when it cannot be read."""
        place = int(self.places[position])
        store = self.store
        if store.kept is not None and (whole <= store.whole):
            return store.kept[place]
        # A cropped copy will not do when the whole image is asked for, unless nothing had to be cropped.
        if store.fixed_NCHW is not None and (store.is_native or not whole):
            return store.fixed_NCHW[place].permute(1, 2, 0).contiguous().numpy()
        return store.decode(store.rows[place], whole=whole)


Batch = tuple[Tensor, Tensor]
# Images (or the crops of each), targets, names of unreadable images met on the way.
Loaded = tuple[Any, Tensor, list[str]]


class Numbered(Protocol):
    """Batches by their numbers."""

    def load(self, number: int, /) -> Loaded: ...


class EvalBatches:
    """Images in order, normalised and not varied, the last batch maybe smaller; iterate as often as you like.

    What fits into `cache_bytes` (default: a quarter of the free memory, at least 1 GiB) is kept after the first pass,
    so that scoring thousands of Archs decodes once: normalised batches, or where these are too large the bytes of the
    images. Do not change batches in place. Unreadable images are left out, so count what the batches hold.
    """

    def __init__(
        self, images: Images, *, batch_size: int, workers: int = 0, cache_bytes: int | None = None
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.workers = workers
        form = images.form
        if cache_bytes is None:
            cache_bytes = max(1 << 30, psutil.virtual_memory().available // 4)
        size = len(images) * prod(form.input_size)
        self._keep_normalised, self._keep = 4 * size < cache_bytes, size < cache_bytes
        self._cache: list[Batch] | None = None

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        normalise = self.images.form.normalise
        if self._cache is not None:
            for images_BCHW, targets_B in self._cache:
                yield images_BCHW if self._keep_normalised else normalise(images_BCHW), targets_B
            return
        passed: list[Batch] = []
        for raw_BCHW, targets_B in self._read_all():
            images_BCHW = normalise(raw_BCHW)
            if self._keep:
                passed.append((images_BCHW if self._keep_normalised else raw_BCHW, targets_B))
            yield images_BCHW, targets_B
        if self._keep:
            self._cache = passed

    def _read_all(self) -> Iterator[Batch]:
        in_memory = self.images.store.fixed_NCHW is not None
        numbers = range(len(self))
        batches: Iterator[Loaded]
        if in_memory or self.workers == 0:
            batches = map(self.load, numbers)
        else:
            batches = loaded_by_workers(self, numbers, self.workers)
        for images_BCHW, targets_B, bad in batches:
            self.images.store.record(bad)
            if len(targets_B):
                yield images_BCHW, targets_B

    def load(self, number: int) -> Loaded:
        """Read one batch, as bytes."""
        positions_B = torch.arange(
            number * self.batch_size, min((number + 1) * self.batch_size, len(self.images))
        )
        form = self.images.form
        if (fixed_BCHW := self.images.pixels(positions_B)) is not None:
            return fixed_BCHW, self.images.targets[positions_B], []
        images, good, bad = [], [], []
        with quiet_pillow():
            for position in positions_B.tolist():
                if (pixels := self.images.read(position)) is None:
                    bad.append(self.images.name(position))
                else:
                    images.append(self.images.store.fit(pixels))
                    good.append(position)
        if not images:
            empty = torch.empty(0, *form.input_size, dtype=torch.uint8)
            return empty, self.images.targets[:0], bad
        return torch.stack(images), self.images.targets[good], bad


class _ByNumber(Dataset[Any]):
    """Hands a worker the number of a batch to load; the batch sampler's lists hold one number each."""

    def __init__(self, batches: Numbered) -> None:
        self.batches = batches

    def __getitems__(self, numbers: list[int]) -> Loaded | UserError:
        (number,) = numbers
        try:
            return self.batches.load(number)
        except UserError as error:  # raised in a worker it would reach the user inside a traceback
            return error


def loaded_by_workers(batches: Numbered, numbers: Any, workers: int) -> Iterator[Loaded]:
    loader: DataLoader[Any] = DataLoader(
        _ByNumber(batches),
        batch_sampler=([number] for number in numbers),
        num_workers=workers,
        collate_fn=_as_is,
        generator=torch.Generator(),  # else the loader would draw from the global one
    )
    for loaded in loader:
        if isinstance(loaded, UserError):
            raise loaded
        yield loaded


def _as_is(loaded: Any) -> Any:
    return loaded


def has_labels(targets: Tensor) -> bool:
    """Whether targets say anything: those of images without labels are (B, 0)."""
    return targets.dim() == 1 or targets.shape[1] > 0


def has_one_class(targets: Tensor) -> bool:
    """Whether targets are class numbers: of images that may have several classes they are (B, Y)."""
    return targets.dim() == 1


def are_numbers(targets: Tensor) -> bool:
    """Whether targets are numbers (B, T) to be told, and not classes."""
    return targets.is_floating_point() and has_labels(targets)


def require_one_class(targets: Tensor, what: str) -> None:
    """Refuse images without labels, those that may have several classes, and those with numbers.

    Raises:
        UserError: `targets` are (B, 0) or (B, Y); `what` names who needs them.
    """
    require_labels(targets, what)
    if are_numbers(targets):
        raise UserError(
            f"{what} needs classes, and these images have numbers. Leave data.label_kind=numbers out, or use "
            "data.labels=false where labels are not needed."
        )
    if not has_one_class(targets):
        raise UserError(
            f"{what} needs one class per image, and these may have several. Use data.label_kind=class, or "
            "data.labels=false where labels are not needed."
        )


def require_labels(targets: Tensor, what: str) -> None:
    """Refuse images without labels.

    Raises:
        UserError: `targets` are (B, 0); `what` names who needs them.
    """
    if not has_labels(targets):
        raise UserError(
            f"{what} needs labels, and these images have none. Put the images of each class into a folder of their "
            "own, and leave data.labels=false out."
        )


def require_not_test(images: Images, what: str) -> None:
    """Refuse the test split.

    Raises:
        UserError: `images` are the test split; `what` names who asked for them.
    """
    if images.split == "test":
        raise UserError(
            f"{what} was given the test split; test is read once, for the final table. Give it data.holdout."
        )


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow's remarks on odd metadata away while decoding; unreadable files are reported anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        yield


def upright(image: Image.Image) -> Image.Image:
    """Turned as a person sees it, where a camera wrote how it was held (EXIF)."""
    return ImageOps.exif_transpose(image)


def with_channels(image: Image.Image, in_chans: int) -> Image.Image:
    """In grey for one channel, else in colours; what is transparent is white, as most programs show it."""
    if image.mode == "I" and np.asarray(image).max() > 255:  # how some Pillows open 16-bit grey
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255, which turns most of it white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "F":  # Pillow clips these too; they go to 1, 255 or 65535
        values = np.nan_to_num(np.asarray(image))
        full = next((top for top in (1, 255) if values.max() <= top), 65535)
        image = Image.fromarray((values.clip(0, full) * (255 / full)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if in_chans == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
