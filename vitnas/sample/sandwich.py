"""The sandwich rule: the largest, the smallest and some random Archs on the same batch, in one optimizer step.

Source: Yu & Huang, "Universally Slimmable Networks" (arXiv 1903.05134), with their in-place distillation: the largest
learns from the labels, the others also from the largest's logits of the same step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from vitnas.errors import UserError
from vitnas.sample.near import RandomConfig, Source
from vitnas.sample.sampler import Draw, Given
from vitnas.space import Space


@dataclass(frozen=True)
class Sandwich:
    """Largest, `num_random` random Archs (of `source`, else of the Space), smallest.

    Losses are averaged over the Archs (the paper sums them; with AdamW only the clipping threshold and the decay's
    share notice), so that a learning rate keeps its meaning when `num_random` changes.
    """

    space: Space
    num_random: int = 2
    distill: bool = True
    source: Source | None = None

    def draw(self, rng: random.Random) -> list[Draw]:
        source = self.source or self.space
        others = [*(source.sample(rng) for _ in range(self.num_random)), self.space.smallest()]
        weight = 1 / (1 + len(others))
        return [
            Draw(arch=self.space.largest(), weight=weight),
            *(Draw(arch=arch, weight=weight, distill=self.distill) for arch in others),
        ]


@dataclass(frozen=True, kw_only=True)
class SandwichConfig(RandomConfig):
    """The largest, the smallest and `num_random` random Archs on the same batch; with `distill` the others learn from
    the largest, too."""

    kind = "sandwich"

    num_random: int = 2
    distill: bool = True

    def __post_init__(self) -> None:
        if self.num_random < 0:
            raise UserError(f"sampler.num_random is {self.num_random}; it must be at least 0. Use 2.")

    def build(self, space: Space, given: Given) -> Sandwich:
        return Sandwich(space, self.num_random, self.distill, self.source(space, given))

    def check(self, run: Any) -> None:
        if self.distill and run.teacher.network:
            raise UserError(
                f"sampler.distill is on and the teacher is {run.teacher.network!r}; either that teaches or the largest "
                "Arch. Set sampler.distill to false, or leave the teacher out."
            )
        if self.distill and not run.task.learns_from_archs:
            raise UserError(
                f"sampler.distill is on and task.kind is {run.task.kind!r}, which does not learn from other Archs. Set "
                "sampler.distill to false."
            )
