"""What a Sampler returns, and the Sampler for a network that is no Supernet."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from vitnas.arch import Arch
from vitnas.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One Arch's part of a training step.

    Attributes:
        arch: what to run; None for a network that is not a Supernet.
        part: (i, n): run on the i-th of n equal slices of the batch; (0, 1) is the whole batch.
        weight: factor of its loss. Draws of a step are summed and stepped once.
        distill: learn from the logits of the step's first Draw (same images) beside the labels.
    """

    arch: Arch | None
    part: tuple[int, int] = (0, 1)
    weight: float = 1.0
    distill: bool = False

    def rows(self, batch_size: int) -> slice:
        """The images of the batch that this Draw sees.

        Raises:
            UserError: the batch does not divide into the parts.
        """
        index, parts = self.part
        if parts > batch_size:
            raise UserError(
                f"the batch has {batch_size} images; {parts} Archs per step need one each. Raise batch_size."
            )
        if batch_size % parts:
            low = batch_size // parts * parts
            raise UserError(
                f"the batch has {batch_size} images; {parts} Archs per step need equal shares. Use a batch_size of "
                f"{low} or {low + parts}."
            )
        return slice(index * batch_size // parts, (index + 1) * batch_size // parts)


class Sampler(Protocol):
    """Says which Archs train at a step: a pure function of the generator, so that a resumed run draws the same."""

    def draw(self, rng: random.Random) -> list[Draw]: ...


@dataclass(frozen=True)
class Fixed:
    """Always the same Arch; with None, the Sampler for training a Model by itself."""

    arch: Arch | None = None

    def draw(self, rng: random.Random) -> list[Draw]:
        return [Draw(arch=self.arch)]
