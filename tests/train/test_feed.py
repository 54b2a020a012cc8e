"""What the loop gives a Task: the same mixed images wherever a batch comes again, whatever trains on them."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from vitnas.data import Augment, TrainBatches, synthetic
from vitnas.model import build
from vitnas.sample import Fixed
from vitnas.space import autoformer
from vitnas.train import Batch, Classification, Task, TokenMixup, TrainConfig, fit
from vitnas.train.task import Outputs

SPACE = autoformer("micro", image_size=8, patch_size=4, num_classes=4, embed_dims=(16, 32), depths=(1,))
DATA = synthetic(num_classes=4, image_size=8, n=44, seed=0)


class Noting(Task):
    """Learns by `task` and notes what it was given."""

    def __init__(self, task: Task) -> None:
        self.task, self.wants, self.given = task, task.wants, list[Batch]()

    def mix(self, batch: Batch) -> Batch:
        return self.task.mix(batch)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        random.random(), torch.rand(3)  # as dropout does
        self.given.append(batch)
        return self.task(outputs, batch, taught)


@pytest.mark.parametrize("by_cells", [False, True])
def test_mixed_images_come_again_too(by_cells: bool) -> None:
    learned: Task = TokenMixup(num_classes=4, grid=(2, 2)) if by_cells else Classification()
    augment = Augment() if by_cells else Augment(mixup=0.8, cutmix=1.0)

    def given(accumulate: int, drop_path: float, views: int | None, seed: int = 0) -> list[Batch]:
        loader = TrainBatches(DATA.train, augment, batch_size=8, seed=0, epoch_views=views)
        task, config = Noting(learned), TrainConfig(epochs=2, accumulate=accumulate, drop_path=drop_path)
        fit(
            build(SPACE.smallest()),
            task,
            Fixed(),
            loader,
            config=config,
            augment=augment,
            num_classes=4,
            seed=seed,
        )
        return task.given

    whole, other = given(1, 0.0, None), given(2, 0.5, 1)
    epoch = len(whole) // 2
    for index in range(epoch):
        for again in (other[index], other[index + epoch]):
            torch.testing.assert_close(again.images_BCHW, whole[index].images_BCHW, rtol=0, atol=0)
            torch.testing.assert_close(again.targets, whole[index].targets, rtol=0, atol=0)
    assert not torch.equal(whole[epoch].images_BCHW, whole[0].images_BCHW)
    assert not torch.equal(given(1, 0.0, None, seed=1)[0].images_BCHW, whole[0].images_BCHW)
