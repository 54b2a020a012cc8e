"""Several Archs per step, each on its own slice of the batch, with one optimizer step.

Source: the multi-architectural sampling of ViT-ResNAS (arXiv 2109.00642, section 3.3), computed on slices instead of
masks: the gradient is the same and the cost follows the Archs drawn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vitnas.errors import UserError
from vitnas.sample.near import RandomConfig, Source
from vitnas.sample.sampler import Draw, Given, SlicesConfig
from vitnas.space import Space


@dataclass(frozen=True)
class Several:
    """`num_archs` random Archs, each on an equal slice of the batch; the loss is the mean over the batch."""

    source: Source
    num_archs: int = 2

    def __post_init__(self) -> None:
        if self.num_archs < 1:
            raise UserError(f"num_archs is {self.num_archs}; it must be at least 1. Use 2.")

    def draw(self, rng: random.Random) -> list[Draw]:
        n = self.num_archs
        return [Draw(arch=self.source.sample(rng), part=(i, n), weight=1 / n) for i in range(n)]


@dataclass(frozen=True, kw_only=True)
class SeveralConfig(SlicesConfig, RandomConfig):
    """`num_archs` random Archs per step, each on a slice of the batch."""

    kind = "several"

    def build(self, space: Space, given: Given) -> Several:
        return Several(self.source(space, given), num_archs=self.num_archs)
