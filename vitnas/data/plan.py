"""What was read of a dataset, in a few lines, for whoever is about to train on it."""

from __future__ import annotations

import torch

from vitnas.data.open import Data
from vitnas.grids import sides_of


def plan(data: Data) -> tuple[str, ...]:
    """Splits, classes, what images become, and what is left out; five lines at most."""
    train, holdout, config = len(data.train), len(data.holdout), data.config
    whence = f"the split {config.holdout!r}" if isinstance(config.holdout, str) else "the validation split"
    held = "carved out of train" if data.holdout.store is data.train.store else whence
    tested = "carved out too" if any("has no test split" in note for note in data.notes) else "a split"
    height, width = sides_of(data.image_size)
    chans = "grey" if data.in_chans == 1 else "colour"
    lines = [
        f"images   {config.dataset}: {train + holdout + data.num_test:,}, in {chans}, taken at "
        f"{height} x {width} pixels",
        f"splits   train {train:,}, holdout {holdout:,} ({held}), test {data.num_test:,} ({tested})",
    ]
    if data.num_classes:
        lines.append(_classes(data))
    if data.corrupt:
        lines.append(f"skipped  {len(data.corrupt)} that cannot be read, such as {data.corrupt[0]}")
    return tuple(lines)


def _classes(data: Data) -> str:
    """How many classes, and the smallest and the largest; or what the numbers are in train."""
    targets, scale = data.train.targets, data.train.scale
    if scale is not None:
        each = zip(data.class_names, scale.restored(targets).T.tolist(), scale.mean, scale.std, strict=True)
        told = (
            f"{name} from {min(row):.4g} to {max(row):.4g} (mean {mean:.4g}, std {std:.3g})"
            for name, row, mean, std in each
        )
        return f"numbers  {'; '.join(told)}"
    counts_Y = targets.sum(0) if targets.dim() == 2 else torch.bincount(targets, minlength=data.num_classes)
    least, most = int(counts_Y.argmin()), int(counts_Y.argmax())
    names = data.class_names
    several = ", several to an image" if targets.dim() == 2 else ""
    if counts_Y[least] == counts_Y[most]:
        return f"classes  {data.num_classes}{several}, of {int(counts_Y[most])} train images each"
    return (
        f"classes  {data.num_classes}{several}; the smallest, {names[least]!r}, has {int(counts_Y[least])} train "
        f"images, the largest, {names[most]!r}, {int(counts_Y[most])}"
    )
