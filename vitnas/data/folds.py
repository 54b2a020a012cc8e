"""`fold(data, number)`: the same images with another part of train held out, for cross-validation."""

from __future__ import annotations

import copy

from torch import Tensor

from vitnas.data.images import Images
from vitnas.data.open import Data
from vitnas.data.sources import Numbers, Target
from vitnas.data.splits import carve
from vitnas.errors import UserError


def fold(data: Data, number: int) -> Data:
    """Return the same images with another part of train as the holdout, as large; the parts of different folds have no
    image in common. Fold 0 is `data` itself.

    Raises:
        UserError: the holdout is a split of its own, or train has not so many such parts.
    """
    if not number:
        return data
    if data.holdout.store is not data.train.store:
        raise UserError(
            f"search.folds is above 1 and the holdout of {data.config.dataset} is a split of its own; other parts are "
            "held out where it is carved out of train. Set search.folds=1, or data.holdout=0.1."
        )
    found, everything = copy.copy(data), Images(data.train.store, "train")
    held = {*data.holdout.places.tolist()}
    for later in range(1, number + 1):
        left = [place for place in range(len(everything)) if place not in held]
        try:
            _, some = carve(
                [_target(everything.targets[place]) for place in left],
                [everything.name(place) for place in left],
                len(data.holdout),
                f"holdout/{data.config.seed}/{later}",
                data.class_names,
            )
        except UserError as error:
            raise UserError(f"search.folds is above {later}: {error}") from error
        carved = sorted(left[place] for place in some)
        rest = sorted({*range(len(everything))} - {*carved})
        found.train = Images(everything.store, "train", rest)
        found.holdout = Images(everything.store, "holdout", carved)
        held.update(carved)
    return found


def _target(target: Tensor) -> Target:
    """A row of an Images' targets as a Source has it."""
    if target.is_floating_point():
        return Numbers(tuple(target.tolist()))
    return int(target) if target.dim() == 0 else tuple(target.nonzero()[:, 0].tolist())
