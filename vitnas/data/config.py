"""What to read and how to vary it: `DataConfig` and `Augment`, both checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from vitnas.errors import UserError, check_word, nearest
from vitnas.grids import ImageSize, as_image_size, sides_of

# Tried in this order when the asked test split is missing.
VALIDATION_NAMES = ("validation", "val", "valid", "eval", "evaluation")
TEST_NAMES = ("test", "testing", *VALIDATION_NAMES)
TRAIN_NAMES = ("train", "training")

MOST_BATCH = 1 << 20
MOST_WORKERS = 512
LabelKind: TypeAlias = Literal["class", "classes", "numbers"]
AUTO_AUGMENTS = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(
            f"{name} is {value}; it must be from {low:g} to {high:g}. Choose a value in that range."
        )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How train images are varied. The default varies nothing.

    `shift`, `rotate`, `zoom` and `hflip` run on whole uint8 batches in torch and are fast on a CPU. `scale`
    (with `ratio`), `color_jitter` and `auto_augment` are timm's (the arguments of
    `timm.data.create_transform`) and run per image on PIL; `re_prob` is timm's random erasing on the finished
    batch. `mixup`, `cutmix` and `label_smoothing` are only carried here: training builds `timm.data.Mixup` from them.
    """

    hflip: float = 0.0  # chance to mirror left-right
    shift: float = 0.0  # largest shift, as a share of the image's side, in whole pixels, black filled
    rotate: float = 0.0  # largest angle, degrees
    zoom: tuple[float, float] = (1.0, 1.0)  # magnification range; above 1 is nearer
    scale: tuple[float, float] | None = None  # area share of timm's random resized crop; None is no such crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # aspect ratio range of that crop
    color_jitter: float = 0.0
    auto_augment: str | None = None  # timm's string, for example "rand-m9-mstd0.5-inc1"
    re_prob: float = 0.0
    re_mode: str = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hflip", "re_prob", "mixup_prob"):
            _within(f"augment.{name}", getattr(self, name), 0.0, 1.0)
        _within("augment.shift", self.shift, 0.0, 0.5)
        _within("augment.rotate", self.rotate, 0.0, 180.0)
        _within("augment.label_smoothing", self.label_smoothing, 0.0, 0.999)
        for name in ("mixup", "cutmix", "color_jitter"):
            _within(f"augment.{name}", getattr(self, name), 0.0, 100.0)
        for name, pair, low, high in (
            ("zoom", self.zoom, 0.1, 10.0),
            ("scale", self.scale, 0.001, 1.0),
            ("ratio", self.ratio, 0.01, 100.0),
        ):
            if pair is not None and not low <= pair[0] <= pair[1] <= high:
                raise UserError(
                    f"augment.{name} is {pair}; it must be two rising numbers from {low:g} to {high:g}. Give "
                    "the lower one first."
                )
        if self.re_mode not in ("const", "rand", "pixel"):
            raise UserError(
                f"augment.re_mode is {self.re_mode!r}; it must be 'const', 'rand' or 'pixel'."
                + nearest(self.re_mode, ("const", "rand", "pixel"))
            )
        if self.auto_augment and self.auto_augment.split("-")[0] not in AUTO_AUGMENTS:
            raise UserError(
                f"augment.auto_augment is {self.auto_augment!r}; timm knows strings that start with "
                f"{', '.join(AUTO_AUGMENTS)}. Example: 'rand-m9-mstd0.5-inc1'."
            )


# Names a person may type for `DataConfig.augment`; "auto" picks one from the images (see `augment_for`).
AUGMENTS: dict[str, Augment] = {
    "none": Augment(),
    "digits": Augment(shift=0.125, rotate=10.0, zoom=(0.9, 1.1)),
    "weak": Augment(shift=0.125, hflip=0.5),
    # ViTAS's for its supernets: the weak side of DeiT's, without colours or mixing
    "weak_crop": Augment(hflip=0.5, scale=(0.08, 1.0), re_prob=0.25, label_smoothing=0.1),
    "mixed": Augment(
        shift=0.125, hflip=0.5, re_prob=0.25, mixup=0.8, cutmix=1.0, mixup_prob=0.5, label_smoothing=0.1
    ),
    "strong": Augment(
        hflip=0.5,
        scale=(0.08, 1.0),
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are, how they are split, and how they become tensors.

    `dataset` is timm's dataset string (a folder of class folders, `torch/cifar10`, `hfds/<name or folder>`,
    `wds/` with `root`), or `digits`, scikit-learn's 1,797 handwritten digits, which need no download.
    `image_size` is one number, or (height, width). None: images of at most 64 pixels keep their size if all are
    equal, else become squares that enlarge few; larger ones become 224. Without `mean` and `std` they are timm's
    ImageNet constants, or those of a run's pretrained model, for colour, and measured on train for grey images.
    Of folders, `class_folders` says which are classes: those at the `top` of a split, the innermost ones (`leaf`), or
    those `outside` of the splits, as in `cat/train/1.jpg`. Links to folders elsewhere are followed with `follow_links`.
    `holdout` is a share, a number of images, or the name of a split; None is the validation split of a dataset that has
    one beside test, or else a tenth of train, and at least an image of every class.
    `labels` may be a CSV or TSV file that says which class each image of a folder has; its columns are found by their
    names, or named by `input_key` (images), `target_key` (classes) and `split_key`. `labels=False` takes the images
    alone, wherever they lie below the folder and whatever columns they have. With `label_kind` "classes" an image may
    have several classes or none, and accuracy is then mean average precision; with "numbers" the columns that
    `target_key` names (one, or several in a list) are numbers to be told, such as an age, and accuracy is R^2.
    `class_map` is a file of lines `class,name`: classes of one name become one, those without a name are left out, and
    names are in its order.
    `balance` is how far rare classes are shown more often in training: 0 not, 1 until each is as frequent; an image of
    several counts by its rarest.
    `config_name` is a configuration of a Hugging Face dataset, whose columns `input_key` and `target_key` are too.

    Raises:
        UserError: a field is out of range; the message names the rule.
    """

    dataset: str = "digits"
    root: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_size: ImageSize | None = None
    in_chans: Literal[1, 3] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bicubic"
    crop_pct: float | None = None
    class_folders: Literal["top", "leaf", "outside"] = "top"
    follow_links: bool = False
    holdout: int | float | str | None = None
    batch_size: int = 128
    workers: int = 0
    augment: Augment | str = "auto"
    on_corrupt: Literal["skip", "raise"] = "skip"
    max_images: int | None = None
    config_name: str | None = None
    input_key: str | None = None
    target_key: str | tuple[str, ...] | None = None
    split_key: str | None = None
    labels: bool | str = True
    label_kind: LabelKind = "class"
    class_map: str | None = None
    balance: float = 0.0
    download: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.image_size is not None:
            object.__setattr__(self, "image_size", as_image_size("image_size", self.image_size))
        if self.max_images is not None and self.max_images < 1:
            raise UserError(
                f"max_images is {self.max_images}; it must be at least 1. Leave it out for the default."
            )
        if self.batch_size < 2:
            raise UserError(
                f"batch_size is {self.batch_size}; it must be at least 2. Lower learning rate instead."
            )
        if self.batch_size > MOST_BATCH:
            raise UserError(
                f"batch_size is {self.batch_size}; it must be at most {MOST_BATCH}. Use supernet.accumulate and "
                "retrain.train.accumulate to add batches up."
            )
        if self.workers < 0:
            raise UserError(
                f"workers is {self.workers}; it must be 0 (load in the main process) or more. Use 0."
            )
        if (isinstance(self.holdout, float) and not 0 < self.holdout < 1) or (
            isinstance(self.holdout, int) and self.holdout < 1
        ):
            raise UserError(
                f"holdout is {self.holdout}; it must be a share between 0 and 1 or a whole number of images, "
                "since the search scores Archs on it, or the name of a split. Use 0.1."
            )
        if any(not math.isfinite(value) for value in (*(self.mean or ()), *(self.std or ()))) or any(
            value <= 0 for value in self.std or ()
        ):
            raise UserError(
                f"mean is {self.mean} and std {self.std}; both are finite, and std is above 0. Leave them out to have "
                "those of the images or the model."
            )
        if self.workers > MOST_WORKERS:
            raise UserError(
                f"workers is {self.workers}; it must be at most {MOST_WORKERS}. Use the number of cores."
            )
        if self.in_chans not in (None, 1, 3):
            raise UserError(f"in_chans is {self.in_chans}; it must be 1 (grey) or 3 (colour). Leave it out.")
        if self.on_corrupt not in ("skip", "raise"):
            raise UserError(
                f"on_corrupt is {self.on_corrupt!r}; it must be 'skip' or 'raise'."
                + nearest(self.on_corrupt, ("skip", "raise"))
            )
        self._check_labels()
        check_word("interpolation", self.interpolation, INTERPOLATIONS)
        if self.crop_pct is not None:
            _within("crop_pct", self.crop_pct, 0.1, 1.0)
        if isinstance(self.augment, str) and self.augment not in ("auto", *AUGMENTS):
            names = ("auto", *AUGMENTS)
            raise UserError(
                f"augment is {self.augment!r}; it must be one of {', '.join(names)}, or an Augment's fields."
                + nearest(self.augment, names)
            )

    def _check_labels(self) -> None:
        check_word("label_kind", self.label_kind, get_args(LabelKind))
        _within("balance", self.balance, 0.0, 1.0)
        if self.balance and (not self.labels or self.label_kind == "numbers"):
            given = "label_kind is 'numbers'" if self.labels else "labels is false"
            raise UserError(f"balance is {self.balance:g} and {given}; it goes by classes. Leave one out.")
        if self.class_map and self.label_kind == "numbers":
            raise UserError(
                f"class_map is {self.class_map!r} and label_kind is 'numbers'; numbers have no classes. Leave one out."
            )
        if not isinstance(self.target_key, str | None) and self.label_kind != "numbers":
            raise UserError(
                f"target_key is {list(self.target_key)}; one column has the classes. Name one, or use "
                "data.label_kind=numbers for numbers of several columns."
            )


def augment_for(augment: Augment | str, *, image_size: ImageSize, in_chans: int) -> Augment:
    """Return the Augment a name stands for; "auto" goes by size and channels."""
    if isinstance(augment, Augment):
        return augment
    if augment != "auto":
        return AUGMENTS[augment]
    if max(sides_of(image_size)) > 64:
        return AUGMENTS["strong"]
    return AUGMENTS["digits" if in_chans == 1 else "weak"]
