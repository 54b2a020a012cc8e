"""TrainBatches resumes anywhere and does not depend on workers; EvalBatches is in order, whole and cached."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitnas.data import AUGMENTS, Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data, synthetic
from vitnas.errors import UserError

EVERYTHING = replace(AUGMENTS["strong"], shift=0.1, rotate=5.0, zoom=(0.9, 1.1))
# Python 3.12 and later warn about any fork of a process that has threads, which torch always has.
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def data() -> Data:
    return synthetic(n=80, image_size=12)


def take(batches: TrainBatches, step: int, count: int) -> list[tuple[Tensor, Tensor]]:
    return list(itertools.islice(batches.from_step(step), count))


def assert_same(got: list[tuple[Tensor, Tensor]], want: list[tuple[Tensor, Tensor]]) -> None:
    assert len(got) == len(want)
    for some, others in zip(got, want, strict=True):
        torch.testing.assert_close(some, others, rtol=0, atol=0)


def test_shapes_and_types(data: Data) -> None:
    ((images_BCHW, targets_B),) = take(TrainBatches(data.train, Augment(), batch_size=16, seed=0), 0, 1)
    assert (images_BCHW.shape, images_BCHW.dtype) == ((16, 3, 12, 12), torch.float32)
    assert (targets_B.shape, targets_B.dtype) == ((16,), torch.int64)


@pytest.mark.parametrize(
    "augment", [AUGMENTS["weak"], AUGMENTS["digits"], EVERYTHING], ids=["weak", "digits", "all"]
)
def test_any_step_can_be_the_first(data: Data, augment: Augment) -> None:
    whole = take(TrainBatches(data.train, augment, batch_size=16, seed=3), 0, 8)
    assert_same(take(TrainBatches(data.train, augment, batch_size=16, seed=3), 5, 3), whole[5:])
    other = take(TrainBatches(data.train, augment, batch_size=16, seed=4), 0, 1)
    assert not torch.equal(other[0][0], whole[0][0])


@FORKS
def test_workers_change_nothing(data: Data) -> None:
    alone = TrainBatches(data.train, EVERYTHING, batch_size=16, seed=0)
    helped = TrainBatches(data.train, EVERYTHING, batch_size=16, seed=0, workers=2)
    assert_same(take(helped, 2, 4), take(alone, 2, 4))


@FORKS
def test_global_generators_are_left_alone(data: Data) -> None:
    def states() -> tuple[object, object, Tensor]:
        mersenne = np.random.get_state(legacy=False)["state"]
        return random.getstate(), (mersenne["key"].tobytes(), mersenne["pos"]), torch.get_rng_state()

    before = states()
    for workers in (0, 1):
        take(TrainBatches(data.train, EVERYTHING, batch_size=16, seed=0, workers=workers), 0, 2)
        list(EvalBatches(data.holdout, batch_size=16, workers=workers))
    after = states()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_each_epoch_is_another_order_of_all_images(data: Data) -> None:
    plain = TrainBatches(data.train, Augment(), batch_size=20, seed=0)
    assert plain.steps_per_epoch == 3
    first, second = take(plain, 0, 3), take(plain, 3, 3)
    every = torch.cat([images for images, _ in EvalBatches(data.train, batch_size=60)]).flatten(1)

    def rows(epoch: list[tuple[Tensor, Tensor]]) -> list[int]:
        seen = torch.cat([images for images, _ in epoch]).flatten(1)
        return [int((every == row).all(1).nonzero()) for row in seen]

    assert sorted(rows(first)) == sorted(rows(second)) == list(range(60))
    assert rows(first) != rows(second)


def test_ranks_share_one_shuffle(data: Data) -> None:
    one = take(TrainBatches(data.train, Augment(), batch_size=20, seed=0), 0, 3)
    parts = [
        take(TrainBatches(data.train, Augment(), batch_size=10, seed=0, rank=rank, world=2), 0, 3)
        for rank in (0, 1)
    ]
    for step in range(3):
        torch.testing.assert_close(torch.cat([part[step][0] for part in parts]), one[step][0], rtol=0, atol=0)


def test_ranks_vary_differently(data: Data) -> None:
    alike = data.train.subset([0] * 8)
    ranks = [
        take(TrainBatches(alike, AUGMENTS["digits"], batch_size=4, seed=0, rank=r, world=2), 0, 1)
        for r in (0, 1)
    ]
    assert not torch.equal(ranks[0][0][0], ranks[1][0][0])


def test_small_data_gets_smaller_even_batches(data: Data) -> None:
    batches = TrainBatches(data.train.subset(range(11)), Augment(), batch_size=64, seed=0)
    assert (batches.batch_size, batches.steps_per_epoch) == (10, 1)
    assert len(take(batches, 7, 1)[0][1]) == 10
    with pytest.raises(UserError, match=r"3 train images are shared by 2 processes; each needs at least 2"):
        TrainBatches(data.train.subset(range(3)), Augment(), batch_size=4, seed=0, world=2)


def test_eval_is_in_order_and_whole(data: Data) -> None:
    batches = EvalBatches(data.train, batch_size=16)
    assert [len(targets) for _, targets in batches] == [16, 16, 16, 12]
    assert len(batches) == 4
    torch.testing.assert_close(torch.cat([targets for _, targets in batches]), data.train.targets)


def test_eval_decodes_once(data: Data) -> None:
    batches = EvalBatches(data.holdout, batch_size=8)
    next(iter(batches))  # a pass that was broken off must not become the cache
    first, second = list(batches), list(batches)
    assert len(first) == len(batches)
    assert all(a[0] is b[0] for a, b in zip(first, second, strict=True))
    uncached = EvalBatches(data.holdout, batch_size=8, cache_bytes=0)
    assert_same(list(uncached), first)
    assert next(iter(uncached))[0] is not next(iter(uncached))[0]


def test_eval_keeps_bytes_where_floats_are_too_large(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    form = data.holdout.form
    size = len(data.holdout) * form.in_chans * form.image_size**2
    kept = EvalBatches(data.holdout, batch_size=8, cache_bytes=2 * size)
    first = list(kept)
    monkeypatch.setattr(kept, "load", None)  # a second reading would fail
    assert_same(list(kept), first)
    assert_same(list(EvalBatches(data.holdout, batch_size=8)), first)


@FORKS
@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_go_bad_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (10, 10), (number * 200, i, 0)).save(tmp_path / name / f"{i}.png")
    monkeypatch.setattr("vitnas.data.images.RAM_BYTES", 0)
    data = open_data(DataConfig(dataset=str(tmp_path), holdout=4, augment="none"))
    boundary = int((data.train.targets == 0).sum()) - 1  # the next image is of the other class
    bad = data.train.name(boundary)
    (tmp_path / bad).write_bytes(b"gone")
    batches = TrainBatches(data.train, data.augment, batch_size=12, seed=0, workers=workers)
    ((images_BCHW, targets_B),) = take(batches, 0, 1)
    assert data.corrupt == [bad]
    red_B = images_BCHW[:, 0].amax((1, 2))
    torch.testing.assert_close((red_B > 0).long(), targets_B)  # the label came with the replacement
    assert len(targets_B) == 12
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(UserError, match=r"^None of the 12 train images can be read any more"):
        take(batches, 0, 1)


def test_epoch_views_come_again_in_turn(data: Data) -> None:
    """In the same order and varied in the same way; the first ones are those that come without."""
    plain = TrainBatches(data.train, EVERYTHING, batch_size=16, seed=3)
    turns = TrainBatches(data.train, EVERYTHING, batch_size=16, seed=3, epoch_views=2)
    epoch = plain.steps_per_epoch
    once = take(plain, 0, 2 * epoch)
    assert_same(take(turns, 0, 4 * epoch), [*once, *once])
    assert_same(take(turns, 3 * epoch + 1, 1), [once[epoch + 1]])
    assert not torch.equal(take(plain, 2 * epoch, 1)[0][0], once[0][0])
    assert [turns.place(step) for step in (0, epoch, 2 * epoch)] == [0, plain.place(epoch), 0]
    assert turns.places(100 * epoch) == plain.places(2 * epoch)


def test_a_place_has_one_batch_however_many_processes_share_the_epoch(data: Data) -> None:
    alone = TrainBatches(data.train, EVERYTHING, batch_size=10, seed=0)
    ranks = [
        TrainBatches(data.train, EVERYTHING, batch_size=10, seed=0, rank=rank, world=2) for rank in (0, 1)
    ]
    steps = ranks[0].steps_per_epoch + 1  # into the second epoch
    places = [[rank.place(step) for step in range(steps)] for rank in ranks]
    assert not {*places[0]} & {*places[1]}
    assert max(map(max, places)) + 1 == ranks[0].places(steps) == ranks[1].places(steps)
    for rank, mine in zip(ranks, places, strict=True):
        for step in (0, steps - 1):
            assert_same(take(rank, step, 1), [alone.at(mine[step])[:2]])
