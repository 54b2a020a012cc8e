"""Opening `hfds/`: Hugging Face datasets, of the Hub or a local folder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from timm.utils.misc import natural_key

from vitnas.data.config import DataConfig
from vitnas.data.sources import NO_LABEL, Numbers, Target
from vitnas.data.splits import Opened, find_holdout, find_test, note_test_name, said
from vitnas.errors import MissingExtra, UserError, first_line, nearest


def open_hfds(config: DataConfig) -> Opened:
    """Open `hfds/<name>`; a local folder (`hfds//absolute/path`) touches no network."""
    name = config.dataset.split("/", 1)[1]
    if not name:
        raise UserError(
            f"dataset is {config.dataset!r}; behind hfds/ stands a name of the Hub or a folder, as in hfds/cifar10 or "
            "hfds//path/to/parquet. Add it."
        )
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra(f"Dataset {config.dataset!r}", "data")
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UserError(f"dataset is {config.dataset!r}; {name} is not a folder. Correct the path.")
    import datasets

    notes = list[str]()
    with _quiet_hub():
        try:
            _check_config(config, name)
            splits = [str(split) for split in datasets.get_dataset_split_names(name, config.config_name)]
            if config.train_split.partition("[")[0] not in splits:
                raise UserError(
                    f"train_split is {config.train_split!r}; {config.dataset} has {', '.join(splits)}. "
                    f"Choose one of them.{nearest(config.train_split, splits)}"
                )
            test_name = find_test(config, splits)
            train = _hfds_source(config, name, config.train_split)
            test = None if test_name is None else _hfds_source(config, name, test_name)
            taken = {config.train_split.partition("[")[0], (test_name or "").partition("[")[0]}
            others = [split for split in splits if split not in taken]
            is_named = config.holdout in others
            holdout_name = find_holdout(config, others, notes) if test_name or is_named else None
            holdout = None if holdout_name is None else _hfds_source(config, name, holdout_name)
        except UserError:
            raise
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # not there, no network, no data files, bad slice
            raise UserError(
                f"{config.dataset} cannot be opened ({first_line(error)}); it must be a folder of data files "
                "or a dataset of the Hugging Face Hub. Check the name, and for the Hub the network."
            ) from error
    said(notes)
    if test is None or test_name is None:
        return Opened(train=train, test=train, holdout=holdout, notes=tuple(notes))
    return Opened(train=train, test=test, holdout=holdout, notes=(*note_test_name(config, test_name), *notes))


class HfdsSource:
    """A split of a Hugging Face dataset, whose images are decoded when they are read."""

    def __init__(self, dataset: Any, image_key: str, name: str) -> None:
        import datasets

        self.dataset = dataset.cast_column(image_key, datasets.Image(decode=False))
        self.image_key, self.prefix = image_key, name
        self.targets: list[Target] = [NO_LABEL] * len(dataset)
        self.class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.prefix}/{index}"

    def read(self, index: int) -> Image.Image:
        cell = self.dataset[index][self.image_key] or {}
        file = io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell.get("path")
        if not file:
            raise ValueError("the cell is empty")
        with Image.open(file) as opened:
            opened.load()
            return opened.copy()


def _check_config(config: DataConfig, name: str) -> None:
    """Refuse a set of several configurations none of which is named, or that has not the named one."""
    import datasets

    names = datasets.get_dataset_config_names(name)
    asked = config.config_name
    if asked in names or (asked is None and (len(names) < 2 or "default" in names)):
        return
    known = ", ".join(names)
    raise UserError(
        f"config_name is {asked!r}; {config.dataset} has {known}. Choose one of them.{nearest(asked or '', names)}"
        if asked is not None
        else f"{config.dataset} has the configurations {known}; one must be named. Add config_name={names[0]}."
    )


def _hfds_source(config: DataConfig, name: str, split: str) -> HfdsSource:
    import datasets

    dataset = datasets.load_dataset(name, config.config_name, split=split, cache_dir=config.root)
    features = dataset.features
    found_image = (key for key, kind in features.items() if isinstance(kind, datasets.Image))
    found_label = (key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel))
    image_key = config.input_key or next(found_image, "image")
    target_keys = config.target_key or next(found_label, "label")
    if isinstance(target_keys, str):
        target_keys = (target_keys,)
    if not config.labels:
        target_keys = ()
    for option, key in (("input_key", image_key), *(("target_key", key) for key in target_keys)):
        if key not in features:
            raise UserError(
                f"{option} is {key!r}; {config.dataset} has the columns {', '.join(features)}. Choose one of them"
                + (", or use data.labels=false." if option == "target_key" else ".")
                + nearest(key, features)
            )
    source = HfdsSource(dataset, image_key, f"{config.dataset}/{split}")
    if config.labels and config.label_kind == "numbers":
        columns = [_numbers(config, dataset, key, split) for key in target_keys]
        source.targets, source.class_names = [Numbers(row) for row in zip(*columns, strict=True)], target_keys
    elif config.labels:
        source.targets, source.class_names = _labels(config, dataset, target_keys[0], split)
    return source


def _numbers(config: DataConfig, dataset: Any, key: str, split: str) -> list[float]:
    """A column of numbers."""
    raw = list(dataset[key][:])
    for row, value in enumerate(raw):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"Image {row} of split {split!r} of {config.dataset} has {str(value)[:20]!r} in {key!r}; every image "
                "needs a finite number there. Choose another column with target_key, or leave data.label_kind out."
            )
    return [float(value) for value in raw]


def _labels(config: DataConfig, dataset: Any, key: str, split: str) -> tuple[list[Target], tuple[str, ...]]:
    """Class numbers of a column, and their names."""
    raw: list[Any] = list(dataset[key][:])
    if config.label_kind == "classes" and all(isinstance(label, list) for label in raw):
        return _several(dataset.features[key], raw)
    if any(isinstance(label, (list, dict)) for label in raw):
        raise UserError(
            f"The column {key!r} of {config.dataset} holds lists; one class per image is needed. Choose another with "
            "target_key, or use data.label_kind=classes, or data.labels=false."
        )
    if any(label is None or label == -1 for label in raw):
        raise UserError(
            f"Split {split!r} of {config.dataset} has images without a label; every image needs one. Choose "
            "another split, or use data.labels=false."
        )
    if (names := getattr(dataset.features[key], "names", None)) is not None:
        return raw, tuple(names)
    # plain numbers or words: the classes are the values that occur
    values = sorted(set(raw), key=lambda value: natural_key(str(value)))
    number = {value: index for index, value in enumerate(values)}
    return [number[value] for value in raw], tuple(str(value) for value in values)


def _several(feature: Any, raw: list[list[Any]]) -> tuple[list[Target], tuple[str, ...]]:
    """The same of a column whose cells are lists of classes."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    if names is not None:
        return [tuple(sorted({*label})) for label in raw], tuple(names)
    values = sorted({value for label in raw for value in label}, key=lambda value: natural_key(str(value)))
    number = {value: index for index, value in enumerate(values)}
    return [tuple(sorted({number[v] for v in label})) for label in raw], tuple(map(str, values))


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Hide the Hub libraries' progress bars and remarks while opening; as the user had them afterwards."""
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    remarks = logging.getLogger("huggingface_hub.repocard")
    level = remarks.level
    try:
        datasets.disable_progress_bars()
        remarks.setLevel(logging.ERROR)
        yield
    finally:
        remarks.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
