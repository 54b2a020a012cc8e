"""The sandwich rule: the largest, the smallest and some random Archs on the same batch, in one optimizer step.

Source: Yu & Huang, "Universally Slimmable Networks" (arXiv 1903.05134), with their in-place distillation: the largest
learns from the labels, the others also from the largest's logits of the same step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vitnas.sample.draw import Draw
from vitnas.space import Space


@dataclass(frozen=True)
class Sandwich:
    """Largest, `num_random` random Archs, smallest.

    Losses are averaged over the Archs (the paper sums them; with AdamW only the clipping threshold and the decay's
    share notice), so that a learning rate keeps its meaning when `num_random` changes.
    """

    space: Space
    num_random: int = 2
    distill: bool = True

    def draw(self, rng: random.Random) -> list[Draw]:
        others = [*(self.space.sample(rng) for _ in range(self.num_random)), self.space.smallest()]
        weight = 1 / (1 + len(others))
        return [
            Draw(arch=self.space.largest(), weight=weight),
            *(Draw(arch=arch, weight=weight, distill=self.distill) for arch in others),
        ]
