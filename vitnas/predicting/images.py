"""Labelled images of a dataset as a network takes them, for one look at how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from math import prod
from pathlib import Path

from vitnas.data import DataConfig, Images, Readings
from vitnas.data.dataset_strings import open_sources
from vitnas.data.images import Form, Split, Store, require_labels
from vitnas.data.open import Reading
from vitnas.data.sources import Numbers, Source, Subset, Target, renumbered
from vitnas.data.splits import match_classes
from vitnas.errors import UserError, check_word
from vitnas.model.scale import Scale
from vitnas.predicting.examine import matched_classes

SPLITS = ("test", "holdout", "train", "all")


def labelled(
    config: DataConfig,
    form: Form,
    *,
    own: list[str],
    num_classes: int,
    split: str | None,
    log: Path,
    what: str,
    scale: Scale | None = None,
) -> tuple[Images, str]:
    """Images of `config`'s dataset as a network takes them, with its numbers of classes, and which of them they are.

    Args:
        form: of the network; what `config` says of size and constants is not looked at.
        own: the network's classes by name; [] where it does not name them.
        split: `test`, `holdout`, `train` or `all`; None is the test split, or all of a dataset that has no split.
        log: where a look at the test split is written down.
        what: looks at it.
        scale: of a network that tells numbers.

    Raises:
        UserError: no such dataset or split, other classes than the network's, or images without labels.
    """
    if split is not None:
        check_word("split", split, SPLITS)
    if scale is not None and config.labels and config.label_kind == "class":
        config = replace(config, label_kind="numbers", target_key=config.target_key or tuple(own) or None)
    opened = match_classes(open_sources(config, whole=split in (None, "all")), config)
    whole = opened.train if opened.train is opened.test else None
    if split == "holdout" and opened.holdout is None:
        raise UserError(
            f"split is 'holdout', and {config.dataset} has no validation split. Use test, train or all."
        )
    source: Source
    if whole is not None and split in (None, "all"):
        source, told = whole, "all"
    elif split == "all":
        raise UserError(f"split is 'all', and {config.dataset} has splits. Use test, train or holdout.")
    else:
        told = split or "test"
        kept = {"test": opened.test, "train": opened.train, "holdout": opened.holdout}[told]
        assert kept is not None
        source = kept
    if scale is None and any(isinstance(target, Numbers) for target in source.targets[:1]):
        raise UserError(
            f"the images of {config.dataset} have numbers and MODEL tells classes; both must be the same. Leave "
            "data.label_kind out."
        )
    named = Subset(source, range(len(source)))
    if scale is not None and source.class_names:
        named.targets = _in_order(
            named.targets, source.class_names, own or list(map(str, range(num_classes)))
        )
    elif (
        source.class_names and (numbers := matched_classes(own, source.class_names, num_classes)) is not None
    ):
        named.targets = renumbered(named.targets, numbers)
    if own and source.class_names:  # images without labels have no classes
        named.class_names = tuple(own)
    kind: Split = "holdout" if told == "holdout" else "train" if told == "train" else "test"
    store = Store(named, form, whole=False, on_corrupt=config.on_corrupt)
    store.scale = scale
    store.load(len(named) * prod(form.input_size))
    images = Images(store, kind)
    require_labels(images.targets, what)
    if told == "test":
        earlier = Readings.load(log).readings if log.exists() else ()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        Readings((*earlier, Reading(now, len(images), what))).save(log)
    return images, told


def _in_order(targets: list[Target], given: Sequence[str], own: Sequence[str]) -> list[Target]:
    """Numbers in the order of the network's."""
    if {*given} != {*own}:
        raise UserError(
            f"the images have the numbers {', '.join(given)} and MODEL tells {', '.join(own)}; both must be the same. "
            "Name the columns with data.target_key, as in data.target_key='[x,y]'."
        )
    places = [given.index(name) for name in own]
    return [
        Numbers(tuple(target.values[place] for place in places))
        for target in targets
        if isinstance(target, Numbers)
    ]
