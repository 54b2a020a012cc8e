"""`open_data(config)`: images to train on, images for the search, and a test split behind a logged door."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from statistics import median, median_low
from typing import Any, TypeAlias

import numpy as np
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from vitnas.data.arrays import as_pixels, as_targets, width_of
from vitnas.data.config import Augment, DataConfig, LabelKind, augment_for
from vitnas.data.dataset_strings import open_sources
from vitnas.data.images import (
    UNREADABLE,
    Form,
    Images,
    Split,
    Store,
    are_numbers,
    has_labels,
    has_one_class,
    quiet_pillow,
    upright,
)
from vitnas.data.sources import NO_LABEL, ArraySource, Numbers, Source, Subset
from vitnas.data.splits import Opened, carve, carve_test, match_classes, rarest
from vitnas.errors import UserError, first_line
from vitnas.grids import ImageSize, as_image_size, sides_of
from vitnas.model.scale import Scale
from vitnas.model.trained import find_trained
from vitnas.runs import RunFile

logger = logging.getLogger(__name__)

Constants: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std
IMAGENET: Constants = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
MUCH_CUT = 0.7  # share left by the centre crop, below which a note says so; photographs of 4:3 keep 0.75
SMALL_SIDE, LARGE_SIDE = 64, 224  # pixels; images up to the first keep their size, others get the second
HOLDOUT_SHARE = 0.1  # of train
NUM_PROBED = 32
NUM_SAMPLED = 2_048


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What was read: `counts` per split and class (one count where there are no classes), names of `corrupt` images, a
    hash of labels and pixels, and what the labels are."""

    dataset: str
    image_size: ImageSize
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    corrupt: tuple[str, ...]
    notes: tuple[str, ...]
    seed: int
    sha256: str
    label_kind: LabelKind = "class"


@dataclass(frozen=True)
class Reading:
    """One reading of the test split."""

    when: str
    num_images: int
    purpose: str


@dataclass(frozen=True)
class Readings(RunFile):
    """The log of who looked at the test split."""

    FILE = "test_reads.json"
    COMMAND = "vitnas evaluate"
    REMEDY = "Restore it: it says how often the test split was read."

    readings: tuple[Reading, ...]


class Data:
    """Images of a dataset, split for a search. Made by `open_data` or `Data.from_arrays`.

    `train` is for weights, `holdout` (the dataset's validation split, or carved out of train) for the search. The
    test split is only had by `open_test`, which keeps a log of who looked. `notes` are sentences a report should show.
    """

    def __init__(
        self,
        *,
        train: Images,
        holdout: Images,
        test: Source,
        augment: Augment,
        config: DataConfig,
        opened: Opened,
        notes: Sequence[str],
        colour: Constants,
    ) -> None:
        self.train = train
        self.holdout = holdout
        self.augment = augment
        self.config = config
        self.class_names = opened.train.class_names
        self.notes = (*opened.notes, *notes)
        self._test = test
        self._test_store: Store | None = None
        self._opened = opened
        self._colour = colour

    @property
    def num_classes(self) -> int:
        """Number of classes, or of numbers that are told of an image; 0 of images without labels."""
        return len(self.class_names)

    @property
    def num_test(self) -> int:
        """Number of images in the test split, which are not looked at for that."""
        return len(self._test)

    @property
    def in_chans(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.train.form.in_chans

    @property
    def image_size(self) -> ImageSize:
        """In pixels: one number, or (height, width) of images that are not square."""
        return self.train.form.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Per-channel mean that batches are normalised with, for pixels from 0 to 1."""
        return self.train.form.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per-channel std that batches are normalised with, for pixels from 0 to 1."""
        return self.train.form.std

    @property
    def corrupt(self) -> list[str]:
        """Names of the images that could not be read so far, in all splits that were opened."""
        found = (self.train.store, self.holdout.store, self._test_store)
        stores = dict.fromkeys(store for store in found if store)  # of holdout often the same as of train
        return [*self._opened.corrupt, *(name for store in stores for name in store.corrupt)]

    def open_test(self, log: Path, *, purpose: str = "final report") -> Images:
        """Return the test split; append the time, the number of images and `purpose` to `log` (see `Readings`)."""
        earlier = Readings.load(log).readings if log.exists() else ()
        if self._test_store is None:
            self._test_store = _loaded(
                self._test, self.train.form, self.config, "test", self.train.scale
            ).store
        images = Images(self._test_store, "test")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        Readings((*earlier, Reading(now, len(images), purpose))).save(log)
        return images

    def resized(self, image_size: ImageSize) -> Data:
        """Return the same images, in the same splits, at another size; their sources are not opened again."""
        return self.formed(replace(self.config, image_size=image_size))

    def formed(self, config: DataConfig) -> Data:
        """Return the same images by another `config`: of another size, otherwise normalised or cropped.

        What it says of where they are is not looked at.
        """
        return _assemble(config, self._opened, self._colour)

    def fingerprint(self) -> Fingerprint:
        """Return what was read.

        The hash covers the labels of train and holdout and the decoded pixels of up to 64 images of each.
        """
        digest = hashlib.sha256()
        for images in (self.train, self.holdout):
            digest.update(images.targets.numpy().tobytes())
            for position in _spread(len(images), 64):
                pixels = images.read(position)
                digest.update(b"unreadable" if pixels is None else images.store.fit(pixels).numpy().tobytes())
        return Fingerprint(
            dataset=self.config.dataset,
            image_size=self.image_size,
            in_chans=self.in_chans,
            mean=self.mean,
            std=self.std,
            class_names=self.class_names,
            counts={
                "train": _counts(self.train.targets, self.num_classes),
                "holdout": _counts(self.holdout.targets, self.num_classes),
                "test": _counts(Images.targets_of(self._test), self.num_classes),
            },
            corrupt=tuple(self.corrupt),
            notes=self.notes,
            seed=self.config.seed,
            sha256=digest.hexdigest(),
            label_kind=self.config.label_kind,
        )

    @classmethod
    def from_arrays(
        cls,
        *,
        train: tuple[Any, Any],
        test: tuple[Any, Any] | None = None,
        class_names: Sequence[str] | None = None,
        config: DataConfig | None = None,
        name: str = "arrays",
    ) -> Data:
        """Make Data of images in memory: (uint8 images NHWC, NCHW or NHW, targets N), numpy or torch.

        Targets (N, Y) of 0 and 1 say which classes an image has; None says that there are none. With
        `config.label_kind` "numbers" they are numbers, (N,) or (N, T), called by `class_names`. Without `test` a part
        of `train` is set apart as that.
        `config` gives holdout, augment, seed and the rest; its `dataset` is replaced by `name`. Images keep
        their size unless `config.image_size` is set.

        Raises:
            UserError: not uint8, or targets that do not fit.
        """
        given = {"train": train} if test is None else {"train": train, "test": test}
        arrays = {split: as_pixels(images, f"{split} images") for split, (images, _) in given.items()}
        labels = {
            split: [NO_LABEL] * len(arrays[split])
            if targets is None
            else as_targets(targets, len(arrays[split]), config.label_kind if config else "class")
            for split, (_, targets) in given.items()
        }
        count = max(max(map(width_of, some)) for some in labels.values())
        names = list(class_names) if class_names is not None else [str(i) for i in range(count)]
        if len(names) < count:
            raise UserError(
                f"class_names has {len(names)} names; the targets go up to {count - 1}. Name every class."
            )
        height, width, chans = arrays["train"].shape[1:]
        fields = {**vars(config or DataConfig()), "dataset": name, "in_chans": chans}
        if any(isinstance(some[0], tuple) for some in labels.values()):
            fields["label_kind"] = "classes"
        if fields["image_size"] is None:
            fields["image_size"] = (height, width)
        config = DataConfig(**fields)
        sources = {
            split: ArraySource(arrays[split], some, () if NO_LABEL in some else names, f"{name}/{split}")
            for split, some in labels.items()
        }
        if test is None:
            opened = carve_test(sources["train"], config)
        else:
            opened = Opened(train=sources["train"], test=sources["test"])
        return _assemble(config, match_classes(opened, config))


def open_data(config: DataConfig, *, pretrained: str | None = None, large: int = LARGE_SIDE) -> Data:
    """Open the images that `config` names.

    Args:
        pretrained: the model that will see them (a folder, a timm name, or `NAME@FILE`); where `config` gives no mean
            or std, colour images get its.
        large: side in pixels that large images become where `config` says none.

    Raises:
        UserError: the dataset cannot be used, or no such model; one sentence says why, and what to do.
        MissingExtra: the dataset string needs a package that is not installed.
    """
    colour = IMAGENET if pretrained is None else constants_of(pretrained)
    return _assemble(config, match_classes(open_sources(config), config), colour, large)


def constants_of(pretrained: str) -> Constants:
    """Mean and std of the images that a model was trained on, by what `find_trained` takes; no weights are loaded.

    Raises:
        UserError: there is no such folder, file or model.
    """
    name = find_trained(pretrained, what="pretrained").name
    try:
        with torch.device("meta"):
            cfg = timm.create_model(name).pretrained_cfg
    except Exception as error:  # folders and the Hub fail in many ways
        raise UserError(
            f"pretrained is {pretrained!r}, which timm cannot make ({first_line(error)}); it must be a folder "
            f"of a saved model, a name of timm's, or NAME@FILE. Correct it, or leave it out."
        ) from error
    return tuple(cfg["mean"]), tuple(cfg["std"])


def _assemble(
    config: DataConfig, opened: Opened, colour: Constants = IMAGENET, large: int = LARGE_SIDE
) -> Data:
    if any(isinstance(target, Numbers) for target in opened.train.targets[:1]) and config.augment == "auto":
        config = replace(config, augment="none")
        note = (
            f"The images of {config.dataset} are not varied in training, as that could change what the numbers are of. "
            "data.augment=weak mirrors and shifts them, where the numbers stay the same then."
        )
        opened = replace(opened, notes=(*dict.fromkeys((*opened.notes, note)),))
        logger.warning(note)
    train, test = _capped(opened.train, config, "train"), _capped(opened.test, config, "test")
    if config.on_corrupt == "raise" and opened.corrupt:
        raise UserError(
            f"{opened.corrupt[0]}; on_corrupt is 'raise'. Mend or remove the sample, or use on_corrupt=skip."
        )
    form, area, is_native, notes = _form(config, train, colour, large)
    augment = augment_for(config.augment, image_size=form.image_size, in_chans=form.in_chans)
    whole = augment.scale is not None and not is_native  # native images are stored as they are anyway
    store = Store(train, form, whole=whole, on_corrupt=config.on_corrupt)
    store.load(int(len(train) * (form.in_chans * area if whole else prod(form.input_size))))
    store.check_classes()
    if config.mean is None and form.in_chans == 1:
        form = _measured(form, store)
        store.form = form
    if opened.holdout is None:
        rest, holdout = _carved_holdout(config, store)
    else:
        rest = Images(store, "train")
        store.scale = _scale(rest, config)
        holdout = _loaded(_capped(opened.holdout, config, "holdout"), form, config, "holdout", store.scale)
    return Data(
        train=rest,
        holdout=holdout,
        test=test,
        augment=augment,
        config=config,
        opened=opened,
        notes=notes,
        colour=colour,
    )


def _carved_holdout(config: DataConfig, store: Store) -> tuple[Images, Images]:
    """Train without the holdout, and the holdout."""
    everything, source = Images(store, "train"), store.source
    names = [everything.name(i) for i in range(len(everything))]
    classes = [source.targets[row] for row in store.rows]
    asked = HOLDOUT_SHARE if config.holdout is None else config.holdout
    if isinstance(asked, str):
        raise UserError(
            f"holdout is {asked!r}, the name of a split, but {config.dataset} has no other split. Give a share or a "
            "number of images."
        )
    count = asked if isinstance(asked, int) else max(len({*rarest(classes)}), round(asked * len(everything)))
    try:
        rest, carved = carve(classes, names, count, f"holdout/{config.seed}", source.class_names)
    except UserError as error:
        raise UserError(f"holdout is {asked}: {error}") from error
    store.scale = _scale(Images(store, "train", rest), config)
    return Images(store, "train", rest), Images(store, "holdout", carved)


def _scale(train: Images, config: DataConfig) -> Scale | None:
    """What numbers are standardised by.

    Raises:
        UserError: one of them is the same for all images.
    """
    if not are_numbers(train.targets):
        return None
    std_T, mean_T = torch.std_mean(train.targets, dim=0, correction=0)
    for name, std, mean in zip(train.class_names, std_T.tolist(), mean_T.tolist(), strict=True):
        if std <= 1e-9 * abs(mean) or std == 0:
            raise UserError(
                f"{name!r} is {mean:g} for every train image of {config.dataset}; a number to be told must vary. Name "
                "another column with data.target_key."
            )
    return Scale(tuple(mean_T.tolist()), tuple(std_T.tolist()))


def _loaded(
    source: Source, form: Form, config: DataConfig, split: Split, scale: Scale | None = None
) -> Images:
    """A split of its own, at the final size."""
    store = Store(source, form, whole=False, on_corrupt=config.on_corrupt)
    store.scale = scale
    store.load(len(source) * prod(form.input_size))
    return Images(store, split)


def _capped(source: Source, config: DataConfig, split: Split) -> Source:
    if config.max_images is None or len(source) <= config.max_images:
        return source
    names = [source.name(i) for i in range(len(source))]
    try:
        _, some = carve(
            source.targets, names, config.max_images, f"{split}/{config.seed}", source.class_names
        )
    except UserError as error:
        raise UserError(f"max_images is {config.max_images}: {error}") from error
    return Subset(source, some)


def _form(
    config: DataConfig, source: Source, colour: Constants, large: int
) -> tuple[Form, float, bool, tuple[str, ...]]:
    """Return the form of all images, found by looking at a few, a kept image's mean area in pixels, whether all are of
    the final size, and what a person should know."""
    sizes: list[tuple[int, int]] = []  # height, width
    modes: set[str] = set()
    with quiet_pillow():
        for index in _spread(len(source), NUM_PROBED):
            try:
                image = upright(source.read(index))
            except UNREADABLE:
                continue  # counted and named when everything is read
            sizes.append(image.size[::-1])
            modes.add(image.mode)
    if not sizes:
        raise UserError(
            f"None of the {min(NUM_PROBED, len(source))} images tried in {config.dataset} can be read (the first is "
            f"{source.name(0)}); they must be whole image files. Copy them again."
        )
    alike, small = len(set(sizes)) == 1, max(map(max, sizes)) <= SMALL_SIDE
    size = config.image_size or (_own_size(sizes) if small else large)
    chans = config.in_chans or (
        1 if all(mode in ("1", "L", "F") or mode.startswith("I") for mode in modes) else 3
    )
    mean, std = config.mean or colour[0], config.std or colour[1]
    if chans == 1:
        mean, std = config.mean or (0.5,), config.std or (0.5,)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != chans:
            raise UserError(
                f"{name} has {len(values)} values; the images have {chans} channels. Give {chans}."
            )
    form = Form(
        image_size=size,
        in_chans=chans,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=config.interpolation,
        # A small image upscaled loses its border for nothing; photographs get timm's usual centre crop.
        crop_pct=config.crop_pct or (1.0 if small else 0.875),
    )
    high, wide = form.keep_sides
    scales = [min(1.0, max(high / h, wide / w)) for h, w in sizes]
    area = sum(h * w * s * s for (h, w), s in zip(sizes, scales, strict=True)) / len(sizes)
    return form, area, alike and sizes[0] == sides_of(form.image_size), _cut_note(config, form, sizes)


def _own_size(sizes: list[tuple[int, int]]) -> ImageSize:
    """The size of small images: their own, or a square that no more than half of them are enlarged for."""
    if len(set(sizes)) == 1:
        return as_image_size("image_size", sizes[0])
    return max(4, int(median(map(min, sizes))) // 4 * 4)


def _cut_note(config: DataConfig, form: Form, sizes: list[tuple[int, int]]) -> tuple[str, ...]:
    """Says, and logs, that images lose much because their shape is another than the final one."""
    height, width = sides_of(form.image_size)
    kept = median(min(h * width, w * height) / max(h * width, w * height) for h, w in sizes)
    if kept >= MUCH_CUT:
        return ()
    some = median_low(sizes)
    note = (
        f"The images of {config.dataset} are about {some[0]} x {some[1]} pixels (height, width) and become {height} x "
        f"{width}: {1 - kept:.0%} of each is cut off. image_size takes two numbers, height and width."
    )
    logger.warning(note)
    return (note,)


def _measured(form: Form, store: Store) -> Form:
    """Set mean and std from up to 2,048 decoded images."""
    images = Images(store, "train")
    decoded = (images.read(i) for i in _spread(len(images), NUM_SAMPLED))
    pixels = np.concatenate([store.fit(p).reshape(-1).numpy() for p in decoded if p is not None]) / 255
    mean, std = round(float(pixels.mean()), 4), round(max(float(pixels.std()), 1e-3), 4)
    return Form(**{**vars(form), "mean": (mean,), "std": (std,)})


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` indices, evenly spread over `count`."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def _counts(targets: Tensor, num_classes: int) -> tuple[int, ...]:
    if not has_labels(targets) or are_numbers(targets):
        return (len(targets),)
    if not has_one_class(targets):
        return tuple(targets.sum(0).tolist())
    return tuple(torch.bincount(targets, minlength=num_classes).tolist())
