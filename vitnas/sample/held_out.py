"""The held-out images that a learning sampler looks at: a few per look, round and round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from vitnas.errors import UserError


class HeldOut(Protocol):
    """Held-out batches to look at (`vitnas.data.EvalBatches`)."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


class Rounds:
    """`size` images per look. Nothing is kept but the batch that is being read: what the batches cost in memory is
    theirs to decide.

    Args:
        looks: batches in the same order every time.
        size: images per look; where there are fewer in all, a look has all of them. What is left at the end of a round
            is not looked at.
    """

    def __init__(self, looks: HeldOut | None, size: int) -> None:
        self._looks, self._size = looks, size
        self._count = 0
        self._next = -1
        self._reading: Iterator[tuple[Tensor, Tensor]] = iter(())

    def at(self, number: int) -> tuple[Tensor, Tensor]:
        """The images of look `number`, whatever was asked before; one look after the other is quick.

        Raises:
            UserError: there are no images.
        """
        if not self._count:
            self._count = sum(1 for _ in self._round())
            if not self._count:
                raise UserError("the sampler has no held-out images to learn from. Give `looks`.")
        if number != self._next or number % self._count == 0:
            self._reading = self._round()
            for _ in range(number % self._count):
                next(self._reading)
        self._next = number + 1
        return next(self._reading)

    def _round(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = targets = None
        emitted = False
        for more, labels in self._looks or ():
            images = more if images is None else torch.cat([images, more])
            targets = labels if targets is None else torch.cat([targets, labels])
            while len(targets) >= self._size:
                yield images[: self._size], targets[: self._size]
                images, targets, emitted = images[self._size :], targets[self._size :], True
        if images is not None and targets is not None and len(targets) and not emitted:
            yield images, targets
