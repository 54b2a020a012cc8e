"""Space: the Archs that are allowed, as an ordered list of genes.

Genes are a fixed-length tuple of option numbers, one per gene. Genes that do not matter (the widths of a block that
the depth leaves out) are 0 in canonical form, so that equal Archs have equal genes.

A Space declares its genes and what does not vary. How genes become an Arch and an Arch genes, which genes matter, how
many Archs there are and what they cost follows from that.
"""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vitnas.arch import Arch
from vitnas.errors import UserError, check_word
from vitnas.grids import ImageSize, as_image_size
from vitnas.layers.select import Selection
from vitnas.layers.selectors import SELECTIONS
from vitnas.space.costs import CostTable
from vitnas.space.gene import Gene, Genes, Matrix, kind_of
from vitnas.space.keeps import FIELD as KEEP
from vitnas.space.keeps import share_of
from vitnas.space.layout import Layout
from vitnas.space.private import Private
from vitnas.space.span import span


@dataclass(frozen=True, kw_only=True)
class Space(ABC):
    """The Archs allowed. Subclasses declare their genes and what does not vary.

    Args:
        image_size: in pixels.
        keep: shares of the patches that blocks may be left with (1.0 for all), a gene `keep_ratio.i` per place; () for
            no such genes.
        keep_places: the blocks from which on, counted from 0 in the last stage; by default the quarters of its depth.
        selector: who chooses the patches (see `Arch`).
    """

    kind: ClassVar[str]
    merged: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Neighbouring axes that Archs re-partition, and the name under which a Supernet takes them as one."""
    private: ClassVar[tuple[Private, ...]] = ()
    """What a Supernet must not share between some options."""
    rising: ClassVar[tuple[str, ...]] = ()
    """Fields of numbers that must be positive and rise."""

    name: str
    image_size: ImageSize
    in_chans: int = 3
    num_classes: int = 1000
    keep: tuple[float, ...] = ()
    keep_places: tuple[int, ...] = ()
    selector: str = "predictor"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_image_size("image_size", self.image_size))
        for name in self.rising:
            object.__setattr__(self, name, rising(name, getattr(self, name)))
        self._check()
        self._check_keep()
        for arch in (self.smallest(), *self.representatives()):  # an Arch checks its own sizes
            assert arch.depth

    def _check(self) -> None:  # noqa: B027 (most have nothing to add)
        """Refuse options that do not fit together."""

    def _check_keep(self) -> None:
        """Refuse genes of patches kept that say nothing, or the same twice."""
        keep, places = tuple(sorted(set(self.keep))), tuple(sorted(set(self.keep_places)))
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "keep_places", places)
        if not keep:
            if places or self.selector != "predictor":
                raise UserError(
                    f"keep is empty, but keep_places is {places} and selector {self.selector!r}; they say where and "
                    "how fewer patches are kept. Give keep, for example 1.0, 0.7, 0.5."
                )
            return
        words = [word for word, kind in SELECTIONS.items() if not kind.keeps_keys]
        if self.selector in SELECTIONS and self.selector not in words:
            raise UserError(
                f"selector is {self.selector!r}, whose patches are found block by block in a trained network; genes "
                f"of a space leave the choice to one of {', '.join(words)}. Use {words[0]!r}."
            )
        check_word("selector", self.selector, words)
        kind, blocks = SELECTIONS[self.selector], self.fixed_blocks()
        slots = len(blocks[-1])
        places = places or tuple(sorted({slots * n // 4 for n in (1, 2, 3)} - {0}))
        if not all(0 < share <= 1 for share in keep):
            raise UserError(
                f"keep is {keep}; shares of the patches lie above 0 and up to 1. Use 1.0, 0.7, 0.5."
            )
        if keep == (1.0,):
            raise UserError(
                "keep is 1.0 alone; that leaves all patches everywhere, as without it. Add shares below, for example "
                "0.7, 0.5, or leave keep out."
            )
        if not places:
            raise UserError(
                f"keep is {keep} and the last stage has 1 block; patches are dropped between blocks of it. Give it "
                "more blocks, or leave keep out."
            )
        if not 0 <= places[0] <= places[-1] < slots:
            raise UserError(
                f"keep_places are {', '.join(map(str, places))}; they are blocks of the last stage, from 0 "
                f"to {slots - 1}. Name some of those."
            )
        object.__setattr__(self, "keep_places", places)
        last = (gene for gene in self.declared() if gene.stage == len(blocks) - 1)
        may_go = {gene.slot for gene in last if gene.field == "exists"}
        if (len(blocks) > 1 or kind.asks != "nothing") and may_go >= set(range(places[0])):
            why = (
                "behind a reduction, which needs all patches"
                if len(blocks) > 1
                else f"without any {kind.asks}"
            )
            raise UserError(
                f"keep_places begin at {places[0]} and every block before may be left out; a selection there would "
                f"stand {why}. Let a block before it stay, or name a later place."
            )
        self._check_levels(kind)

    def _check_levels(self, kind: type[Selection]) -> None:
        """That each share leaves another number of patches, and that the selector can go from any to any lower one."""
        keep = self.keep
        of_grid = ("patch_size", "seen_size")
        grids = (range(len(gene.options)) if gene.field in of_grid else (0,) for gene in self.genes)
        for genes in itertools.product(*grids):
            patches = math.prod(self.layout.grid(genes))
            left = [share_of(share, patches) for share in keep]
            if left[0] < 1 or len(set(left)) < len(left):
                raise UserError(
                    f"keep is {keep}; of {patches} patches that leaves {', '.join(map(str, left))}, and each must be "
                    "another number of at least 1. Leave some out."
                )
            if any(genes) and kind.of_one_grid:
                raise UserError(
                    f"selector is {self.selector!r} and there are several patch or work sizes; the places that it "
                    "keeps are those of one grid. Use one size, or selector 'predictor'."
                )
            for after, before in itertools.combinations(sorted({*left, patches}), 2):
                if (why := kind.refusal(after, before, self.layout.grid(genes))) is not None:
                    raise UserError(
                        f"keep is {keep}, which may leave {after} of {before} patches, and selector "
                        f"{self.selector!r}; {why}"
                    )
        widths = {block.get("head_dim") for block in self.fixed_blocks()[-1]}
        if kind.asks == "keys" and len(widths) > 1:
            raise UserError(
                f"selector is {self.selector!r} and heads are not all of one width; it goes by keys, and what it costs "
                "would depend on them. Use a space of one head_dim, or selector 'evit'."
            )

    @abstractmethod
    def declared(self) -> Iterator[Gene]:
        """The genes, in order."""

    @abstractmethod
    def fixed(self) -> dict[str, Any]:
        """Fields of every Arch that are neither a gene's nor their default, besides the data's."""

    @abstractmethod
    def fixed_blocks(self) -> Sequence[Sequence[dict[str, Any]]]:
        """Per stage and slot: fields of a block that are neither a gene's nor their default."""

    def block_fields(self, told: dict[str, Any]) -> dict[str, Any]:
        """The fields of a Block, from those that genes tell and that are fixed."""
        inner = told.pop("inner_dim", None)
        return told if inner is None else {**told, "head_dim": inner // told["num_heads"]}

    def arch_fields(self, told: dict[str, Any], num_stages: int) -> dict[str, Any]:
        """The fields of an Arch of so many stages, from those that genes tell and that are fixed."""
        return told

    # From here on everything follows from the above.

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """The genes, in order."""
        last, tail = len(self.fixed_blocks()) - 1, ""
        if self.is_staged:
            tail = f".{last}"
        kept = (
            Gene(f"keep_ratio{tail}.{place}", self.keep, scope="stage", field=KEEP, stage=last, slot=place)
            for place in self.keep_places
        )
        return (*self.declared(), *kept)

    @property
    def is_staged(self) -> bool:
        """Whether blocks are counted per stage."""
        return len(self.fixed_blocks()) > 1

    @cached_property
    def layout(self) -> Layout:
        """What the genes say, worked out once."""
        data = {name: getattr(self, name) for name in ("image_size", "in_chans", "num_classes")}
        blocks = self.fixed_blocks()
        return Layout(
            self.genes,
            {**data, **self.fixed()},
            blocks,
            self.block_fields,
            self.arch_fields,
            is_staged=self.is_staged,
            selector=self.selector,
        )

    def arch_of(self, genes: Genes) -> Arch:
        """The Arch of canonical genes."""
        return self.layout.arch(genes)

    def active_matrix(self, genes: Matrix) -> npt.NDArray[np.bool_]:
        """(n, num_genes): which genes matter, given the others."""
        return self.layout.active(genes)

    def size(self) -> int:
        """Number of different Archs."""
        return self.layout.size()

    def cost_table(self) -> CostTable:
        """Vectorised costs (made once)."""
        return self._cost_table

    @cached_property
    def _cost_table(self) -> CostTable:
        return CostTable(self.layout)

    def cost_span(self, quantity: str) -> tuple[int, int]:
        """The least and the most `macs`, `params` or `memory` (bytes) that any Arch costs."""
        return span(self.layout, self.cost_table().parts, quantity)

    def to_json(self) -> dict[str, Any]:
        """`{"kind": ..., "options": {...}}`, from which `space_from_json` makes an equal Space."""
        return {"kind": self.kind, "options": asdict(self)}

    @cached_property
    def num_options(self) -> tuple[int, ...]:
        return tuple(len(gene.options) for gene in self.genes)

    def decode(self, genes: Sequence[int]) -> Arch:
        """The Arch of `genes`, canonical or not.

        Raises:
            UserError: wrong length, or an option number that does not exist (position and range are given).
        """
        if len(genes) != len(self.genes):
            raise UserError(
                f"there are {len(genes)} genes; {self.name} has {len(self.genes)}. Give one per gene."
            )
        for position, (value, gene) in enumerate(zip(genes, self.genes, strict=True)):
            if not 0 <= value < len(gene.options):
                raise UserError(
                    f"gene {position} ({gene.name}) is {value}; it counts from 0 to {len(gene.options) - 1} "
                    f"for {', '.join(map(str, gene.options))}."
                )
        return self.arch_of(self.canonical(genes))

    def encode(self, arch: Arch) -> Genes:
        """Canonical genes of `arch`.

        Raises:
            UserError: `arch` is not in the Space; all reasons are given.
        """
        genes, reasons = self.layout.read(arch)
        if reasons:
            raise NotInSpace(self.name, arch, reasons)
        return genes

    def __contains__(self, arch: object) -> bool:
        return isinstance(arch, Arch) and not self.reasons_against(arch)

    def reasons_against(self, arch: Arch) -> list[str]:
        """Reasons why `arch` is not in the Space; none if it is."""
        return self.layout.read(arch)[1]

    def check(self, arch: Arch) -> None:
        """Raise UserError with all reasons if `arch` is not in the Space."""
        self.encode(arch)

    def canonical(self, genes: Sequence[int]) -> Genes:
        """`genes` with those that do not matter set to 0."""
        return tuple(self.canonical_matrix(np.asarray([genes], dtype=np.int64))[0].tolist())

    def canonical_matrix(self, genes: Matrix) -> Matrix:
        """(n, num_genes) genes with those that do not matter set to 0."""
        return self.layout.canonical(genes)

    def random_matrix(self, n: int, rng: np.random.Generator) -> Matrix:
        """(n, num_genes) canonical genes, every gene drawn by its weights."""
        genes = rng.integers(0, self.num_options, size=(n, len(self.genes)))
        for index, gene in enumerate(self.genes):
            if gene.weights is not None:
                genes[:, index] = rng.choice(len(gene.options), size=n, p=gene.weights)
        return self.canonical_matrix(genes)

    def random_genes(self, rng: random.Random) -> Genes:
        """Canonical genes, every gene drawn by its weights."""
        return self.canonical([gene.draw(rng) for gene in self.genes])

    def sample(self, rng: random.Random) -> Arch:
        """A random Arch (per gene, as AutoFormer samples; not uniform over distinct Archs)."""
        return self.arch_of(self.random_genes(rng))

    def mutate_genes(
        self, genes: Sequence[int], rng: random.Random, *, prob: float = 0.2, structural_prob: float = 0.4
    ) -> Genes:
        """Redraw (or flip) each gene with probability `prob` (`structural_prob` for depth and width); genes that a
        mutation brings to life are drawn at random. Defaults: AutoFormer's search."""
        child = []
        for gene, value, matters in zip(self.genes, genes, self._active(genes), strict=True):
            if not matters:
                child.append(gene.draw(rng))
            elif rng.random() < (structural_prob if gene.structural else prob):
                child.append(1 - value if gene.flips else rng.randrange(len(gene.options)))
            else:
                child.append(value)
        return self.canonical(child)

    def cross_genes(self, first: Sequence[int], second: Sequence[int], rng: random.Random) -> Genes:
        """Each gene from either parent; where it matters in one parent only, from that one."""
        rows = zip(first, second, self._active(first), self._active(second), strict=True)
        child = [
            a if alive_a and (not alive_b or rng.random() < 0.5) else b for a, b, alive_a, alive_b in rows
        ]
        return self.canonical(child)

    @cached_property
    def _extremes(self) -> dict[str, Arch]:
        last = [n - 1 for n in self.num_options]
        return {
            "largest": self.decode(last),
            "smallest": self.decode([0] * len(last)),
            "middle": self.decode([n // 2 for n in last]),
        }

    def largest(self) -> Arch:
        """The Arch with the last option of every gene (options rise)."""
        return self._extremes["largest"]

    def smallest(self) -> Arch:
        """The Arch with the first option of every gene."""
        return self._extremes["smallest"]

    def middle(self) -> Arch:
        """The Arch with the middle option of every gene."""
        return self._extremes["middle"]

    def representatives(self) -> list[Arch]:
        """Archs whose parameters together have every size and every option that the Space has: the largest, and, where
        options do not lie within each other (patch sizes, mixers), the largest with each of the others."""
        last = [n - 1 for n in self.num_options]
        apart = [i for i, gene in enumerate(self.genes) if gene.apart]
        found = []
        for back in range(max((self.num_options[i] for i in apart), default=1)):
            genes = list(last)
            for i in apart:
                genes[i] = max(0, last[i] - back)
            found.append(self.decode(genes))
        found += [self.decode(genes) for genes in self.layout.selecting(last)]
        return list(dict.fromkeys(found))

    def corners(self) -> list[Arch]:
        """Every combination of first and last option over *kinds* of genes (all heads move together, and so on)."""
        kinds = list(dict.fromkeys(kind_of(gene) for gene in self.genes))
        found = []
        for ends in itertools.product((False, True), repeat=len(kinds)):
            end = dict(zip(kinds, ends, strict=True))
            found.append(self.decode([len(g.options) - 1 if end[kind_of(g)] else 0 for g in self.genes]))
        return list(dict.fromkeys(found))

    def slots(self, arch: Arch) -> list[int]:
        """For every block of `arch`, the block of the largest Arch whose weights it uses."""
        return [
            stage.first + slot
            for stage, given in zip(self.layout.stages, arch.stages, strict=False)
            for slot in given.slots
        ]

    def _active(self, genes: Sequence[int]) -> list[bool]:
        active: list[bool] = self.active_matrix(np.asarray([genes], dtype=np.int64))[0].tolist()
        return active


class NotInSpace(UserError):
    """An Arch that a Space does not allow, with every reason."""

    def __init__(self, space: str, arch: Arch, reasons: list[str]) -> None:
        self.reasons = reasons
        super().__init__(f"{arch.id} is not in {space}: " + "; ".join(reasons) + ".")


MOST_BLOCKS, MOST_OPTION = 1_000, 1_000_000


def check_blocks(depth: int) -> None:
    """Raise UserError for more blocks than a Space can be made of."""
    if depth > MOST_BLOCKS:
        raise UserError(
            f"a stage of {depth:,} blocks is asked for; it has at most {MOST_BLOCKS:,}. Give fewer (depths)."
        )


def rising(name: str, options: Iterable[Any]) -> tuple[Any, ...]:
    """The options as a tuple: lists, as they come from JSON and YAML, would not hash.

    Raises:
        UserError: none, options that do not rise, or such as no network has.
    """
    given = tuple(options)
    if name == "depths" and given:
        check_blocks(given[-1])
    if any(isinstance(each, int) and each > MOST_OPTION for each in given):
        raise UserError(f"{name} is {given}; an option is at most {MOST_OPTION:,}. Give smaller ones.")
    if not given or any(b <= a for a, b in pairwise(given)) or given[0] <= 0:
        raise UserError(f"{name} is {given}; options must be positive and rise. Sort them, without repeats.")
    return given
