"""What the loop gives a Task: the same mixed images wherever a batch comes again, whatever is drawn in between."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from vitnas.data import Augment, TrainBatches, synthetic
from vitnas.train import Batch, Classification, Engine, Task, TokenMixup
from vitnas.train.feed import Feed
from vitnas.train.optim import make_mixup

DATA = synthetic(num_classes=4, image_size=8, n=44, seed=0)  # four batches of 8 an epoch
EPOCH = 4


@pytest.mark.parametrize("by_cells", [False, True])
def test_mixed_images_come_again_too(by_cells: bool) -> None:
    task: Task = TokenMixup(num_classes=4, grid=(2, 2)) if by_cells else Classification()
    augment = Augment() if by_cells else Augment(mixup=0.8, cutmix=1.0)
    engine = Engine(cpu=True)

    def given(epoch_views: int | None, seed: int = 0, start: int = 0) -> list[Batch]:
        batches = TrainBatches(DATA.train, augment, batch_size=8, seed=0, epoch_views=epoch_views)
        mixup = make_mixup(augment, 4, 8)
        feed = Feed(batches=batches, task=task, mixup=mixup, seed=seed, engine=engine)
        found = []
        for batch in itertools.islice(feed.from_step(start), 2 * EPOCH - start):
            random.random(), np.random.random(), torch.rand(start + 1)  # as dropout and others do
            found.append(batch)
        return found

    def assert_same(got: Batch, want: Batch) -> None:
        torch.testing.assert_close(got.images_BCHW, want.images_BCHW, rtol=0, atol=0)
        torch.testing.assert_close(got.targets, want.targets, rtol=0, atol=0)
        assert got.at == want.at

    whole, turns = given(None), given(1)
    raw, _, _ = TrainBatches(DATA.train, augment, batch_size=8, seed=0).load(0)
    assert not torch.equal(whole[0].images_BCHW, raw)
    for index in range(EPOCH):
        assert_same(turns[index], whole[index])
        assert_same(turns[index + EPOCH], whole[index])
    assert_same(given(None, start=3)[0], whole[3])
    for other in (whole[EPOCH], given(None, seed=1)[0]):
        assert not torch.equal(other.images_BCHW, whole[0].images_BCHW)
