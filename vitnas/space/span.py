"""The least and the most that any Arch of a Space costs, found from the tables of its parts.

What all blocks share (the fields of the Arch, the widths) is kept as axes; every block takes the best of its own
options for each of their combinations, and the ways to fill the slots are gone through as they are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt

from vitnas.counting import BYTES
from vitnas.space.costs import Parts, Table, kept_columns
from vitnas.space.layout import Layout

QUANTITIES = ("macs", "params", "memory")
Costs = npt.NDArray[np.int64]


def span(layout: Layout, parts: Parts, quantity: str) -> tuple[int, int]:
    """The least and the most `macs`, `params` or `memory` (bytes) of any Arch."""
    unit = BYTES if quantity == "memory" else 1
    low, high = (
        _Best(layout, parts, QUANTITIES.index(quantity), best).found() for best in (np.minimum, np.maximum)
    )
    return low * unit, high * unit


class _Best:
    """The best cost: `best` is the minimum or the maximum, and costs add up (the largest counts, of memory)."""

    def __init__(self, layout: Layout, parts: Parts, quantity: int, best: np.ufunc) -> None:
        self.layout, self.parts, self.quantity, self.best = layout, parts, quantity, best
        self.both: np.ufunc = np.maximum if QUANTITIES[quantity] == "memory" else np.add

    def found(self) -> int:
        """The best cost of any Arch."""
        layout, arch = self.layout, self.layout.of_arch
        widths = [stage.width for stage in layout.stages]
        so_far, ends = self._over(self.parts.stem, (*arch, widths[0])), []
        for number, width in enumerate(widths):
            if number:
                pair = self._over(self.parts.reductions[number - 1], (*arch, widths[number - 1], width))
                so_far = self.best.reduce(self.both(so_far[..., None], pair), axis=-2)
            levels = self._stage(number)
            if number + 1 in layout.counts:
                ends += self._ends(number, so_far, levels)
            if number < len(widths) - 1:
                so_far = self.both(so_far, levels[0])
        return int(self.best.reduce([self.best.reduce(end, axis=None) for end in ends]))

    def _ends(self, number: int, so_far: Costs, levels: dict[int, Costs]) -> list[Costs]:
        """The best cost of Archs that end behind a stage, by the level at its end."""
        layout = self.layout
        keeps = layout.keeps if number == len(layout.stages) - 1 else None
        column = (keeps.level_column(len(keeps.stretches)),) if keeps else ()
        of_head = (*layout.of_arch, layout.stages[number].width, *column)
        head = self._over(self.parts.heads[layout.counts.index(number + 1)], of_head)
        return [
            self.both(self.both(so_far, value), _at(head, level) if keeps else head)
            for level, value in levels.items()
        ]

    def _stage(self, number: int) -> dict[int, Costs]:
        """The best cost of a stage's blocks and selections, by what they share; by the level at the end."""
        layout = self.layout
        shared = (*layout.of_arch, layout.stages[number].width)
        kept = [kept_columns(layout, number, place) for place in range(len(self.parts.blocks[number]))]
        blocks = []
        for columns, tables in zip(kept, self.parts.blocks[number], strict=True):
            own = (*shared, *(column for column in columns if column is not None))
            blocks.append(reduce(self.both, [self._over(table, own) for table in tables]))

        def fill(place: int, level: int, tells: bool) -> Costs:
            costs, (of_level, of_tells) = blocks[place], kept[place]
            costs = costs if of_tells is None else _at(costs, int(tells))
            return costs if of_level is None else _at(costs, level)

        def select(stretch: int, before: int, behind: int) -> Costs:
            assert layout.keeps is not None
            columns = (layout.keeps.level_column(stretch), layout.keeps.level_column(stretch + 1))
            return _at(_at(self._over(self.parts.selections[stretch], (*shared, *columns)), behind), before)

        return layout.fold(
            number,
            np.zeros((1,) * len(shared), np.int64),
            fill=fill,
            select=select,
            both=self.both,
            either=self.best,
        )

    def _over(self, table: Table, columns: Sequence[int]) -> Costs:
        """The best of a table's quantity by these columns, an axis each (of 1 where a column changes nothing)."""
        genes, costs = table
        values = costs[..., self.quantity]
        for axis in reversed(range(len(genes))):
            if genes[axis] not in columns:
                values = self.best.reduce(values, axis=axis)
        left = [gene for gene in genes if gene in columns]
        values = values.transpose([left.index(column) for column in columns if column in left])
        sizes = iter(values.shape)
        return values.reshape([next(sizes) if column in left else 1 for column in columns])


def _at(costs: Costs, index: int) -> Costs:
    """The last axis at an index, if it is one of several."""
    last: Costs = costs[..., min(index, costs.shape[-1] - 1)]
    return last
