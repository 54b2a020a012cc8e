"""Opening a dataset string: `digits`, a folder of class folders or of images, `torch/...`; `hfds/` and `wds/` are in
their own files.

Every scheme returns one Source for train and one for test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from timm.data import create_dataset

from vitnas.data.class_map import mapped
from vitnas.data.config import DataConfig
from vitnas.data.folders import open_folder
from vitnas.data.hfds import open_hfds
from vitnas.data.sources import ArraySource, TorchSource, without_labels
from vitnas.data.splits import Opened, carve, carve_test
from vitnas.data.wds import open_wds
from vitnas.errors import UserError, at_home, first_line, nearest

TORCH_NAMES = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "image_folder")
NUM_DIGITS_TEST = 360


def open_sources(config: DataConfig, *, whole: bool = False) -> Opened:
    """Open the train and test sources of `config.dataset`; no image is decoded, and classes are not compared.

    Args:
        whole: of a dataset without a test split carve none: train and test are then one and the same source.

    Raises:
        UserError: the dataset is unknown, missing or empty.
        MissingExtra: the scheme needs a package that is not installed.
    """
    scheme, slash, _ = config.dataset.partition("/")
    opener = (
        OPENERS.get(scheme.lower(), _open_folder) if slash or config.dataset == "digits" else _open_folder
    )
    if isinstance(config.labels, str) and opener is not _open_folder:
        raise UserError(
            f"labels is {config.labels!r} and dataset {config.dataset!r}; a table of labels is for a folder of images. "
            "Leave labels out."
        )
    if config.label_kind == "numbers" and opener not in (_open_folder, open_hfds):
        raise UserError(
            f"label_kind is 'numbers' and dataset {config.dataset!r}; numbers are read from a table beside a folder "
            "of images, or from columns of hfds/. Leave label_kind out."
        )
    opened = opener(config)
    undivided = opened.test is opened.train
    if undivided and not whole:
        carved = carve_test(opened.train, config, opened.notes, opened.holdout)
        opened, undivided = replace(carved, corrupt=opened.corrupt), False
    if config.class_map and config.labels:
        opened = mapped(opened, at_home(config.class_map))
    if not config.labels:
        holdout = opened.holdout and without_labels(opened.holdout)
        train, test = without_labels(opened.train), without_labels(opened.test)
        opened = replace(opened, train=train, test=test, holdout=holdout)
    return replace(opened, test=opened.train) if undivided else opened


def _open_digits(config: DataConfig) -> Opened:
    """scikit-learn's handwritten digits, grey levels 0 to 16 stretched to 0 to 255; the test split never changes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels_NHWC = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    targets = [int(target) for target in bunch.target]
    labels = [str(name) for name in bunch.target_names]
    parts = carve(targets, [str(i) for i in range(len(targets))], NUM_DIGITS_TEST, salt="digits test split")
    train, test = (
        ArraySource(pixels_NHWC[part], [targets[i] for i in part], labels, f"digits/{split}")
        for split, part in zip(("train", "test"), parts, strict=True)
    )
    return Opened(train=train, test=test)


def _open_folder(config: DataConfig) -> Opened:
    """The folder that `dataset` or `root` names."""
    by_root = config.root is not None and config.dataset in (
        "",
        "folder",
        "torch/folder",
        "torch/image_folder",
    )
    text = config.root if by_root and config.root else config.dataset
    if not text:
        raise UserError(
            "no images are named; data.dataset is a folder of class folders or images, or a dataset string. Add "
            "data.dataset=path/to/images."
        )
    root = at_home(text)
    if not root.exists():
        if "://" in text:
            raise UserError(
                f"dataset is {text!r}, an address; images are read from this machine. Download them, and give their "
                "folder."
            )
        known = ("digits", "hfds/", "wds/", *(f"torch/{name}" for name in TORCH_NAMES))
        near = nearest(text, known) if root.name == text else ""
        raise UserError(
            f"dataset is {text!r}; it must be an existing folder of class folders or images, 'digits', "
            f"'torch/<name>', 'hfds/<name or folder>' or 'wds/' with root. Correct it.{near}"
        )
    if not root.is_dir():
        raise UserError(
            f"dataset is {text!r}, a file; it must be a folder of class folders or images. Unpack it first."
        )
    return open_folder(config, text)


def _open_torch(config: DataConfig) -> Opened:
    """torchvision's sets. Those it keeps as pickles are compared with their known checksums before they load."""
    name = config.dataset.split("/", 1)[1].lower()
    if name not in TORCH_NAMES:
        near = nearest(name, TORCH_NAMES)
        raise UserError(
            f"dataset is {config.dataset!r}; torch/ knows {', '.join(TORCH_NAMES)}. Use one.{near}"
        )
    if not config.root:
        raise UserError(f"{config.dataset} has no root; root is the folder it lies in. Add root=<folder>.")
    if name == "image_folder":
        return _open_folder(config)
    train, test = (_torch_source(config, split) for split in ("train", "validation"))
    return Opened(train=train, test=test)


def _torch_source(config: DataConfig, split: str) -> TorchSource:
    try:
        dataset = create_dataset(config.dataset, root=config.root, split=split, download=config.download)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{config.dataset} cannot be opened in {config.root} ({first_line(error)}); it must lie there. "
            "Correct root, or add download=true."
        ) from error
    targets = [int(target) for target in dataset.targets]
    return TorchSource(dataset, targets, list(dataset.classes), f"{config.dataset}/{split}")


OPENERS: dict[str, Callable[[DataConfig], Opened]] = {
    "digits": _open_digits,
    "torch": _open_torch,
    "hfds": open_hfds,
    "wds": open_wds,
}
