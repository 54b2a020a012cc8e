"""Opening `hfds/`: Hugging Face datasets, of the Hub or a local folder."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.utils.misc import natural_key

from vitnas.data.config import DataConfig
from vitnas.data.sources import NO_LABEL, TimmSource
from vitnas.data.splits import Opened, carve_test, find_test, note_test_name
from vitnas.errors import MissingExtra, UserError, first_line, nearest


def open_hfds(config: DataConfig) -> Opened:
    """Open `hfds/<name>`; a local folder (`hfds//absolute/path`) touches no network."""
    name = config.dataset.split("/", 1)[1]
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra(f"Dataset {config.dataset!r}", "data")
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UserError(f"dataset is {config.dataset!r}; {name} is not a folder. Correct the path.")
    import datasets

    with _quiet_hub():
        try:
            splits = [str(split) for split in datasets.get_dataset_split_names(name)]
            if config.train_split.partition("[")[0] not in splits:
                raise UserError(
                    f"train_split is {config.train_split!r}; {config.dataset} has {', '.join(splits)}. "
                    f"Choose one of them.{nearest(config.train_split, splits)}"
                )
            test_name = find_test(config, splits)
            train = _hfds_source(config, name, config.train_split)
            test = None if test_name is None else _hfds_source(config, name, test_name)
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
    if test is None or test_name is None:
        return carve_test(train, config)
    return Opened(train=train, test=test, notes=note_test_name(config, test_name))


def _hfds_source(config: DataConfig, name: str, split: str) -> TimmSource:
    import datasets

    features = datasets.load_dataset(name, split=split, cache_dir=config.root).features
    found_image = (key for key, kind in features.items() if isinstance(kind, datasets.Image))
    found_label = (key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel))
    image_key = config.input_key or next(found_image, "image")
    target_key = config.target_key or next(found_label, "label")
    if not config.labels:  # timm's reader must have a column
        target_key = image_key
    for option, key in (("input_key", image_key), ("target_key", target_key)):
        if key not in features:
            raise UserError(
                f"{option} is {key!r}; {config.dataset} has the columns {', '.join(features)}. Choose one of them"
                + (", or use data.labels=false." if option == "target_key" else ".")
                + nearest(key, features)
            )
    dataset = create_dataset(
        config.dataset, root=config.root, split=split, input_key=image_key, target_key=target_key
    )
    name = f"{config.dataset}/{split}"
    if not config.labels:
        return TimmSource(dataset, [NO_LABEL] * len(dataset), (), name)
    raw: list[Any] = list(dataset.reader.dataset[target_key][:])
    if any(label is None or label == -1 for label in raw):
        raise UserError(
            f"Split {split!r} of {config.dataset} has images without a label; every image needs one. Choose "
            "another split, or use data.labels=false."
        )
    class_names = getattr(features[target_key], "names", None)
    if class_names is None:  # plain numbers or words: the classes are the values that occur
        values = sorted(set(raw), key=lambda value: natural_key(str(value)))
        number = {value: index for index, value in enumerate(values)}
        raw, class_names = [number[value] for value in raw], [str(value) for value in values]
    return TimmSource(dataset, raw, class_names, name)


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
