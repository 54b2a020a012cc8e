"""Batches for training, endless and resumable at any step.

Legend: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vitnas.data.augment import Augmenter, seed_from, seeded_globals
from vitnas.data.config import Augment
from vitnas.data.crops import Cropper, Crops
from vitnas.data.images import (
    Images,
    Loaded,
    are_numbers,
    has_one_class,
    loaded_by_workers,
    quiet_pillow,
    require_labels,
)
from vitnas.errors import UserError


class TrainBatches:
    """Endless shuffled and varied batches; the batch of a step depends on (seed, step, rank, world) only.

    Nothing needs saving to resume: `from_step(step)` continues with the very batches that an uninterrupted
    run would have had, for any number of workers. Ranks share one shuffle of the epoch and take disjoint
    parts of it; the last incomplete batch of an epoch is left out. A batch size larger than a rank's share of
    the images is lowered to the largest even number that fits (Mixup pairs images).

    With `epoch_views` epoch e has the batches of epoch e mod `epoch_views` once more: the same images in the same
    order, varied in the same way. `balance` is how far rare classes come more often: images are drawn, again and again,
    by the size of their class (of several, of the rarest) to the power of minus that, so that with 1 all classes are as
    frequent where an image has one.

    Raises:
        UserError: fewer than two images per rank.
    """

    def __init__(
        self,
        images: Images,
        augment: Augment | Crops,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        epoch_views: int | None = None,
        balance: float = 0.0,
    ) -> None:
        share = len(images) // world
        if share < 2:
            raise UserError(
                f"{len(images)} {images.split} images are shared by {world} processes; each needs at least "
                "2. Use fewer processes or more images."
            )
        self.images = images
        self.batch_size = batch_size if batch_size <= share else share - share % 2
        self.steps_per_epoch = share // self.batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.workers = workers
        self.epoch_views = epoch_views
        self._parts = len(images) // self.batch_size  # of an epoch, whatever the number of processes
        self._augmenter: Augmenter | Cropper = (
            Cropper(augment, images.form, fixed=images.store.fixed_NCHW is not None)
            if isinstance(augment, Crops)
            else Augmenter(augment, images.form)
        )
        self._epoch: tuple[int, Tensor] | None = None
        self._ends_N: Tensor | None = None  # of each image's part of all that is drawn from
        if balance:
            require_labels(images.targets, "balance")
            if are_numbers(images.targets):
                raise UserError(
                    f"balance is {balance:g} and these images have numbers; it goes by classes. Use 0."
                )
            self._ends_N = _weights(images.targets, balance).cumsum(0)

    def from_step(self, step: int) -> Iterator[tuple[Any, Tensor]]:
        """Yield (float32 images BCHW, normalised; int64 targets B, or (B, 0) without labels) for `step`, `step` + 1 and
        on, without end. Of Crops it is a tuple of such images, one per crop."""
        if self.workers == 0:
            for number in itertools.count(step):
                views, targets_B, bad = self.load(number)
                self.images.store.record(bad)
                yield views, targets_B
        for views, targets_B, bad in loaded_by_workers(self, itertools.count(step), self.workers):
            self.images.store.record(bad)  # here, since what a worker process notes stays in it
            yield views, targets_B

    def place(self, step: int) -> int:
        """Which batch a step has, counted over epochs and processes: where it is the same number, it is the same batch,
        however many processes share an epoch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        view = epoch % self.epoch_views if self.epoch_views else epoch
        return view * self._parts + index * self.world + self.rank

    def places(self, steps: int) -> int:
        """The largest place of the first `steps` steps of all processes, plus 1."""
        within = min(steps, self.epoch_views * self.steps_per_epoch) if self.epoch_views else steps
        return self.place(within - 1) - self.rank + self.world

    def load(self, step: int) -> Loaded:
        """Read and vary the batch of one step; also returns the names of unreadable images met on the way."""
        return self.at(self.place(step))

    def at(self, place: int) -> Loaded:
        """The same by its place."""
        epoch, part = divmod(place, self._parts)
        positions_B = self._order(epoch)[part * self.batch_size : (part + 1) * self.batch_size]
        seed = seed_from("augment", self.seed, epoch, part)
        with seeded_globals(seed) if self._augmenter.needs_globals else nullcontext():
            raw, targets_B, bad = self._read(positions_B)
            views = self._augmenter.batch(raw, torch.Generator().manual_seed(seed))
        return views, targets_B, bad

    def _order(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(seed_from("order", self.seed, epoch))
            if self._ends_N is None:
                order_N = torch.randperm(len(self.images), generator=generator)
            else:
                drawn_N = (
                    torch.rand(len(self.images), generator=generator, dtype=torch.float64) * self._ends_N[-1]
                )
                order_N = torch.searchsorted(self._ends_N, drawn_N).clamp_(max=len(self.images) - 1)
            self._epoch = epoch, order_N
        return self._epoch[1]

    def _read(self, positions_B: Tensor) -> Loaded:
        """uint8 BCHW images, or crops of them; an unreadable one is replaced by the next readable one of the split."""
        if not self._augmenter.needs_pil and (fixed_BCHW := self.images.pixels(positions_B)) is not None:
            return fixed_BCHW, self.images.targets[positions_B], []
        bad: list[str] = []
        images: list[Any] = []
        targets: list[Tensor] = []
        with quiet_pillow():
            for start in positions_B.tolist():
                position = start
                while (pixels := self.images.read(position, whole=self._augmenter.needs_whole)) is None:
                    bad.append(self.images.name(position))
                    position = (position + 1) % len(self.images)
                    if position == start:
                        raise UserError(
                            f"None of the {len(self.images)} {self.images.split} images can be read any more "
                            f"(the first is {self.images.name(0)}). Check the disk or the network share."
                        )
                if self._augmenter.needs_pil and not self._augmenter.needs_whole:
                    pixels = self.images.store.fit(pixels).permute(1, 2, 0).numpy()
                images.append(
                    self._augmenter.per_image(pixels)
                    if self._augmenter.needs_pil
                    else self.images.store.fit(pixels)
                )
                targets.append(self.images.targets[position])
        return self._augmenter.stack(images), torch.stack(targets), bad


def _weights(targets: Tensor, balance: float) -> Tensor:
    """float64 (N,): how often images are drawn, by the size of their class; of several, the rarest."""
    if has_one_class(targets):
        return torch.bincount(targets).double().pow(-balance)[targets]
    none_N1 = ~targets.any(1, keepdim=True)  # as a class of its own
    has_NY = torch.cat([targets, none_N1], dim=1)
    weight_Y = has_NY.sum(0).clamp(min=1).double().pow(-balance)
    return (has_NY * weight_Y).amax(1)
