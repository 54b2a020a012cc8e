"""Which images are for what: naming the test split, and carving one part out of another, the same in every run."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from timm.utils.misc import natural_key

from vitnas.data.config import TEST_NAMES, VALIDATION_NAMES, DataConfig
from vitnas.data.sources import Numbers, Source, Subset, Target, classes_of, numbers_in, renumbered
from vitnas.errors import UserError, nearest

logger = logging.getLogger(__name__)

UNEQUAL = 10  # times the smallest class that the largest may have before a note says so
TEST_SHARE = 0.2  # of a dataset that has no test split of its own


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The sources of a dataset, remarks a person should read, and samples left out while opening.

    Train and test are the same one where a dataset has no test split and none is carved.
    """

    train: Source
    test: Source
    holdout: Source | None = None  # carved out of train where there is none
    notes: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()


def carve(
    targets: Sequence[Target], names: Sequence[str], count: int, salt: str, class_names: Sequence[str] = ()
) -> tuple[list[int], list[int]]:
    """Split indices into (rest, carved): `count` carved, by class in proportion, each class on both sides.

    Which images are carved depends on their names and `salt` only, so a few added images move few others.
    Both lists rise. Images that may have several classes go by their rarest one, as far as there are two of them;
    those with numbers by chance.

    Raises:
        UserError: a class has one image only, or `count` cannot give one image of each class to both sides.
    """
    groups: dict[int, list[int]] = {}
    for index, target in enumerate(rarest(targets)):
        groups.setdefault(target, []).append(index)
    smallest = min(groups, key=lambda target: len(groups[target]))
    fewest = len(groups[smallest])
    if fewest < 2 or not len(groups) <= count <= len(targets) - len(groups):
        name = f", {class_names[smallest]!r}," if class_names else ""
        rule = (
            f"each of the {len(groups)} classes needs an image on both sides, and the smallest class{name} has {fewest}"
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


def rarest(targets: Sequence[Target]) -> list[int]:
    """A class of each image: its own, or the rarest of several; -1 where it has none, or is alone in that."""
    counts = Counter(
        number for target in targets if not isinstance(target, int) for number in classes_of(target)
    )
    found = [min(classes_of(target), key=lambda n: (counts[n], n), default=-1) for target in targets]
    if not counts:
        return found
    alone = {number for number, count in Counter(found).items() if count < 2}
    return [-1 if number in alone else number for number in found]


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


def carve_test(
    train: Source, config: DataConfig, notes: Sequence[str] = (), holdout: Source | None = None
) -> Opened:
    """Set a test split apart by file names and a constant, so that it is the same for every seed; `notes` are kept."""
    names = [train.name(i) for i in range(len(train))]
    count = max(len({*rarest(train.targets)}), math.floor(TEST_SHARE * len(train) + 0.5))
    rest, test = carve(train.targets, names, count, "test split", train.class_names)
    note = (
        f"{config.dataset} has no test split: {len(test)} of its {len(train)} images ({TEST_SHARE:.0%}, by "
        "file name) are set apart as test, the same ones in every run."
    )
    logger.warning(note)
    return Opened(train=Subset(train, rest), test=Subset(train, test), holdout=holdout, notes=(note, *notes))


def find_test(config: DataConfig, splits: Sequence[str]) -> str | None:
    """Return the test split's name among `splits`; None when there is none under a usual name.

    Raises:
        UserError: a split that is not there was asked for by an unusual name.
    """
    base = config.test_split.partition("[")[0]
    if config.holdout in splits and base != config.holdout:
        splits = [name for name in splits if name != config.holdout]
    if base in splits:
        return config.test_split
    if base not in TEST_NAMES:
        raise UserError(
            f"test_split is {config.test_split!r}; {config.dataset} has {', '.join(splits) or 'no splits'}. "
            f"Choose one of them.{nearest(base, splits)}"
        )
    return next((name for name in TEST_NAMES if name in splits), None)


def find_holdout(config: DataConfig, splits: Sequence[str], notes: list[str]) -> str | None:
    """Return which of `splits`, apart from train and test, is the holdout; None where it is carved out of train.

    Raises:
        UserError: a split that is not there was asked for.
    """
    if isinstance(config.holdout, str):
        if config.holdout in splits:
            return config.holdout
        raise UserError(
            f"holdout is {config.holdout!r}; {config.dataset} has {', '.join(splits) or 'no other splits'}. Choose one "
            f"of them, or give a share or a number of images.{nearest(config.holdout, splits)}"
        )
    found = next((name for name in VALIDATION_NAMES if name in splits), None)
    if found is not None and config.holdout is not None:
        notes.append(
            f"The split {found!r} of {config.dataset} is left out, as holdout={config.holdout} is carved out of train. "
            "Leave holdout out to use it."
        )
        return None
    return found


def said(notes: Sequence[str]) -> None:
    """Log what a person should know."""
    for note in notes:
        logger.warning(note)


def note_test_name(config: DataConfig, test_name: str) -> tuple[str, ...]:
    """Return, and log, a remark when another split than the asked one is read as test."""
    if test_name == config.test_split:
        return ()
    note = f"{config.dataset} has no split {config.test_split!r}; {test_name!r} is read as test."
    logger.warning(note)
    return (note,)


def match_classes(opened: Opened, config: DataConfig) -> Opened:
    """Number the classes of test and holdout as train does, and note which of train's they lack.

    Raises:
        UserError: one class only, or one that train lacks; the odd ones are named. Labels in one of them only.
    """
    train, notes = opened.train, list[str]()
    others = {"test": opened.test} | ({} if opened.holdout is None else {"holdout": opened.holdout})
    for split, other in others.items():
        if bool(train.class_names) != bool(other.class_names):
            has, lacks = ("train", split) if train.class_names else (split, "train")
            raise UserError(
                f"The {has} images of {config.dataset} have labels and its {lacks} images have none; both or neither "
                "must have them. Add class folders, or use data.labels=false."
            )
    if not train.class_names:
        if config.labels and config.label_kind == "numbers":
            raise UserError(
                f"label_kind is 'numbers' and the images of {config.dataset} have no labels; a table says numbers. "
                "Give data.labels=labels.csv, or leave label_kind out."
            )
        return opened
    kinds = {
        "classes": (tuple, "several are said by a table or by lists"),
        "numbers": (Numbers, "a table says numbers"),
    }
    kind, rule = kinds.get(config.label_kind, (object, ""))
    if not all(isinstance(target, kind) for target in train.targets):
        raise UserError(
            f"label_kind is {config.label_kind!r} and each image of {config.dataset} has one class, by its folder; "
            f"{rule}. Give data.labels=labels.csv, or leave label_kind out."
        )
    in_train = {train.class_names[target] for target in numbers_in(train.targets)}
    if len(in_train) == 1:
        raise UserError(
            f"{config.dataset} has one class only, {next(iter(in_train))!r}; at least 2 are needed. Put the "
            "images of each class into a folder of their own, or use data.labels=false for images without labels."
        )
    for split, other in others.items():
        in_other = {other.class_names[target] for target in numbers_in(other.targets)}
        odd, missing = in_other - in_train, in_train - in_other
        if odd:
            also = f"only in train: {listed(missing)}; " if missing else ""
            raise UserError(
                f"The classes of {config.dataset} differ between its splits ({also}only in {split}: {listed(odd)}); "
                "train must have every class. Rename, add or remove the odd ones."
            )
        if missing:
            notes.append(
                f"The {split} split of {config.dataset} has no image of {listed(missing)}; how well they are told "
                "apart is not seen there."
            )
        if train.class_names != other.class_names:
            number = {name: target for target, name in enumerate(train.class_names)}
            other.targets = renumbered(other.targets, [number.get(name, -1) for name in other.class_names])
            other.class_names = train.class_names
    notes += _unequal(config, train)
    said(notes)
    return replace(opened, notes=(*opened.notes, *notes))


def _unequal(config: DataConfig, train: Source) -> list[str]:
    """What accuracy does not say of these labels."""
    if config.label_kind == "classes":
        return [
            f"The images of {config.dataset} may have several classes: what is called accuracy is mean average "
            "precision."
        ]
    if config.label_kind == "numbers":
        return []
    counts = Counter(target for target in train.targets if isinstance(target, int)).most_common()
    (large, most), (small, fewest) = counts[0], counts[-1]
    if most < UNEQUAL * fewest:
        return []
    advice = "" if config.balance else " data.balance=1 shows rare classes as often in training."
    return [
        f"The classes of {config.dataset} are unequal: {train.class_names[large]!r} has {most} of {len(train)} train "
        f"images, {train.class_names[small]!r} {fewest}. Always to say the larger one is {most / len(train):.0%} "
        f"accuracy; look at balanced accuracy.{advice}"
    ]


def listed(names: Collection[str]) -> str:
    """Up to five of them, in the order of names."""
    found = sorted(names, key=natural_key)
    return ", ".join(found[:5]) + ("..." if len(found) > 5 else "")
