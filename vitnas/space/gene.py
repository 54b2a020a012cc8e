"""Gene: one decision, and what it says of an Arch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Genes = tuple[int, ...]
Matrix = npt.NDArray[np.int64]
Scope = Literal["arch", "stage", "block"]


@dataclass(frozen=True, slots=True)
class Gene:
    """One decision: the value of a field of the Arch, of a stage, or of the block in a slot of a stage.

    Besides their own fields a stage has `depth` (so many first slots hold a block) and a slot has `exists`; a block has
    `inner_dim`, the width of all heads together. A block's gene matters where its slot holds a block.

    Args:
        name: its kind and place, `num_heads.3`.
        options: in order; the last ones make the largest Arch.
        structural: changes the whole Arch (depth, embedding width); search moves such genes less often.
        weights: the chances of the options when drawn; None for equal ones.
        flips: has two options, and a mutation takes the other one.
        scope: whose field it says.
        field: of that; by default the name's kind.
        stage, slot: where. A field of the Arch only matters where there is that stage.
        shares: options are shares of the stage's embedding width, rounded down.
        follows: the slot can only hold a block where the one before does.
        when: a field of the same block and those of its values for which this gene matters.
        apart: the options do not lie within each other, so each must be among the Space's representatives.
    """

    name: str
    options: tuple[Any, ...]
    structural: bool = False
    weights: tuple[float, ...] | None = None
    flips: bool = False
    scope: Scope = "arch"
    field: str = ""
    stage: int = 0
    slot: int = 0
    shares: bool = False
    follows: bool = False
    when: tuple[str, tuple[Any, ...]] | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "field", self.field or kind_of(self))

    def draw(self, rng: random.Random) -> int:
        """A random option number."""
        if self.weights is None:
            return rng.randrange(len(self.options))
        return rng.choices(range(len(self.options)), self.weights)[0]

    def value(self, option: int, width: int) -> Any:
        """The field's value by an option, in a stage of that embedding width."""
        return int(width * self.options[option]) if self.shares else self.options[option]

    def values(self, width: int) -> list[Any]:
        """The field's value by every option, in a stage of that embedding width."""
        return [self.value(option, width) for option in range(len(self.options))]


def kind_of(gene: Gene) -> str:
    """`num_heads` of gene `num_heads.3`."""
    return gene.name.partition(".")[0]


def choices(genes: Sequence[Gene]) -> int:
    """In how many ways the genes of one block can be chosen; where a gene does not matter it counts once."""
    total = 1
    for gene in genes:
        if gene.when is None:
            ruled = [(len(other.options), *other.when) for other in genes if other.when]
            total *= sum(
                math.prod(n for n, field, values in ruled if field == gene.field and option in values)
                for option in gene.options
            )
    return total


def option_number(what: str, value: Any, options: Sequence[Any]) -> tuple[int, list[str]]:
    """The number of the option that is `value`, or of the nearest and a reason."""
    if value in options:
        return list(options).index(value), []
    allowed = f"allowed are {', '.join(map(str, options))}"
    if isinstance(value, str):
        return 0, [f"{what} is {value!r}; {allowed}"]
    near = min(range(len(options)), key=lambda index: abs(options[index] - value))
    return near, [f"{what} is {value}; {allowed}. Nearest: {options[near]}"]
