"""Costs of many Archs at once: tables over few genes each, made by counting's own functions.

A part of a Model (the stem, a reduction, the attention of a block, ...) costs what a few genes say. Its table has an
entry for every combination of their options; genes that turn out to change nothing are left out, and tables over the
same genes become one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitnas.arch import Arch, Block
from vitnas.counting import (
    BYTES,
    Frame,
    Part,
    behind,
    block_parts,
    head_part,
    reduction_part,
    selection_part,
    stem_part,
)
from vitnas.space.gene import Matrix, choices
from vitnas.space.keeps import Keeps, keeping_all
from vitnas.space.layout import Layout, Slot

JOINT = 256  # combinations of a block's genes up to which attention and MLP share a table
MLP_FIELDS = ("mlp_hidden",)


@dataclass(frozen=True)
class Term:
    """A part of the cost that depends on a few genes: one table entry per combination of their options.

    `macs` and `params` of all terms add up; `memory` (bytes) is the largest of the terms.
    """

    genes: tuple[int, ...]
    macs: npt.NDArray[np.int64]
    params: npt.NDArray[np.int64]
    memory: npt.NDArray[np.int64]


class CostTable:
    """Costs of many Archs at once, by looking up and adding (see `Term`)."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self._num_options = layout, _num_options(layout)
        self.parts = parts_of(layout)
        self._terms = _terms(layout, self.parts)

    def costs(self, genes: Matrix) -> dict[str, Matrix]:
        """Costs of canonical genes.

        Args:
            genes: (n, num_genes) option numbers.

        Returns:
            `macs`, `params` and `memory` (bytes), each of shape (n,); equal to `count(space.decode(row))`.
        """
        macs, params, memory = (np.zeros(len(genes), dtype=np.int64) for _ in range(3))
        columns = np.ascontiguousarray(np.asarray(genes).T)
        if self._layout.keeps:
            columns = np.concatenate([columns, self._layout.columns(np.asarray(genes)).T])
        for term in self._terms:
            index = np.zeros(len(genes), dtype=np.int64)
            for gene in term.genes:
                index = index * self._num_options[gene] + columns[gene]
            macs += term.macs.reshape(-1)[index]
            params += term.params.reshape(-1)[index]
            np.maximum(memory, term.memory.reshape(-1)[index], out=memory)
        return {"macs": macs, "params": params, "memory": memory}


Table = tuple[tuple[int, ...], npt.NDArray[np.int64]]
"""Genes, and what they cost: an axis per gene, then (macs, params, elements alive)."""


class Parts(NamedTuple):
    """Every part's cost, by the genes it depends on; of a block there are several tables."""

    stem: Table
    heads: list[Table]  # by how many stages there are
    reductions: list[Table]
    selections: list[Table]
    blocks: list[list[list[Table]]]  # by stage and slot, where there is a block


def parts_of(layout: Layout) -> Parts:
    """The costs of the Archs that the genes of `layout` say."""
    last, keeps = len(layout.stages) - 1, layout.keeps
    known: dict[Hashable, tuple[tuple[int, ...], list[Table]]] = {}
    blocks: list[list[list[Table]]] = []
    for number, (stage, all_fixed) in enumerate(zip(layout.stages, layout.blocks, strict=True)):
        blocks.append([])
        for place, (slot, fixed) in enumerate(zip(stage.slots, all_fixed, strict=True)):
            like = tuple(replace(layout.genes[index], name="", slot=0) for index in slot.genes)
            kept = kept_columns(layout, number, place)
            key = (number, tuple(fixed.items()), like, *(column is None for column in kept))
            own = (*slot.genes, *(column for column in kept if column is not None))
            if key not in known:
                known[key] = own, list(_block_parts(layout, number, slot, fixed, kept))
            moved = dict(zip(known[key][0], own, strict=True))
            blocks[-1].append(
                [(tuple(moved.get(gene, gene) for gene in genes), costs) for genes, costs in known[key][1]]
            )
    heads = [_part(layout, (count - 1,), head_part, option) for option, count in enumerate(layout.counts)]
    if keeps and layout.counts[-1] == len(layout.stages):
        heads[-1] = _kept_head(layout, keeps)
    return Parts(
        stem=_part(layout, (0,), stem_part),
        heads=heads,
        reductions=[
            _part(layout, (n, n + 1), lambda arch, *dims, n=n: reduction_part(arch, n, *dims))
            for n in range(last)
        ],
        selections=list(_selections(layout, keeps)) if keeps else [],
        blocks=blocks,
    )


def _terms(layout: Layout, parts: Parts) -> list[Term]:
    """The cost as a sum over few genes at a time."""

    def there(table: Table, has: Callable[[int], bool]) -> Table:
        """The same where the number of stages is such, else nothing."""
        if layout.staging is None:
            return table
        return _alive(table, layout.staging, [has(count) for count in layout.counts])

    tables = [parts.stem, *parts.selections]
    tables += [there(head, count.__eq__) for count, head in zip(layout.counts, parts.heads, strict=True)]
    tables += [there(table, number.__lt__) for number, table in enumerate(parts.reductions, start=1)]
    for number, (stage, slots) in enumerate(zip(layout.stages, parts.blocks, strict=True)):
        for place, (slot, of_block) in enumerate(zip(stage.slots, slots, strict=True)):
            for table in of_block:
                if slot.exists is not None:
                    table = _alive(table, slot.exists, (False, True))
                elif stage.depth is not None:
                    depths = layout.genes[stage.depth].options
                    table = _alive(table, stage.depth, [place < depth for depth in depths])
                tables.append(there(table, number.__lt__))
    found: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}
    for genes, costs in tables:
        if genes in found:
            sums = found[genes] + costs
            sums[..., 2] = np.maximum(found[genes][..., 2], costs[..., 2])
            costs = sums
        found[genes] = costs
    columns = {genes: np.ascontiguousarray(np.moveaxis(costs, -1, 0)) for genes, costs in found.items()}
    return [Term(genes, macs, params, memory * BYTES) for genes, (macs, params, memory) in columns.items()]


def _part(
    layout: Layout, stages: tuple[int, ...], part: Callable[..., Part], count: int | None = None
) -> Table:
    """The cost of a part that depends on the widths of these stages.

    Args:
        count: the option of how many stages there are; the most by default.
    """
    genes = (*layout.of_arch, *(layout.stages[number].width for number in stages))

    def cost(*options: int) -> tuple[int, int, int]:
        widths = [layout.genes[i].options[n] for i, n in zip(genes, options, strict=True)]
        like = _like(layout, layout.of_arch, options[: -len(stages)], count)
        found = part(like, *widths[-len(stages) :])
        return found.macs, found.params, found.memory

    return _tabulate(layout, genes, cost)


def _kept_head(layout: Layout, keeps: Keeps) -> Table:
    """The cost of the head, by the patches that come to it."""

    def cost(like: Arch, dim: int, level: int) -> tuple[int, int, int]:
        patches = math.prod(like.grids[-1])
        left = keeps.patches(level, patches)
        part = head_part(like, dim, keep=left, selector=keeps.selector if left < patches else None)
        return part.macs, part.params, part.memory

    return _by_level(layout, (keeps.level_column(len(keeps.stretches)),), cost)


def _selections(layout: Layout, keeps: Keeps) -> Iterator[Table]:
    """The cost of the selection in front of each stretch, by the patches before and behind it."""
    last = len(layout.stages) - 1
    head_dim = layout.blocks[-1][0].get("head_dim", 0)  # one for all blocks, if the kind goes by keys

    def cost(like: Arch, dim: int, before: int, after: int) -> tuple[int, int, int]:
        if after >= before:
            return 0, 0, 0
        patches = math.prod(like.grids[-1])
        came = None if before == keeps.full else keeps.patches(before, patches)
        frame = Frame.of(like, last)._replace(keep=came)
        part = selection_part(keeps.selector, dim, frame, keeps.patches(after, patches), head_dim)
        return part.macs, part.params, part.memory

    for k in range(len(keeps.stretches)):
        yield _by_level(layout, (keeps.level_column(k), keeps.level_column(k + 1)), cost)


def _by_level(layout: Layout, columns: tuple[int, ...], cost: Callable[..., tuple[int, int, int]]) -> Table:
    """A table over the last stage's width and levels of patches kept."""
    width, n = layout.stages[-1].width, len(layout.of_blocks)

    def by_options(*options: int) -> tuple[int, int, int]:
        like = _like(layout, layout.of_blocks, options[:n])
        return cost(like, layout.genes[width].options[options[n]], *options[n + 1 :])

    return _tabulate(layout, (*layout.of_blocks, width, *columns), by_options)


def kept_columns(layout: Layout, number: int, place: int) -> tuple[int | None, int | None]:
    """Which columns say how many patches a slot's block has, and whether it must tell what it looked at."""
    keeps = layout.keeps
    if keeps is None or number < len(layout.stages) - 1:
        return None, None
    stretch = keeps.stretch(place)
    return None if stretch is None else keeps.stretches[stretch].gene, keeps.gives_column(place)


def _block_parts(
    layout: Layout, number: int, slot: Slot, fixed: dict[str, Any], kept: tuple[int | None, int | None]
) -> Iterator[Table]:
    """The cost of attention and MLP of a block, in one table where that stays small."""
    width = layout.stages[number].width
    whole = [layout.genes[index] for index in slot.genes]
    of_mlp = [index for index in slot.genes if layout.genes[index].field in MLP_FIELDS]
    of_attn = [index for index in slot.genes if index not in of_mlp]
    joint = choices(whole) <= JOINT
    ruled = [rule for rule in layout.ruled if rule.gene in slot.genes]
    frames: dict[tuple[int, ...], Frame] = {}

    def table(own: Sequence[int], wanted: slice) -> Table:
        genes = (*layout.of_blocks, width, *own, *(column for column in kept if column is not None))
        chosen = [0] * len(_num_options(layout))

        def cost(*options: int) -> tuple[int, int, int]:
            for gene, option in zip(genes, options, strict=True):
                chosen[gene] = option
            for gene, ruler, rules in ruled:
                chosen[gene] *= int(rules[chosen[ruler]])
            dim = layout.genes[width].options[chosen[width]]
            key = options[: len(layout.of_blocks)]
            if key not in frames:
                frames[key] = Frame.of(_like(layout, layout.of_blocks, key), number)
            frame = frames[key]
            if layout.keeps and kept[0] is not None and chosen[kept[0]] < layout.keeps.full:
                left = layout.keeps.patches(chosen[kept[0]], math.prod(frame.grid))
                frame = behind(layout.keeps.selector, frame, left)
            if layout.keeps and kept[1] is not None and chosen[kept[1]]:
                frame = frame._replace(asked=layout.keeps.asked)
            block = Block(**layout.block(chosen, slot, fixed, dim))
            parts = list(block_parts(block, dim, frame, "executed"))[wanted]
            return sum(p[0] for p in parts), sum(p[1] for p in parts), max(p[2] for p in parts)

        return _tabulate(layout, genes, cost)

    yield from (
        [table(slot.genes, slice(2))] if joint else [table(of_attn, slice(1)), table(of_mlp, slice(1, 2))]
    )


def _like(layout: Layout, of_arch: Sequence[int], options: Sequence[int], count: int | None = None) -> Arch:
    """The smallest Arch with these options of some genes that say its own fields, which keeps all patches; with all
    stages, or with so many as the option `count` says."""
    genes = [0] * len(layout.genes)
    for index, option in zip(of_arch, options, strict=True):
        genes[index] = option
    if layout.staging is not None:
        genes[layout.staging] = len(layout.counts) - 1 if count is None else count
    return keeping_all(layout.arch(tuple(layout.canonical(np.array([genes]))[0].tolist())))


def _num_options(layout: Layout) -> tuple[int, ...]:
    """Of the genes, and of the columns behind them."""
    return layout.num_options + (layout.keeps.num_options if layout.keeps else ())


def _tabulate(layout: Layout, genes: Sequence[int], cost: Callable[..., tuple[int, int, int]]) -> Table:
    """The cost by every combination of the options of `genes`, without the genes that change nothing."""
    sizes = [_num_options(layout)[gene] for gene in genes]
    table = np.array([cost(*index) for index in np.ndindex(*sizes)], dtype=np.int64).reshape(*sizes, 3)
    return _reduced(tuple(genes), table)


def _alive(table: Table, gene: int, is_alive: Sequence[bool]) -> Table:
    """The same where `gene` has one of the options marked, else nothing."""
    genes, costs = table
    shaped = np.asarray(is_alive).reshape(-1, *(1,) * costs.ndim)
    return _reduced((gene, *genes), costs[None] * shaped)


def _reduced(genes: tuple[int, ...], table: npt.NDArray[np.int64]) -> Table:
    """In the order of the genes, without those along whose axis nothing changes."""
    order = sorted(range(len(genes)), key=lambda axis: genes[axis])
    kept: list[int] = []
    table = table.transpose(*order, len(genes))
    for gene in sorted(genes):
        axis = len(kept)
        first = np.take(table, [0], axis=axis)
        if (table == first).all():
            table = first.squeeze(axis)
        else:
            kept.append(gene)
    return tuple(kept), np.ascontiguousarray(table)
