"""Keeps: genes that say how many patches are left from a place on.

The last stage is cut at its places into stretches of slots, and each stretch has a gene: the share of the stage's
patches that its blocks work on. The first block of a stretch that is there keeps them, if fewer came to it. Later
stretches never have more, so a gene is settled to the least before it; where no block of a stretch is there it does not
matter. So equal Archs have equal genes, and what a block costs depends on one of them.

How many patches are left is counted in levels: the gene's option, or one more for all patches where no option says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitnas.arch import Arch, Block
from vitnas.layers.select import Asked
from vitnas.space.gene import Gene, Matrix, option_number

FIELD = "keep"


class Stretch(NamedTuple):
    """Slots from `start` to below `stop`, and the number of their gene."""

    gene: int
    start: int
    stop: int


class Keeps:
    """The genes of the patches kept.

    Args:
        genes: of the Space, all.
        num_slots: of the last stage.
        selector: the Arch's word for who chooses.
        asked: what a selection asks of the block before it, which then costs more.
    """

    def __init__(self, genes: Sequence[Gene], num_slots: int, selector: str, asked: Asked) -> None:
        mine = [(index, gene) for index, gene in enumerate(genes) if gene.field == FIELD]
        starts = [gene.slot for _, gene in mine]
        self.stretches = tuple(
            Stretch(index, start, stop)
            for (index, _), start, stop in zip(mine, starts, [*starts[1:], num_slots], strict=True)
        )
        self.selector, self.asked, self.asks = selector, asked, asked != "none"
        self.shares: tuple[float, ...] = mine[0][1].options
        self.full = len(self.shares) - (self.shares[-1] == 1.0)
        self.num_slots, self._num_genes = num_slots, len(genes)

    def patches(self, level: int, patches: int) -> int:
        """How many of a stage's patches are left at a level."""
        return patches if level == self.full else share_of(self.shares[level], patches)

    def stretch(self, slot: int) -> int | None:
        """The number of the stretch that a slot lies in; None before the first place."""
        return next((k for k, s in enumerate(self.stretches) if s.start <= slot < s.stop), None)

    def lower(self, level: int) -> range:
        """The levels that a stretch can settle on behind that one."""
        return range(min(level, len(self.shares) - 1) + 1)

    def write(self, blocks: Mapping[int, dict[str, Any]], genes: Sequence[int], patches: int) -> str | None:
        """Let the blocks (by slot) keep what canonical genes say; returns the selector if there is one."""
        left, selector = patches, None
        for gene, start, stop in self.stretches:
            first = next((slot for slot in blocks if start <= slot < stop), None)
            if first is not None and (kept := self.patches(genes[gene], patches)) < left:
                blocks[first][FIELD] = left = kept
                selector = self.selector
        return selector

    def read(self, blocks: Mapping[int, Block], patches: int) -> Iterator[tuple[int, int, int, list[str]]]:
        """The gene, the slot of the block that tells it, its option, and reasons, per stretch with a block."""
        left, options = patches, [share_of(share, patches) for share in self.shares]
        for gene, start, stop in self.stretches:
            for slot in [slot for slot in blocks if start <= slot < stop][:1]:
                left = blocks[slot].keep or left
                yield gene, slot, *option_number(FIELD, left, options)

    def settled(self, genes: Matrix, filled: npt.NDArray[np.bool_]) -> Matrix:
        """Genes that never rise from a stretch that has a block to the next.

        Args:
            filled: (n, stretches): which hold a block.
        """
        genes = genes.copy()
        level = np.full(len(genes), self.full)
        for (gene, _, _), here in zip(self.stretches, filled.T, strict=True):
            level = np.where(here, np.minimum(level, genes[:, gene]), level)
            genes[:, gene] = np.where(here, level, genes[:, gene])
        return genes

    def columns(self, genes: Matrix, filled: npt.NDArray[np.bool_]) -> Matrix:
        """(n, columns) what costs depend on besides genes: the level before each stretch and at the end, then, where a
        selector asks, for each slot whether it must tell."""
        levels = [np.full(len(genes), self.full)]
        for gene, start, stop in self.stretches:
            levels.append(np.where(filled[:, start:stop].any(axis=1), genes[:, gene], levels[-1]))
        if not self.asks:
            return np.stack(levels, axis=1)
        asked, gives = np.zeros(len(genes), dtype=np.bool_), []
        for slot in reversed(range(self.num_slots)):
            here, k = filled[:, slot], self.stretch(slot)
            gives.append(here & asked)
            falls = np.zeros_like(here)
            if k is not None:
                falls = (levels[k + 1] < levels[k]) & ~filled[:, self.stretches[k].start : slot].any(axis=1)
            asked = np.where(here, falls, asked)
        return np.stack([*levels, *reversed(gives)], axis=1).astype(np.int64)

    @property
    def num_options(self) -> tuple[int, ...]:
        """How many values each of `columns` has."""
        levels = (self.full + 1,) * (len(self.stretches) + 1)
        return levels + (2,) * (self.num_slots if self.asks else 0)

    def level_column(self, stretch: int) -> int:
        """The number, behind all genes, of the column of the level before a stretch."""
        return self._num_genes + stretch

    def gives_column(self, slot: int) -> int | None:
        """The number of the column that says whether a slot's block must tell."""
        return self._num_genes + len(self.stretches) + 1 + slot if self.asks else None


def keeping_all(arch: Arch) -> Arch:
    """The same Arch with all patches in every block."""
    *first, last = arch.stages
    last = replace(last, blocks=tuple(replace(block, keep=None) for block in last.blocks))
    return replace(arch, selector=None, stages=(*first, last))


def share_of(share: float, patches: int) -> int:
    """A share of the patches, rounded down (7 tenths of 10 are 7 although 0.7 is a little less)."""
    return int(share * patches + 1e-9)
