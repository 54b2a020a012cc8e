"""Opening a dataset string: `digits`, a folder of class folders or of images, `torch/...`; `hfds/` and `wds/` are in
their own files.

Every scheme returns one Source for train and one for test.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from timm.data import create_dataset

from vitnas.data.config import TEST_NAMES, TRAIN_NAMES, DataConfig
from vitnas.data.hfds import open_hfds
from vitnas.data.sources import NO_LABEL, ArraySource, Source, Subset, TimmSource, without_labels
from vitnas.data.splits import Opened, carve, carve_test, find_test, note_test_name
from vitnas.data.wds import open_wds
from vitnas.errors import UserError, first_line, nearest

IMAGE_TYPES = ".png;.jpg;.jpeg;.bmp;.gif;.webp;.tif;.tiff;.ppm;.pgm"
TORCH_NAMES = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "image_folder")
NUM_DIGITS_TEST = 360


def open_sources(config: DataConfig) -> Opened:
    """Open the train and test sources of `config.dataset`; no image is decoded, and classes are not compared.

    Raises:
        UserError: the dataset is unknown, missing or empty.
        MissingExtra: the scheme needs a package that is not installed.
    """
    scheme, slash, _ = config.dataset.partition("/")
    opener = (
        OPENERS.get(scheme.lower(), _open_folder) if slash or config.dataset == "digits" else _open_folder
    )
    opened = opener(config)
    if not config.labels:
        opened = replace(opened, train=without_labels(opened.train), test=without_labels(opened.test))
    return opened


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
    """`train/` and `test/` (or `val/`) folders of class folders; or class folders alone, then test is carved. The same
    of images that lie in no class folder, which have no labels."""
    by_root = config.root is not None and config.dataset in (
        "",
        "folder",
        "torch/folder",
        "torch/image_folder",
    )
    text = config.root if by_root and config.root else config.dataset
    root = Path(text).expanduser()
    if not root.exists():
        known = ("digits", "hfds/", "wds/", *(f"torch/{name}" for name in TORCH_NAMES))
        raise UserError(
            f"dataset is {text!r}; it must be an existing folder of class folders or images, 'digits', "
            f"'torch/<name>', 'hfds/<name or folder>' or 'wds/' with root. Correct it.{nearest(text, known)}"
        )
    if not root.is_dir():
        raise UserError(
            f"dataset is {text!r}, a file; it must be a folder of class folders or images. Unpack it first."
        )
    inside = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    train_name = next((name for name in (config.train_split, *TRAIN_NAMES) if name in inside), None)
    if train_name is None:
        if odd := [name for name in TEST_NAMES if name in inside]:
            raise UserError(f"{text} has the folder {odd[0]!r} but no 'train'; both are needed. Add 'train'.")
        return carve_test(_folder_source(root, config.labels), config)
    test_name = find_test(config, inside)
    train = _folder_source(root / train_name, config.labels)
    if test_name is None:
        return carve_test(train, config)
    test = _folder_source(root / test_name, config.labels)
    return Opened(train=train, test=test, notes=note_test_name(config, test_name))


def _folder_source(root: Path, labels: bool) -> Source:
    dataset = _folder_dataset(root, None)
    paths = [os.path.relpath(path, root) for path, _ in dataset.reader.samples]
    meant = [index for index, path in enumerate(paths) if not _left_by_a_system(path)]
    if not labels or all(os.path.dirname(paths[index]) == "" for index in meant):
        if not meant:
            raise _no_images(root)
        return Subset(TimmSource(dataset, [NO_LABEL] * len(paths), (), paths), meant)
    names = [name for name in dataset.reader.class_to_idx if name]
    if len(names) < len(dataset.reader.class_to_idx):  # timm makes a class "" of images beside the folders
        dataset = _folder_dataset(root, {name: number for number, name in enumerate(names)})
    samples = dataset.reader.samples
    return TimmSource(
        dataset,
        [target for _, target in samples],
        names,
        [os.path.relpath(path, root) for path, _ in samples],
    )


def _left_by_a_system(path: str) -> bool:
    """Hidden files and folders, and what macOS packs beside the files of an archive: no images of a person's."""
    return any(part.startswith(".") or part == "__MACOSX" for part in Path(path).parts)


def _folder_dataset(root: Path, class_map: dict[str, int] | None):  # type: ignore[no-untyped-def]
    try:
        return create_dataset(
            "", root=str(root), search_split=False, input_key=IMAGE_TYPES, class_map=class_map
        )
    except RuntimeError as error:  # timm's word for no images
        raise _no_images(root) from error


def _no_images(root: Path) -> UserError:
    return UserError(
        f"{root} has no images ({IMAGE_TYPES.replace(';', ' ')}); it must hold one folder of images per class, or "
        "images without labels. Check the path."
    )


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


def _torch_source(config: DataConfig, split: str) -> TimmSource:
    try:
        dataset = create_dataset(config.dataset, root=config.root, split=split, download=config.download)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{config.dataset} cannot be opened in {config.root} ({first_line(error)}); it must lie there. "
            "Correct root, or add download=true."
        ) from error
    targets = [int(target) for target in dataset.targets]
    return TimmSource(dataset, targets, list(dataset.classes), f"{config.dataset}/{split}")


OPENERS: dict[str, Callable[[DataConfig], Opened]] = {
    "digits": _open_digits,
    "torch": _open_torch,
    "hfds": open_hfds,
    "wds": open_wds,
}
