"""Opening `wds/`: shards of a web dataset, read into memory."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from pathlib import Path

from timm.data import create_dataset

from vitnas.data.config import TEST_NAMES, DataConfig
from vitnas.data.sources import ListSource, shrink
from vitnas.data.splits import Opened, note_test_name
from vitnas.errors import MissingExtra, UserError
from vitnas.grids import sides_of


def open_wds(config: DataConfig) -> Opened:
    """Open shards. They are a stream, so they are read into memory once, at the size worth keeping."""
    if importlib.util.find_spec("webdataset") is None:
        raise MissingExtra(f"Dataset {config.dataset!r}", "data")
    root = config.root or config.dataset.split("/", 1)[1]
    if not Path(root).is_dir() or not root:
        raise UserError(
            f"{config.dataset} has the root {root!r}; it must be the folder of the shards. Add root=<folder>."
        )
    try:
        train, corrupt = _stream(config, root, config.train_split)
    except RuntimeError as error:
        raise UserError(
            f"train_split is {config.train_split!r}, and {root} has no such shards. Name a split of info.json, or "
            "shards like 'train-{000..010}.tar'."
        ) from error
    for name in dict.fromkeys((config.test_split, *(TEST_NAMES if config.test_split in TEST_NAMES else ()))):
        with contextlib.suppress(RuntimeError):  # timm's word for a split that info.json lacks
            test, more = _stream(config, root, name)
            return Opened(
                train=train, test=test, notes=note_test_name(config, name), corrupt=(*corrupt, *more)
            )
    return Opened(train=train, test=train, corrupt=corrupt)


def _stream(config: DataConfig, root: str, split: str) -> tuple[ListSource, tuple[str, ...]]:
    """Read one split; also returns what timm's reader said about each sample that it left out."""
    height, width = (round(side / (config.crop_pct or 0.875)) for side in sides_of(config.image_size or 224))
    remarks = _Remarks()
    logger = logging.getLogger("timm.data.readers.reader_wds")
    logger.addHandler(remarks)
    pictures, targets = [], []
    try:
        dataset = create_dataset(
            "wds/",
            root=root,
            split=split,
            input_img_mode="",
            input_key=config.input_key or "jpg;jpeg;png;webp",
            target_key=str(config.target_key) if config.target_key else None,
        )
        for picture, target in dataset:
            pictures.append(shrink(picture, (height, width), config.interpolation))
            targets.append(int(target))
    finally:
        logger.removeHandler(remarks)
    if not pictures:
        raise UserError(
            f"Split {split!r} of {root} has no readable images; shards must hold jpg and cls. Check."
        )
    class_names = [str(number) for number in range(max(targets) + 1)]
    return ListSource(pictures, targets, class_names, f"wds/{split}"), tuple(remarks.lines)


class _Remarks(logging.Handler):
    """Keeps what timm's reader says about the samples that it leaves out."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "Handling webdataset error" in message:
            self.lines.append(message)
