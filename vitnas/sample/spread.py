"""Several Archs per step whose values are spread: each gene's options are dealt out without replacement.

Source: the multi-architectural sampling of ViT-ResNAS (arXiv 2109.00642, section 3.3): with G Archs per step and n
options of a gene, n >= G, the Archs have G different ones. Computed on slices of the batch instead of masks; the
gradient is the same (a test says so) and the cost follows the Archs drawn. Options open over the first epochs, largest
first, as in the paper's supplement.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor

from vitnas.errors import UserError
from vitnas.sample.hook import Moment
from vitnas.sample.sampler import Draw, Given, SlicesConfig
from vitnas.space import Gene, Space

MOST_ENTRIES = 16  # a chance is written as a share of at most so many entries


@dataclass
class Spread:
    """`num_archs` Archs, each on an equal slice of the batch; the loss is the mean over the batch.

    A Hook: `epoch` is told by the training. During `warmup_epochs` the options of a gene open one by one, from the
    last (largest) to the first; before the first step only the largest Arch is drawn.
    """

    space: Space
    num_archs: int = 2
    warmup_epochs: float = 0.0
    epoch: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.num_archs < 1:
            raise UserError(f"num_archs is {self.num_archs}; it must be at least 1. Use 2.")
        if self.warmup_epochs < 0:
            raise UserError(f"warmup_epochs is {self.warmup_epochs}; it cannot be negative. Use 0 for none.")

    def draw(self, rng: random.Random) -> list[Draw]:
        n = self.num_archs
        columns = [self._deal(gene, rng) for gene in self.space.genes]
        archs = [self.space.decode([column[i] for column in columns]) for i in range(n)]
        return [Draw(arch=arch, part=(i, n), weight=1 / n) for i, arch in enumerate(archs)]

    def _deal(self, gene: Gene, rng: random.Random) -> list[int]:
        """One option number of `gene` per Arch."""
        given = entries(gene)
        opened = given[: num_opened(len(given), self.epoch, self.warmup_epochs)]
        dealt = opened * -(-self.num_archs // len(opened))
        rng.shuffle(dealt)
        return dealt[: self.num_archs]

    def before(self, moment: Moment) -> Mapping[str, Any] | None:
        """Take note of the epoch; says when all options are open."""
        before, self.epoch = self.epoch, moment.epoch
        return {"all_open": True} if before < self.warmup_epochs <= self.epoch else None

    def tensors(self) -> dict[str, Tensor]:
        return {}  # the epoch says everything

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        pass


def num_opened(n: int, epoch: float, warmup_epochs: float) -> int:
    """How many of `n` entries are open in an epoch: 1 in the first, all from `warmup_epochs` on."""
    if epoch >= warmup_epochs:
        return n
    return min(n, 1 + int(int(epoch) * (n - 1) / warmup_epochs))


def entries(gene: Gene) -> list[int]:
    """Option numbers from the largest down, repeated in proportion to their chances.

    Where two options have a half each, there are two of each, as in the authors' lists: two Archs may then agree.
    """
    if gene.weights is None:
        return list(range(len(gene.options)))[::-1]
    shares = [Fraction(weight).limit_denominator(MOST_ENTRIES) for weight in gene.weights]
    total = max(share.denominator for share in shares)
    counts = [max(1, round(share * (4 if total == 2 else total))) for share in shares]
    return [option for option, count in reversed(list(enumerate(counts))) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class SpreadConfig(SlicesConfig):
    """`num_archs` Archs per step on slices of the batch, with each gene's options dealt out among them.

    Over the first `warmup_epochs` options open one by one, the largest first; with `rewire` heads and hidden units are
    sorted at the start of these epochs.
    """

    kind = "spread"

    warmup_epochs: float = 0
    rewire: bool = False

    def build(self, space: Space, given: Given) -> Spread:
        return Spread(space, num_archs=self.num_archs, warmup_epochs=self.warmup_epochs)

    def check(self, run: Any) -> None:
        super().check(run)
        if not self.rewire:
            return
        if not self.warmup_epochs:
            raise UserError(
                "sampler.rewire is on and sampler.warmup_epochs is 0; units are sorted while the warm-up lasts. Set "
                "warmup_epochs, for example 30."
            )
        if run.supernet.ema is not None:
            raise UserError(
                "sampler.rewire is on and supernet.ema too; sorting units would mix up the average. Set supernet.ema "
                "to null."
            )
        if run.sharing.coupling != "prefix":
            raise UserError(
                f"sampler.rewire is on and sharing.coupling is {run.sharing.coupling!r}; sorting puts the most useful "
                "entries first, which serves a prefix only. Use prefix, or set sampler.rewire to false."
            )

    @property
    def rewire_epochs(self) -> float:
        return self.warmup_epochs if self.rewire else 0.0
