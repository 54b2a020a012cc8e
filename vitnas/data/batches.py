"""Batches for training (endless, resumable at any step) and for scoring (in order, cached).

Legend: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from math import prod
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitnas.data.augment import Augmenter, seed_from, seeded_globals
from vitnas.data.config import Augment
from vitnas.data.crops import Cropper, Crops
from vitnas.data.images import Images, quiet_pillow, require_one_class
from vitnas.errors import UserError

Batch = tuple[Tensor, Tensor]
# Images (or the crops of each), targets, names of unreadable images met on the way.
_Loaded = tuple[Any, Tensor, list[str]]


class TrainBatches:
    """Endless shuffled and varied batches; the batch of a step depends on (seed, step, rank, world) only.

    Nothing needs saving to resume: `from_step(step)` continues with the very batches that an uninterrupted
    run would have had, for any number of workers. Ranks share one shuffle of the epoch and take disjoint
    parts of it; the last incomplete batch of an epoch is left out. A batch size larger than a rank's share of
    the images is lowered to the largest even number that fits (Mixup pairs images).

    With `epoch_views` epoch e has the batches of epoch e mod `epoch_views` once more: the same images in the same
    order, varied in the same way. `balance` is how far rare classes come more often: images are drawn, again and again,
    by the size of their class to the power of minus that, so that with 1 all classes are as frequent.

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
            require_one_class(images.targets, "balance")
            counts_Y = torch.bincount(images.targets).double()
            self._ends_N = counts_Y.pow(-balance)[images.targets].cumsum(0)

    def from_step(self, step: int) -> Iterator[tuple[Any, Tensor]]:
        """Yield (float32 images BCHW, normalised; int64 targets B, or (B, 0) without labels) for `step`, `step` + 1 and
        on, without end. Of Crops it is a tuple of such images, one per crop."""
        if self.workers == 0:
            for number in itertools.count(step):
                views, targets_B, bad = self.load(number)
                self.images.store.record(bad)
                yield views, targets_B
        for views, targets_B, bad in _loader(self, itertools.count(step), self.workers):
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

    def load(self, step: int) -> _Loaded:
        """Read and vary the batch of one step; also returns the names of unreadable images met on the way."""
        return self.at(self.place(step))

    def at(self, place: int) -> _Loaded:
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

    def _read(self, positions_B: Tensor) -> _Loaded:
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


class EvalBatches:
    """Images in order, normalised and not varied, the last batch maybe smaller; iterate as often as you like.

    What fits into `cache_bytes` (default: a quarter of the free memory, at least 1 GiB) is kept after the first pass,
    so that scoring thousands of Archs decodes once: normalised batches, or where these are too large the bytes of the
    images. Do not change batches in place. Unreadable images are left out, so count what the batches hold.
    """

    def __init__(
        self, images: Images, *, batch_size: int, workers: int = 0, cache_bytes: int | None = None
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.workers = workers
        form = images.form
        if cache_bytes is None:
            cache_bytes = max(1 << 30, psutil.virtual_memory().available // 4)
        size = len(images) * prod(form.input_size)
        self._keep_normalised, self._keep = 4 * size < cache_bytes, size < cache_bytes
        self._cache: list[Batch] | None = None

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        normalise = self.images.form.normalise
        if self._cache is not None:
            for images_BCHW, targets_B in self._cache:
                yield images_BCHW if self._keep_normalised else normalise(images_BCHW), targets_B
            return
        passed: list[Batch] = []
        for raw_BCHW, targets_B in self._read_all():
            images_BCHW = normalise(raw_BCHW)
            if self._keep:
                passed.append((images_BCHW if self._keep_normalised else raw_BCHW, targets_B))
            yield images_BCHW, targets_B
        if self._keep:
            self._cache = passed

    def _read_all(self) -> Iterator[Batch]:
        in_memory = self.images.store.fixed_NCHW is not None
        numbers = range(len(self))
        batches: Iterator[_Loaded]
        if in_memory or self.workers == 0:
            batches = map(self.load, numbers)
        else:
            batches = _loader(self, numbers, self.workers)
        for images_BCHW, targets_B, bad in batches:
            self.images.store.record(bad)
            if len(targets_B):
                yield images_BCHW, targets_B

    def load(self, number: int) -> _Loaded:
        """Read one batch, as bytes."""
        positions_B = torch.arange(
            number * self.batch_size, min((number + 1) * self.batch_size, len(self.images))
        )
        form = self.images.form
        if (fixed_BCHW := self.images.pixels(positions_B)) is not None:
            return fixed_BCHW, self.images.targets[positions_B], []
        images, good, bad = [], [], []
        with quiet_pillow():
            for position in positions_B.tolist():
                if (pixels := self.images.read(position)) is None:
                    bad.append(self.images.name(position))
                else:
                    images.append(self.images.store.fit(pixels))
                    good.append(position)
        if not images:
            empty = torch.empty(0, *form.input_size, dtype=torch.uint8)
            return empty, self.images.targets[:0], bad
        return torch.stack(images), self.images.targets[good], bad


class _ByNumber(Dataset[Any]):
    """Hands a worker the number of a batch to load; the batch sampler's lists hold one number each."""

    def __init__(self, batches: TrainBatches | EvalBatches) -> None:
        self.batches = batches

    def __getitems__(self, numbers: list[int]) -> _Loaded | UserError:
        (number,) = numbers
        try:
            return self.batches.load(number)
        except UserError as error:  # raised in a worker it would reach the user inside a traceback
            return error


def _loader(batches: TrainBatches | EvalBatches, numbers: Any, workers: int) -> Iterator[_Loaded]:
    loader: DataLoader[Any] = DataLoader(
        _ByNumber(batches),
        batch_sampler=([number] for number in numbers),
        num_workers=workers,
        collate_fn=_as_is,
        generator=torch.Generator(),  # else the loader would draw from the global one
    )
    for loaded in loader:
        if isinstance(loaded, UserError):
            raise loaded
        yield loaded


def _as_is(loaded: Any) -> Any:
    return loaded
