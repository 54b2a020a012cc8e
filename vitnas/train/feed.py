"""The batches of a training as the loop takes them: without end, on its device, mixed, each with its place.

How images are mixed is a function of (seed, place): wherever a batch of `TrainBatches` comes again, so do its mixed
images, whatever trains on them.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from timm.data import Mixup
from torch import Tensor

from vitnas.data import TrainBatches, are_numbers, has_labels
from vitnas.data.augment import seed_from, seeded_globals
from vitnas.data.config import LabelKind
from vitnas.errors import UserError
from vitnas.train.engine import Engine
from vitnas.train.task import At, Batch, Task

SAMPLED = 4096  # pixels of a view that its mark is made of

Views = Tensor | Sequence[Tensor]


class Batches(Protocol):
    """Endless training batches that can start at any step (`vitnas.data.TrainBatches`)."""

    steps_per_epoch: int

    def from_step(self, step: int) -> Iterator[tuple[Views, Tensor]]: ...


def endless(loader: Any) -> Batches:
    """`loader` itself, or any re-iterable one made endless."""
    return cast(Batches, loader) if hasattr(loader, "from_step") else _Plain(loader)


class _Plain:
    """Any re-iterable loader, made endless. It starts at the beginning of an epoch whatever the step."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.steps_per_epoch = len(loader)

    def from_step(self, step: int) -> Iterator[tuple[Views, Tensor]]:
        while True:
            yield from self.loader


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The batches of a training.

    Args:
        task: its own mixing comes last.
        mixup: of timm, or None.
    """

    batches: Batches
    task: Task
    mixup: Mixup | None
    seed: int
    engine: Engine

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches of `step`, `step` + 1 and on, without end. Each counts by itself where several make one optimizer
        step."""
        for number, (images, targets_B) in enumerate(self.batches.from_step(step), step):
            yield self.mixed(images, targets_B, self.place(number))

    @property
    def comes_again(self) -> bool:
        """The loader knows its batches by their places."""
        return isinstance(self.batches, TrainBatches)

    @property
    def kind(self) -> str:
        """What the loader is, in a word."""
        given = self.batches.loader if isinstance(self.batches, _Plain) else self.batches
        return type(given).__name__

    @property
    def mixing(self) -> str:
        """How images are mixed before the task does."""
        return "" if self.mixup is None else repr(sorted(vars(self.mixup).items()))

    def place(self, number: int) -> int:
        """Which batch this process has then; where it is the same number, it is the same batch."""
        if isinstance(self.batches, TrainBatches):
            return self.batches.place(number)
        return number * self.engine.world + self.engine.rank

    def places(self, steps: int) -> int:
        """The largest place of `steps` batches of each process, plus 1."""
        assert isinstance(self.batches, TrainBatches)
        return self.batches.places(steps)

    @property
    def _group(self) -> int:
        """Images of one batch of every process."""
        return self.engine.world * int(getattr(self.batches, "batch_size", 1))

    def done(self, number: int) -> tuple[int, int]:
        """What lies behind `number` batches of each process: whole epochs, and images of the one under way."""
        epoch, batches = divmod(number, self.batches.steps_per_epoch)
        return epoch, batches * self._group

    def number_behind(self, epoch: int, images: int) -> int:
        """The number of batches that lies behind so much, also where another number of processes did it; no image of
        the epoch comes twice."""
        per_epoch = self.batches.steps_per_epoch
        return epoch * per_epoch + min(-(-images // self._group), per_epoch)

    def at(self, place: int) -> Batch:
        """The batch of a place."""
        assert isinstance(self.batches, TrainBatches)
        images, targets_B, _ = self.batches.at(place)
        return self.mixed(images, targets_B, place)

    def mixed(self, images: Views, targets_B: Tensor, place: int) -> Batch:
        """A batch on the device, mixed where that is asked for, with its labels if it has some."""
        device = self.engine.device
        views = (images,) if isinstance(images, Tensor) else tuple(images)
        at = At(place, mark_of(views)) if self.comes_again else None
        views = tuple(view.to(device, non_blocking=True) for view in views)
        targets_B = targets_B.to(device, non_blocking=True)
        with seeded_globals(seed_from("mix", self.seed, place)):
            return replace(self.task.mix(self._paired(views, targets_B)), at=at)

    def _paired(self, views: tuple[Tensor, ...], targets_B: Tensor) -> Batch:
        """Mixed by timm. Mixing pairs images, so an odd one is left out."""
        kind = self._kind(targets_B)
        if kind != "class":
            targets_B = targets_B.float().reshape(len(targets_B), -1)
        if self.mixup is None or len(targets_B) < 2:
            return Batch(views, targets_B, kind=kind)
        if len(views) > 1:
            raise UserError(
                f"the batches have {len(views)} views; mixup and cutmix mix single images. Set both to 0."
            )
        even = len(targets_B) // 2 * 2
        if kind != "class":
            rows = copy.copy(self.mixup)  # as classes of their own, rows say how they are mixed
            rows.num_classes, rows.label_smoothing = even, 0.0
            images_BCHW, shares_BB = rows(views[0][:even], torch.arange(even, device=targets_B.device))
            targets_BY = shares_BB.to(targets_B.dtype) @ targets_B[:even]
        elif has_labels(targets_B):
            images_BCHW, targets_BY = self.mixup(views[0][:even], targets_B[:even])
        else:
            targets_BY = targets_B[:even]
            images_BCHW, _ = self.mixup(views[0][:even], targets_BY.new_zeros(even))
        return Batch((images_BCHW,), targets_BY, kind=kind)

    def _kind(self, targets_B: Tensor) -> LabelKind:
        """What targets are. (B, Y) floats of another's loader are probabilities of classes, which it has mixed."""
        if targets_B.dtype == torch.bool:
            return "classes"
        own = isinstance(self.batches, TrainBatches) or targets_B.dim() == 1
        return "numbers" if own and are_numbers(targets_B) else "class"


def mark_of(views: Sequence[Tensor]) -> int:
    """A number of some pixels of all images, which lie on the host. The stride is odd, to go through all columns."""
    mark = 0
    for view in views:
        flat = view.reshape(-1)
        mark = zlib.crc32(flat[:: len(flat) // SAMPLED | 1].contiguous().numpy().data, mark)
    return mark + 1
