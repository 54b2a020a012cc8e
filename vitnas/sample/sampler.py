"""What a Sampler returns, what a kind of Sampler says of itself, and the Sampler for a network that is no Supernet."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.errors import UserError
from vitnas.runs import RunFile
from vitnas.space import Space


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One Arch's part of a training step.

    Attributes:
        arch: what to run; None for a network that is not a Supernet.
        part: (i, n): run on the i-th of n equal slices of the batch; (0, 1) is the whole batch.
        weight: factor of its loss. Draws of a step are summed and stepped once.
        distill: learn from the logits of the step's first Draw (same images) beside the labels.
    """

    arch: Arch | None
    part: tuple[int, int] = (0, 1)
    weight: float = 1.0
    distill: bool = False

    def rows(self, batch_size: int) -> slice:
        """The images of the batch that this Draw sees.

        Raises:
            UserError: the batch does not divide into the parts.
        """
        index, parts = self.part
        if parts > batch_size:
            raise UserError(
                f"the batch has {batch_size} images; {parts} Archs per step need one each. Raise batch_size."
            )
        if batch_size % parts:
            low = batch_size // parts * parts
            raise UserError(
                f"the batch has {batch_size} images; {parts} Archs per step need equal shares. Use a batch_size of "
                f"{low} or {low + parts}."
            )
        return slice(index * batch_size // parts, (index + 1) * batch_size // parts)


class Sampler(Protocol):
    """Says which Archs train at a step: a pure function of the generator, so that a resumed run draws the same."""

    def draw(self, rng: random.Random) -> list[Draw]: ...


@dataclass(frozen=True)
class Fixed:
    """Always the same Arch; with None, the Sampler for training a Model by itself."""

    arch: Arch | None = None

    def draw(self, rng: random.Random) -> list[Draw]:
        return [Draw(arch=self.arch)]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a run gives a Sampler beside its Space.

    Attributes:
        images: held-out batches, for one that learns; None where it is only to be asked.
        cost_of: the cost of Archs on a latency target, as a function of their genes.
        settled: what `settle` found.
        budget: what the answer may cost, shares resolved.
        seed: of the run.
    """

    images: Any = None
    cost_of: Callable[[str], Any] | None = None
    settled: RunFile | None = None
    budget: Budget | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(ABC):
    """Which Archs train at a step: a kind of Sampler and its fields, from which it is built."""

    kind: ClassVar[str]
    answers: ClassVar[bool] = False  # once trained, it can be asked for the Archs of a budget
    settles: ClassVar[type[RunFile] | None] = None  # the file of what has to be found before any training

    @abstractmethod
    def build(self, space: Space, given: Given) -> Sampler:
        """The Sampler."""

    def check(self, run: Any) -> None:  # noqa: B027 -- most kinds go with everything
        """Raise UserError where other fields of the Run `run` do not go with this."""

    @property
    def is_settled(self) -> bool:
        """All that `build` needs is known before the Space is."""
        return True

    def settle(
        self, space: Space, budget: Budget, *, seed: int, measures: Mapping[str, Callable[[Arch], float]]
    ) -> RunFile:
        """What has to be found once, before any training; see `is_settled`."""
        raise NotImplementedError

    @property
    def latency_target(self) -> str:
        """What Archs are timed on before training; empty for nothing."""
        return ""

    @property
    def rewire_epochs(self) -> float:
        """Heads and hidden units are sorted at the start of so many first epochs."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class SlicesConfig(SamplerConfig):
    """What kinds with `num_archs` Archs per step, each on a slice of the batch, share."""

    num_archs: int = 2

    def __post_init__(self) -> None:
        if self.num_archs < 1:
            raise UserError(f"sampler.num_archs is {self.num_archs}; it must be at least 1. Use 2.")

    def check(self, run: Any) -> None:
        size, parts = run.data.batch_size, self.num_archs
        if size % parts:
            low = size // parts * parts
            raise UserError(
                f"data.batch_size is {size}; sampler.num_archs {parts} must divide it. Nearest: "
                f"{', '.join(str(n) for n in (low, low + parts) if n)}."
            )
