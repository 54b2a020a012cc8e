"""Other parts of train held out, for scores of more images than one holdout has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitnas.data import Data, DataConfig
from vitnas.data.folds import fold
from vitnas.errors import UserError


def opened(*, several: bool = False, count: int = 60) -> Data:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    targets = np.arange(count) % 3
    given = np.eye(3, dtype=int)[targets] | np.eye(3, dtype=int)[(targets + 1) % 3] if several else targets
    return Data.from_arrays(train=(pixels, given), config=DataConfig(holdout=9))


@pytest.mark.parametrize("several", [False, True])
def test_folds_hold_out_other_images_of_every_class(several: bool) -> None:
    data = opened(several=several)
    everything = {*data.train.places.tolist(), *data.holdout.places.tolist()}
    held: list[int] = []
    for number in range(4):
        found = fold(data, number)
        train, holdout = set(found.train.places.tolist()), found.holdout.places.tolist()
        assert len(holdout) == 9
        assert (train | {*holdout}, train & {*holdout}) == (everything, set())
        assert (found.train.split, found.holdout.split) == ("train", "holdout")
        if not several:
            assert torch.bincount(found.holdout.targets).tolist() == [3, 3, 3]
        held += holdout
    assert len({*held}) == 36
    assert fold(data, 0) is data
    assert fold(data, 2).holdout.places.tolist() == held[18:27]
    assert data.holdout.places.tolist() == held[:9], "the data itself stays as it was"


def test_too_many_folds_are_refused() -> None:
    with pytest.raises(UserError, match=r"search\.folds is above \d: 9 of \d+ images cannot be set apart"):
        fold(opened(count=40), 4)


def test_a_split_of_its_own_has_no_other_parts() -> None:
    data = opened()
    data.holdout.store = opened().holdout.store
    with pytest.raises(UserError, match="a split of its own"):
        fold(data, 1)
