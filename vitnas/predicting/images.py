"""Labelled images of a dataset as a network takes them, for one look at how often it is right."""

from __future__ import annotations

from datetime import UTC, datetime
from math import prod
from pathlib import Path

from vitnas.data import DataConfig, Images, Readings
from vitnas.data.dataset_strings import open_sources
from vitnas.data.images import Form, Split, Store, require_labels
from vitnas.data.open import Reading
from vitnas.data.sources import Source, Subset, renumbered
from vitnas.data.splits import match_classes
from vitnas.errors import UserError, check_word
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
) -> tuple[Images, str]:
    """Images of `config`'s dataset as a network takes them, with its numbers of classes, and which of them they are.

    Args:
        form: of the network; what `config` says of size and constants is not looked at.
        own: the network's classes by name; [] where it does not name them.
        split: `test`, `holdout`, `train` or `all`; None is the test split, or all of a dataset that has no split.
        log: where a look at the test split is written down.
        what: looks at it.

    Raises:
        UserError: no such dataset or split, other classes than the network's, or images without labels.
    """
    if split is not None:
        check_word("split", split, SPLITS)
    opened = match_classes(open_sources(config), config)
    whole = _whole(opened.train, opened.test)
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
    numbers = matched_classes(own, source.class_names, num_classes) if source.class_names else None
    targets = source.targets if numbers is None else renumbered(source.targets, numbers)
    named = _Named(source, targets, tuple(own) if own else source.class_names)
    kind: Split = "holdout" if told == "holdout" else "train" if told == "train" else "test"
    store = Store(named, form, whole=False, on_corrupt=config.on_corrupt)
    store.load(len(named) * prod(form.input_size))
    images = Images(store, kind)
    require_labels(images.targets, what)
    if told == "test":
        earlier = Readings.load(log).readings if log.exists() else ()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        Readings((*earlier, Reading(now, len(images), what))).save(log)
    return images, told


class _Named:
    """Another source with other targets and names of classes."""

    def __init__(
        self, source: Source, targets: list[int | tuple[int, ...]], class_names: tuple[str, ...]
    ) -> None:
        self.source, self.targets, self.class_names = source, targets, class_names
        self.name, self.read = source.name, source.read

    def __len__(self) -> int:
        return len(self.source)


def _whole(train: Source, test: Source) -> Source | None:
    """What train and test were both carved out of, if they were."""
    if isinstance(train, Subset) and isinstance(test, Subset) and train.source is test.source:
        return train.source
    return None
