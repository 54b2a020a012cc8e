"""Space: the Archs that are allowed, as an ordered list of genes.

Genes are a fixed-length tuple of option numbers, one per gene. Genes that do not matter (the widths of a block that
the depth leaves out) are 0 in canonical form, so that equal Archs have equal genes.
"""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vitnas.arch import Arch
from vitnas.errors import UserError

Genes = tuple[int, ...]
Matrix = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Gene:
    """One decision. `structural` genes (depth, embedding width) change the whole Arch; search moves them less often.

    `weights` are the chances of the options when drawn; None for equal ones. A gene that `flips` has two options, and
    a mutation takes the other one.
    """

    name: str
    options: tuple[Any, ...]
    structural: bool = False
    weights: tuple[float, ...] | None = None
    flips: bool = False

    def draw(self, rng: random.Random) -> int:
        """A random option number."""
        if self.weights is None:
            return rng.randrange(len(self.options))
        return rng.choices(range(len(self.options)), self.weights)[0]


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

    def __init__(self, num_options: Sequence[int], terms: Sequence[Term]) -> None:
        self._num_options, self._terms = tuple(num_options), tuple(terms)

    def costs(self, genes: Matrix) -> dict[str, Matrix]:
        """Costs of canonical genes.

        Args:
            genes: (n, num_genes) option numbers.

        Returns:
            `macs`, `params` and `memory` (bytes), each of shape (n,); equal to `count(space.decode(row))`.
        """
        macs, params, memory = (np.zeros(len(genes), dtype=np.int64) for _ in range(3))
        columns = np.ascontiguousarray(np.asarray(genes).T)
        for term in self._terms:
            index = np.zeros(len(genes), dtype=np.int64)
            for gene in term.genes:
                index = index * self._num_options[gene] + columns[gene]
            macs += term.macs.reshape(-1)[index]
            params += term.params.reshape(-1)[index]
            np.maximum(memory, term.memory.reshape(-1)[index], out=memory)
        return {"macs": macs, "params": params, "memory": memory}


class Space(ABC):
    """The Archs allowed. Subclasses say what genes there are, what they mean and which of them matter."""

    name: str
    merged: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Neighbouring axes that Archs re-partition, and the name under which a Supernet takes them as one."""

    @property
    @abstractmethod
    def genes(self) -> tuple[Gene, ...]:
        """The genes, in order."""

    @abstractmethod
    def arch_of(self, genes: Genes) -> Arch:
        """The Arch of canonical genes."""

    @abstractmethod
    def genes_of(self, arch: Arch) -> Genes:
        """Canonical genes of an Arch; raises UserError listing every reason why it is not in the Space."""

    @abstractmethod
    def active_matrix(self, genes: Matrix) -> npt.NDArray[np.bool_]:
        """(n, num_genes): which genes matter, given the others."""

    @abstractmethod
    def size(self) -> int:
        """Number of different Archs."""

    @abstractmethod
    def cost_terms(self) -> list[Term]:
        """The cost as a sum over few genes at a time."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """`{"kind": ..., "options": {...}}`, from which `space_from_json` makes an equal Space."""

    def settle_matrix(self, genes: Matrix) -> Matrix:
        """(n, num_genes) genes that say an Arch; a Space where some combinations do not (no block at all) mends
        them."""
        return genes

    # From here on everything follows from the above.

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
        return self.genes_of(arch)

    def contains(self, arch: Arch) -> list[str]:
        """Reasons why `arch` is not in the Space; empty if it is."""
        try:
            self.genes_of(arch)
        except NotInSpace as error:
            return error.reasons
        return []

    def check(self, arch: Arch) -> None:
        """Raise UserError with all reasons if `arch` is not in the Space."""
        self.genes_of(arch)

    def canonical(self, genes: Sequence[int]) -> Genes:
        """`genes` with those that do not matter set to 0."""
        return tuple(self.canonical_matrix(np.asarray([genes], dtype=np.int64))[0].tolist())

    def canonical_matrix(self, genes: Matrix) -> Matrix:
        """(n, num_genes) genes with those that do not matter set to 0."""
        genes = self.settle_matrix(genes)
        canonical: Matrix = np.where(self.active_matrix(genes), genes, 0)
        return canonical

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
        for gene, value, alive in zip(self.genes, genes, self._active(genes), strict=True):
            if not alive:
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
        """Archs whose parameters together have every size and every option that the Space has: the largest, and more
        where options do not lie within each other (patch sizes)."""
        return [self.largest()]

    def corners(self) -> list[Arch]:
        """Every combination of first and last option over *kinds* of genes (all heads move together, and so on)."""
        kinds = list(dict.fromkeys(kind_of(gene) for gene in self.genes))
        found = []
        for ends in itertools.product((False, True), repeat=len(kinds)):
            end = dict(zip(kinds, ends, strict=True))
            found.append(self.decode([len(g.options) - 1 if end[kind_of(g)] else 0 for g in self.genes]))
        return list(dict.fromkeys(found))

    def cost_table(self) -> CostTable:
        """Vectorised costs (made once)."""
        return self._cost_table

    @cached_property
    def _cost_table(self) -> CostTable:
        return CostTable(self.num_options, self.cost_terms())

    def slots(self, arch: Arch) -> list[int]:
        """For every block of `arch`, the block of the largest Arch whose weights it uses."""
        offset, found = 0, []
        for stage, widest in zip(arch.stages, self.largest().stages, strict=True):
            found += [offset + (i if b.slot is None else b.slot) for i, b in enumerate(stage.blocks)]
            offset += len(widest.blocks)
        return found

    def _active(self, genes: Sequence[int]) -> list[bool]:
        active: list[bool] = self.active_matrix(np.asarray([genes], dtype=np.int64))[0].tolist()
        return active


class NotInSpace(UserError):
    """An Arch that a Space does not allow, with every reason."""

    def __init__(self, space: str, arch: Arch, reasons: list[str]) -> None:
        self.reasons = reasons
        super().__init__(f"{arch.id} is not in {space}: " + "; ".join(reasons) + ".")


def kind_of(gene: Gene) -> str:
    """`num_heads` of gene `num_heads.3`."""
    return gene.name.partition(".")[0]


def field_reasons(arch: Arch, wanted: Mapping[str, Any], varied: Sequence[str] = ()) -> list[str]:
    """One reason per field of `arch` that differs from `wanted`, or from its default where that says nothing.

    `varied` fields are the Space's to choose.
    """
    usual = {item.name: item.default for item in fields(Arch) if item.default is not MISSING}
    return [
        f"{name} is {getattr(arch, name)!r}, must be {value!r}"
        for name, value in {**{name: usual[name] for name in usual if name not in varied}, **wanted}.items()
        if getattr(arch, name) != value
    ]


def option_reason(what: str, value: Any, options: Sequence[Any]) -> list[str]:
    """A reason if `value` is not one of `options`, naming the nearest."""
    if value in options:
        return []
    near = min(options, key=lambda option: abs(option - value))
    return [f"{what} is {value}; allowed are {', '.join(map(str, options))}. Nearest: {near}"]
