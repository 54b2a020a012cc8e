"""Which images are for what: naming the test split, and carving one part out of another, the same in every run."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from timm.utils.misc import natural_key

from vitnas.data.config import TEST_NAMES, DataConfig
from vitnas.data.sources import Source, Subset
from vitnas.errors import UserError, nearest

logger = logging.getLogger(__name__)

TEST_SHARE = 0.2  # of a dataset that has no test split of its own


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The sources of a dataset, remarks a person should read, and samples left out while opening."""

    train: Source
    test: Source
    notes: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()


def carve(targets: Sequence[int], names: Sequence[str], count: int, salt: str) -> tuple[list[int], list[int]]:
    """Split indices into (rest, carved): `count` carved, by class in proportion, each class on both sides.

    Which images are carved depends on their names and `salt` only, so a few added images move few others.
    Both lists rise.

    Raises:
        UserError: a class has one image only, or `count` cannot give one image of each class to both sides.
    """
    groups: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        groups.setdefault(target, []).append(index)
    fewest = min(map(len, groups.values()))
    if fewest < 2 or not len(groups) <= count <= len(targets) - len(groups):
        rule = (
            f"each of the {len(groups)} classes needs an image on both sides, and the smallest class has {fewest}"
            if len(groups) > 1
            else "there must be one on both sides"
        )
        raise UserError(
            f"{count} of {len(targets)} images cannot be set apart; {rule}. Give more images, or another share."
        )
    shares = _apportion({target: len(group) for target, group in groups.items()}, count)
    carved: list[int] = []
    for target, group in groups.items():
        order = sorted(group, key=lambda i: hashlib.sha256(f"{salt}/{names[i]}".encode()).digest())
        carved += order[: shares[target]]
    taken = set(carved)
    return [i for i in range(len(targets)) if i not in taken], sorted(carved)


def _apportion(sizes: dict[int, int], count: int) -> dict[int, int]:
    """Share `count` among the classes by size (largest remainder), between 1 and size - 1 each."""
    total = sum(sizes.values())
    exact = {target: count * size / total for target, size in sizes.items()}
    shares = {target: min(max(1, int(exact[target])), sizes[target] - 1) for target in sizes}
    while (missing := count - sum(shares.values())) != 0:
        step = 1 if missing > 0 else -1
        free = [target for target in sizes if 1 <= shares[target] + step <= sizes[target] - 1]
        shares[max(free, key=lambda target: (step * (exact[target] - shares[target]), -target))] += step
    return shares


def carve_test(train: Source, config: DataConfig) -> Opened:
    """Set a test split apart by file names and a constant, so that it is the same for every seed."""
    names = [train.name(i) for i in range(len(train))]
    count = max(len(set(train.targets)), math.floor(TEST_SHARE * len(train) + 0.5))
    rest, test = carve(train.targets, names, count, salt="test split")
    note = (
        f"{config.dataset} has no test split: {len(test)} of its {len(train)} images ({TEST_SHARE:.0%}, by "
        "file name) are set apart as test, the same ones in every run."
    )
    logger.warning(note)
    return Opened(train=Subset(train, rest), test=Subset(train, test), notes=(note,))


def find_test(config: DataConfig, splits: Sequence[str]) -> str | None:
    """Return the test split's name among `splits`; None when there is none under a usual name.

    Raises:
        UserError: a split that is not there was asked for by an unusual name.
    """
    base = config.test_split.partition("[")[0]
    if base in splits:
        return config.test_split
    if base not in TEST_NAMES:
        raise UserError(
            f"test_split is {config.test_split!r}; {config.dataset} has {', '.join(splits) or 'no splits'}. "
            f"Choose one of them.{nearest(base, splits)}"
        )
    return next((name for name in TEST_NAMES if name in splits), None)


def note_test_name(config: DataConfig, test_name: str) -> tuple[str, ...]:
    """Return, and log, a remark when another split than the asked one is read as test."""
    if test_name == config.test_split:
        return ()
    note = f"{config.dataset} has no split {config.test_split!r}; {test_name!r} is read as test."
    logger.warning(note)
    return (note,)


def match_classes(opened: Opened, config: DataConfig) -> None:
    """Check that train and test have the same classes, at least two, and number test's as train does.

    Raises:
        UserError: one class only, or classes that differ; the odd ones are named. Labels in one of both only.
    """
    train, test = opened.train, opened.test
    if bool(train.class_names) != bool(test.class_names):
        has, lacks = ("train", "test") if train.class_names else ("test", "train")
        raise UserError(
            f"The {has} images of {config.dataset} have labels and its {lacks} images have none; both or neither must "
            "have them. Add class folders, or use data.labels=false."
        )
    if not train.class_names:
        return
    in_train = {train.class_names[target] for target in set(train.targets)}
    in_test = {test.class_names[target] for target in set(test.targets)}
    if len(in_train) == 1:
        raise UserError(
            f"{config.dataset} has one class only, {next(iter(in_train))!r}; at least 2 are needed. Put the "
            "images of each class into a folder of their own, or use data.labels=false for images without labels."
        )
    if in_train != in_test:
        parts = []
        for split, odd in (("train", in_train - in_test), ("test", in_test - in_train)):
            names = sorted(odd, key=natural_key)
            if names:
                parts.append(f"only in {split}: {', '.join(names[:5])}" + ("..." if len(names) > 5 else ""))
        raise UserError(
            f"The classes of {config.dataset} differ between its splits ({'; '.join(parts)}); both must have "
            "the same. Rename, add or remove the odd ones."
        )
    if train.class_names != test.class_names:
        number = {name: target for target, name in enumerate(train.class_names)}
        test.targets = [number[test.class_names[target]] for target in test.targets]
        test.class_names = train.class_names
