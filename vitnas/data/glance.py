"""`glance(config)`: how many images there are and how large, before any is decoded, for a recipe that goes by that."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from statistics import median

from PIL import Image

from vitnas.data.config import TEST_NAMES, VALIDATION_NAMES, DataConfig
from vitnas.data.dataset_strings import OPENERS, open_sources
from vitnas.data.folders import IMAGE_TYPES
from vitnas.data.images import UNREADABLE, quiet_pillow
from vitnas.errors import UserError, at_home

NUM_LOOKED = 32


@dataclass(frozen=True)
class Glance:
    """Images in all splits together, the side in pixels that half of those looked at reach with their shorter one, and
    whether a split beside test is the holdout."""

    images: int
    side: int
    has_holdout: bool = False


def glance(config: DataConfig) -> Glance | None:
    """Look at a dataset without opening it as one; None where there is nothing, which `open_data` then says better.

    Of folders files are counted and the headers of a few are read.
    """
    scheme, slash, _ = config.dataset.partition("/")
    if scheme.lower() in OPENERS and (slash or config.dataset == "digits"):
        try:
            opened = open_sources(config)
        except UserError:
            return None
        splits = [opened.train, opened.test, *([opened.holdout] if opened.holdout else [])]
        count = sum(map(len, splits))
        sizes = [opened.train.read(i).size for i in _few(len(opened.train))]
        return Glance(count, _side(sizes), opened.holdout is not None)
    root = at_home(config.dataset or config.root or "")
    if not (config.dataset or config.root) or not root.is_dir():
        return None
    paths, folders, sizes = list[str](), set[str](), list[tuple[int, int]]()
    for folder, inside, names in os.walk(root):
        folders.update(word for name in inside for word in re.findall("[a-z]+", name.lower()))
        paths += [
            os.path.join(folder, name)
            for name in names
            if name.lower().endswith(IMAGE_TYPES) and not name.startswith("._")
        ]
    with quiet_pillow():
        for place in _few(len(paths)):
            try:
                with Image.open(paths[place]) as image:
                    sizes.append(image.size)
            except UNREADABLE:
                continue
    validation = folders & {*VALIDATION_NAMES}
    has_holdout = bool(validation and folders & ({*TEST_NAMES} - {*VALIDATION_NAMES}))
    return Glance(len(paths), _side(sizes), has_holdout) if sizes else None


def _few(count: int) -> list[int]:
    return sorted({place * count // NUM_LOOKED for place in range(NUM_LOOKED)}) if count else []


def _side(sizes: list[tuple[int, int]]) -> int:
    return int(median(map(min, sizes)))
