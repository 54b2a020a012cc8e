"""Layout: what a Space's genes say, worked out once: which Arch they make, which of them matter, how many Archs there
are, and which genes an Arch has."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from vitnas.arch import Arch, Block, Stage
from vitnas.grids import Grid, sides_of
from vitnas.layers.selectors import SELECTIONS
from vitnas.space.gene import Gene, Genes, Matrix, choices, option_number
from vitnas.space.keeps import FIELD as KEEP
from vitnas.space.keeps import Keeps, Stretch

Fields = dict[str, Any]
STAGES = "num_stages"  # of an Arch, where a gene says how many of the first stages there are
STEM_ALONE = ("stem",)  # fields of which nothing depends but the stem
Mask = npt.NDArray[np.bool_]
T = TypeVar("T")


class Slot(NamedTuple):
    """A place for a block: the gene that says whether there is one, and those of its fields, by number."""

    exists: int | None
    follows: bool
    genes: tuple[int, ...]


class StageGenes(NamedTuple):
    """The genes of a stage, by number. `first` is its first slot's number in the whole net."""

    width: int
    depth: int | None
    first: int
    slots: tuple[Slot, ...]


class Plan(NamedTuple):
    """An Arch as fields: its own, and per stage the width and by slot those of each block."""

    arch: Fields
    stages: list[tuple[int, dict[int, Fields]]]


class Ruled(NamedTuple):
    """A gene that only matters with some options of another of its block: both, and which options."""

    gene: int
    ruler: int
    rules: Mask


class Layout:
    """The genes of a Space by stage and slot.

    Args:
        genes: in order.
        fixed: fields of every Arch that are no gene's.
        blocks: per stage and slot, fields of a block that are no gene's.
        block_fields: makes a Block's fields of those that genes tell and that are fixed.
        arch_fields: makes an Arch's fields of those, for so many stages.
        is_staged: blocks are counted per stage.
        selector: who chooses the patches kept, if genes say how many.
    """

    def __init__(
        self,
        genes: Sequence[Gene],
        fixed: Fields,
        blocks: Sequence[Sequence[Fields]],
        block_fields: Callable[[Fields], Fields],
        arch_fields: Callable[[Fields, int], Fields],
        *,
        is_staged: bool,
        selector: str,
    ) -> None:
        self.genes, self.fixed, self.blocks = tuple(genes), fixed, blocks
        self.block_fields, self.arch_fields, self.is_staged = block_fields, arch_fields, is_staged
        self.num_options = tuple(len(gene.options) for gene in genes)
        told = [(i, gene.field) for i, gene in enumerate(genes) if gene.scope == "arch"]
        self.of_arch = tuple(i for i, field in told if field != STAGES)
        self.of_blocks = tuple(i for i in self.of_arch if genes[i].field not in STEM_ALONE)
        self.staging = next((i for i, field in told if field == STAGES), None)
        self.counts: tuple[int, ...] = (len(blocks),) if self.staging is None else genes[self.staging].options
        self.stages = self._find_stages()
        self.ruled = self._find_ruled()
        self.num_slots = sum(len(stage.slots) for stage in self.stages)
        self.keeps: Keeps | None = None
        if any(gene.field == KEEP for gene in genes):
            asked = SELECTIONS[selector].asked(class_token=fixed.get("class_token", True))
            self.keeps = Keeps(genes, len(self.stages[-1].slots), selector, asked)
        self._columns = self._find_columns()
        exist = [[slot.exists for slot in stage.slots if slot.exists is not None] for stage in self.stages]
        self._emptiable = [
            found for found, stage in zip(exist, self.stages, strict=True) if len(found) == len(stage.slots)
        ]

    def _find_stages(self) -> tuple[StageGenes, ...]:
        found, first = [], 0
        for number, blocks in enumerate(self.blocks):
            own = [(i, g) for i, g in enumerate(self.genes) if g.scope != "arch" and g.stage == number]
            of_stage = {gene.field: i for i, gene in own if gene.scope == "stage"}
            slots = []
            for place in range(len(blocks)):
                here = {i: g for i, g in own if g.scope == "block" and g.slot == place}
                exists = next((i for i, gene in here.items() if gene.field == "exists"), None)
                follows = exists is not None and self.genes[exists].follows
                slots.append(Slot(exists, follows, tuple(i for i in here if i != exists)))
            found.append(StageGenes(of_stage["embed_dim"], of_stage.get("depth"), first, tuple(slots)))
            first += len(slots)
        return tuple(found)

    def _find_columns(self) -> npt.NDArray[np.int64]:
        """For each gene the column of `_filled` that says whether it matters."""
        columns = np.zeros(len(self.genes), dtype=np.int64)
        for stage in self.stages:
            for place, slot in enumerate(stage.slots, start=1 + stage.first):
                columns[list(slot.genes)] = place
                if slot.exists is not None and slot.follows:
                    columns[slot.exists] = place - 1
        for k, stretch in enumerate(self._stretches):
            columns[stretch.gene] = 1 + self.num_slots + k
        first = 1 + self.num_slots + len(self._stretches)
        for i in self.of_arch:
            columns[i] = first + self.genes[i].stage
        for number, stage in enumerate(self.stages):
            exist = [slot.exists for slot in stage.slots if slot.exists is not None and not slot.follows]
            columns[[stage.width, *exist, *([] if stage.depth is None else [stage.depth])]] = first + number
        return columns

    @property
    def _stretches(self) -> Sequence[Stretch]:
        return self.keeps.stretches if self.keeps else ()

    def _find_ruled(self) -> list[Ruled]:
        found = []
        for slot in (slot for stage in self.stages for slot in stage.slots):
            by_field = {self.genes[index].field: index for index in slot.genes}
            for index in slot.genes:
                if (when := self.genes[index].when) is not None:
                    ruler = by_field[when[0]]
                    found.append(Ruled(index, ruler, np.isin(self.genes[ruler].options, when[1])))
        return found

    def option(self, index: int, genes: Sequence[int]) -> Any:
        """The option that `genes` choose of a gene."""
        return self.genes[index].options[genes[index]]

    def arch(self, genes: Genes) -> Arch:
        """The Arch of canonical genes."""
        plan = self.plan(genes)
        stages = tuple(
            Stage(embed_dim=width, blocks=tuple(Block(**block) for block in blocks.values()))
            for width, blocks in plan.stages
        )
        return Arch(stages=stages, **plan.arch)

    def plan(self, genes: Sequence[int]) -> Plan:
        """The Arch of canonical genes, not yet made."""
        arch = self._arch_fields(genes)
        stages = []
        count = self.count(genes)
        for stage, fixed in zip(self.stages[:count], self.blocks, strict=False):
            width = self.option(stage.width, genes)
            depth = len(fixed) if stage.depth is None else self.option(stage.depth, genes)
            kept = [
                i for i, slot in enumerate(stage.slots[:depth]) if slot.exists is None or genes[slot.exists]
            ]
            in_order = kept == list(range(len(kept)))
            blocks = {i: self.block(genes, stage.slots[i], fixed[i], width) for i in kept}
            for i, block in blocks.items():
                block["slot"] = None if in_order else i
            stages.append((width, blocks))
        if self.keeps and count == len(self.stages):
            selector = self.keeps.write(stages[-1][1], genes, math.prod(self._grid_of(arch)))
            if selector:
                arch["selector"] = selector
        return Plan(arch, stages)

    def grid(self, genes: Sequence[int]) -> Grid:
        """Rows and columns of the last stage's patches."""
        return self._grid_of(self._arch_fields(genes))

    def count(self, genes: Sequence[int]) -> int:
        """How many stages there are."""
        return self.counts[0 if self.staging is None else genes[self.staging]]

    def _arch_fields(self, genes: Sequence[int]) -> Fields:
        told = {self.genes[index].field: self.option(index, genes) for index in self.of_arch}
        return self.arch_fields(self.fixed | told, self.count(genes))

    def _grid_of(self, arch: Fields) -> Grid:
        height, width = sides_of(arch.get("work_size") or arch["image_size"])
        smaller = len(self.stages) - 1
        return height // arch["patch_size"] >> smaller, width // arch["patch_size"] >> smaller

    def block(self, genes: Sequence[int], slot: Slot, fixed: Fields, width: int) -> Fields:
        """The fields of the block in a slot."""
        told = {self.genes[i].field: self.genes[i].value(genes[i], width) for i in slot.genes}
        return self.block_fields({**fixed, **told})

    def read(self, arch: Arch) -> tuple[Genes, list[str]]:
        """Canonical genes of an Arch, and every reason why there are no such; then these are the nearest."""
        genes: list[int] = [0] * len(self.genes)
        reasons: list[str] = []

        def read(index: int, what: str, value: Any, width: int = 0) -> None:
            genes[index], found = option_number(what, value, self.genes[index].values(width))
            reasons.extend(found)

        for index in self._of(arch):
            read(index, self.genes[index].field, getattr(arch, self.genes[index].field))
        if self.staging is not None:
            read(self.staging, STAGES, len(arch.stages))
        elif len(arch.stages) != len(self.stages):
            reasons.append(f"it has {len(arch.stages)} stages, must have {len(self.stages)}")
        for number, (stage, given) in enumerate(zip(self.stages, arch.stages, strict=False)):
            prefix = f"stage {number}: " if self.is_staged else ""
            read(stage.width, f"{prefix}embed_dim", given.embed_dim)
            blocks = _by_slot(given)
            slots = list(blocks)
            if stage.depth is not None:
                genes[stage.depth], _ = option_number("depth", len(slots), self.genes[stage.depth].options)
            reasons += self._slot_reasons(number, slots, given.blocks[0].slot is not None)
            for place, block in blocks.items():
                if place < len(stage.slots):
                    if (exists := stage.slots[place].exists) is not None:
                        genes[exists] = 1
                    for index in stage.slots[place].genes:
                        if self._matters(index, block):
                            gene = self.genes[index]
                            what = f"{self._at(number, place)}: {gene.field}"
                            read(index, what, getattr(block, gene.field), given.embed_dim)
        if self.keeps and len(arch.stages) == len(self.stages):
            given_blocks, patches = _by_slot(arch.stages[-1]), math.prod(arch.grids[-1])
            for kept, slot, option, found in self.keeps.read(given_blocks, patches):
                genes[kept] = option
                reasons += [f"{self._at(len(self.stages) - 1, slot)}: {reason}" for reason in found]
        return tuple(genes), [*self._differences(arch, genes), *reasons]

    def _of(self, arch: Arch) -> list[int]:
        """The genes of `arch` itself that matter for it."""
        return [index for index in self.of_arch if self.genes[index].stage < len(arch.stages)]

    def _matters(self, index: int, block: Block) -> bool:
        when = self.genes[index].when
        return when is None or getattr(block, when[0]) in when[1]

    def _at(self, stage: int, slot: int) -> str:
        return f"stage {stage}, block {slot}" if self.is_staged else f"block {slot}"

    def _slot_reasons(self, number: int, slots: list[int], are_told: bool) -> list[str]:
        """Why blocks cannot lie in these slots of a stage."""
        stage, prefix = self.stages[number], f"stage {number}: " if self.is_staged else ""
        removable = [i for i, slot in enumerate(stage.slots) if slot.exists is not None]
        if are_told and slots == list(range(len(slots))):
            return [f"{prefix}slots must be left out where they say nothing"]
        if not removable:  # blocks follow each other, so many as the depth says
            if are_told:
                return [f"{prefix}slots are {slots}; blocks follow each other here"]
            depths = (len(stage.slots),) if stage.depth is None else self.genes[stage.depth].options
            return option_number(f"{prefix}depth", len(slots), depths)[1]
        if slots[-1] >= len(stage.slots):
            has = f"stage {number} has a block {slots[-1]}; it has"
            what = has if self.is_staged else f"there is a block {slots[-1]}; there are"
            return [f"{what} {len(stage.slots)}, counted from 0"]
        reasons = [
            f"{self._at(number, place)} is left out; only {', '.join(map(str, removable))} may be"
            for place, slot in enumerate(stage.slots)
            if place not in slots and slot.exists is None
        ]
        return reasons + [
            f"{self._at(number, place)} exists without the one before it"
            for place in slots
            if stage.slots[place].follows and place - 1 not in slots
        ]

    def _differences(self, arch: Arch, genes: Sequence[int]) -> list[str]:
        """A reason for every field that is no live gene's and differs from what these genes make."""
        plan = self.plan(genes)
        told = {self.genes[index].field for index in self._of(arch)}
        reasons = _differing("", arch, plan.arch, told | {"stages"})
        for number, (stage, given, (_, wanted)) in enumerate(
            zip(self.stages, arch.stages, plan.stages, strict=False)
        ):
            for place, block in _by_slot(given).items():
                if place in wanted:
                    live = [index for index in stage.slots[place].genes if self._matters(index, block)]
                    told = {self.genes[index].field for index in live}
                    told |= {"slot", *(["head_dim"] if "inner_dim" in told else [])}
                    reasons += _differing(f"{self._at(number, place)}: ", block, wanted[place], told)
        return reasons

    def canonical(self, genes: Matrix) -> Matrix:
        """(n, num_genes) genes that say an Arch: where every slot of a stage is empty, the first gets a block, the
        patches kept never rise, and genes that do not matter are 0."""
        for exist in self._emptiable:
            empty = ~genes[:, exist].any(axis=1)
            if empty.any():
                genes = genes.copy()
                genes[empty, exist[0]] = 1
        filled = self._filled(genes)
        if self.keeps:
            first = 1 + self.num_slots
            genes = self.keeps.settled(genes, filled[:, first : first + len(self._stretches)])
        canonical: Matrix = np.where(self._active(genes, filled), genes, 0)
        return canonical

    def selecting(self, last: Sequence[int]) -> Iterator[list[int]]:
        """Genes like `last` with a selection in front of every slot where there may be one."""
        for stretch in self._stretches:
            # With one share, patches fall where nothing kept fewer before.
            start = self._stretches[0].start if self.keeps and len(self.keeps.shares) == 1 else stretch.start
            for slot in range(stretch.start, stretch.stop):
                genes = list(last)
                for other in self._stretches:
                    genes[other.gene] = 0 if other.gene >= stretch.gene else last[other.gene]
                for before in range(start, slot):
                    if (exists := self.stages[-1].slots[before].exists) is None:
                        break
                    genes[exists] = 0
                else:
                    yield genes

    def columns(self, genes: Matrix) -> Matrix:
        """(n, columns) what costs depend on besides canonical genes; see `Keeps.columns`."""
        assert self.keeps is not None
        of_last = slice(1 + self.stages[-1].first, 1 + self.num_slots)
        return self.keeps.columns(genes, self._filled(genes)[:, of_last])

    def active(self, genes: Matrix) -> Mask:
        """(n, num_genes): which genes matter, given the others."""
        return self._active(genes, self._filled(genes))

    def _active(self, genes: Matrix, filled: Mask) -> Mask:
        active: Mask = np.take(filled, self._columns, axis=1)
        for gene, ruler, rules in self.ruled:
            active[:, gene] &= rules[genes[:, ruler]]
        return active

    def _filled(self, genes: Matrix) -> Mask:
        """(n, 1 + slots of the net + stretches + stages): True, which slots, and stretches of them, hold a block, and
        which stages there are."""
        before = 1 + self.num_slots + len(self._stretches)
        filled = np.ones((len(genes), before + len(self.stages)), dtype=np.bool_)
        if self.staging is not None:
            count = np.asarray(self.counts)[genes[:, self.staging]]
            filled[:, before:] = np.arange(len(self.stages))[None] < count[:, None]
        for number, stage in enumerate(self.stages):
            here = slice(1 + stage.first, 1 + stage.first + len(stage.slots))
            if stage.depth is not None:
                depth = np.asarray(self.genes[stage.depth].options)[genes[:, stage.depth]]
                filled[:, here] = np.arange(len(stage.slots))[None] < depth[:, None]
            for place, slot in enumerate(stage.slots, start=1 + stage.first):
                if slot.exists is not None:
                    filled[:, place] = genes[:, slot.exists] > 0
                    if slot.follows:
                        filled[:, place] &= filled[:, place - 1]
            if self.staging is not None:
                filled[:, here] &= filled[:, before + number, None]
        for k, stretch in enumerate(self._stretches, start=1 + self.num_slots):
            first = 1 + self.stages[-1].first
            filled[:, k] = filled[:, first + stretch.start : first + stretch.stop].any(axis=1)
        return filled

    def size(self) -> int:
        """Number of different Archs."""
        ways_of_stages = [self._ways(number) for number in range(len(self.stages))]
        return sum(
            math.prod(
                len(self.genes[index].options) for index in self.of_arch if self.genes[index].stage < count
            )
            * math.prod(ways_of_stages[:count])
            for count in self.counts
        )

    def _ways(self, number: int) -> int:
        """In how many ways a stage can be."""
        stage = self.stages[number]
        ways = [choices([self.genes[index] for index in slot.genes]) for slot in stage.slots]
        fillings = self.fold(
            number,
            1,
            fill=lambda place, level, tells: ways[place],
            select=lambda stretch, before, behind: 1,
            both=operator.mul,
            either=operator.add,
        )
        return len(self.genes[stage.width].options) * sum(fillings.values())

    def fold(
        self,
        number: int,
        start: T,
        *,
        fill: Callable[[int, int, bool], T],
        select: Callable[[int, int, int], T],
        both: Callable[[T, T], T],
        either: Callable[[T, T], T],
    ) -> dict[int, T]:
        """Go through all ways to fill the slots of a stage, once each, from the first slot to the last.

        Args:
            start: the value of nothing.
            fill: of a block in a slot, by the level of patches kept and whether it tells a selection its attention.
            select: of the selection in front of a stretch, by the level before and behind.
            both: joins what a way has.
            either: joins ways.

        Returns:
            The value of all ways, by the level at the end.
        """
        stage, keeps = self.stages[number], self.keeps if number == len(self.stages) - 1 else None
        depths = (len(stage.slots),) if stage.depth is None else self.genes[stage.depth].options
        asks = keeps is not None and keeps.asks
        total: dict[Any, T] = {}

        def put(ways: dict[Any, T], way: Any, value: T) -> None:
            ways[way] = either(ways[way], value) if way in ways else value

        for depth in depths:
            ways = {_Way(True, keeps.full if keeps else 0, True, False, False): start}
            for place, slot in enumerate(stage.slots[:depth]):
                k, found = keeps.stretch(place) if keeps else None, dict[_Way, T]()
                begins = keeps is not None and k is not None and keeps.stretches[k].start == place
                for before, value in ways.items():
                    way = before._replace(is_settled=before.is_settled and not begins)
                    if slot.exists is not None:
                        put(found, way._replace(is_filled=False), value)
                    if slot.follows and not way.is_filled:
                        continue
                    lower = keeps.lower(way.level) if keeps and not way.is_settled else [way.level]
                    for level in lower:
                        if asks and way.tells != (level < way.level):
                            continue
                        if k is not None and level < way.level:
                            gone = both(value, select(k, way.level, level))
                        else:
                            gone = value
                        for tells in (False, True) if asks else (False,):
                            put(
                                found,
                                _Way(True, level, True, tells, True),
                                both(gone, fill(place, level, tells)),
                            )
                ways = found
            for way, value in ways.items():
                if way.has_block and not way.tells:
                    put(total, way.level, value)
        return total


class _Way(NamedTuple):
    """How the slots before one are filled: whether the last is, the level of patches kept, whether the stretch has
    settled it, whether the last block tells a selection behind it its attention, and whether there is any block."""

    is_filled: bool
    level: int
    is_settled: bool
    tells: bool
    has_block: bool


def _by_slot(stage: Stage) -> dict[int, Block]:
    return dict(zip(stage.slots, stage.blocks, strict=True))


def _differing(where: str, given: Any, wanted: Mapping[str, Any], told: Collection[str]) -> list[str]:
    """A reason for every field of a dataclass that is not what is wanted, or by default; `told` ones are let be."""
    usual = {item.name: item.default for item in fields(given) if item.default is not MISSING}
    return [
        f"{where}{name} is {getattr(given, name)!r}, must be {value!r}"
        for name, value in {**usual, **wanted}.items()
        if name not in told and getattr(given, name) != value
    ]
