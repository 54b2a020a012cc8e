"""One Arch that a search tried (`Trial`), and the contract of what proposes the next one (`Searcher`)."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, Protocol, Self

from vitnas.arch import Arch
from vitnas.budget import Cost
from vitnas.errors import UserError
from vitnas.runs import RunFile
from vitnas.searching.goal import Goal, Objective
from vitnas.space import Genes, Space

MADE = "trial"  # the attribute of a trial that is written with it and never again
State = Literal["running", "scored", "rejected", "failed"]


class NothingLeftError(UserError):
    """The Searcher knows no Arch that meets the Budget and was not tried."""


@dataclass(frozen=True)
class Trial:
    """One Arch of a Study.

    Args:
        number: Optuna's trial number, unique in the Study; a trial run again gets a new one.
        proposal: which proposal of the Searcher it is, from 0; a trial run again keeps it.
        genes: canonical genes; `arch` decodes them.
        state: running, scored, rejected (misses the Budget, see `reasons`) or failed (its workers died).
        values: what the evaluator gave, by name; empty unless scored.
        cost: the Cost, with the measured latencies if the Budget limits any.
        reasons: why it was rejected or failed.
        generation: of the Searcher, if it has any.
    """

    number: int
    proposal: int
    genes: Genes
    space: Space = field(repr=False, compare=False)
    state: State
    cost: Cost
    values: Mapping[str, float] = field(default_factory=dict, hash=False)
    reasons: tuple[str, ...] = ()
    generation: int | None = None

    @cached_property
    def arch(self) -> Arch:
        """The Arch that the genes stand for."""
        return self.space.decode(self.genes)

    def record(self) -> TrialRecord:
        """What search.json holds of it."""
        return TrialRecord(
            number=self.number,
            arch_id=self.arch.id,
            genes=self.genes,
            values=self.values,
            costs=self.cost,
            state=self.state,
            reasons=self.reasons,
            generation=self.generation,
        )


class History(list[Trial]):
    """All Trials so far, by proposal, with the genes of them all, which a Study keeps: `tried` is what asks for them.

    Args:
        trials: the Trials.
        genes: of them all, as of now.
    """

    def __init__(self, trials: Iterable[Trial], genes: Collection[Genes]) -> None:
        super().__init__(trials)
        self.genes = genes


def tried(history: Sequence[Trial]) -> Collection[Genes]:
    """The genes of all Trials of a history; making the set anew would cost more than the rest of a proposal."""
    return history.genes if isinstance(history, History) else {trial.genes for trial in history}


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A Trial in search.json."""

    number: int
    arch_id: str
    genes: tuple[int, ...]
    values: Mapping[str, float]
    costs: Cost
    state: State
    reasons: tuple[str, ...]
    generation: int | None


@dataclass(frozen=True, kw_only=True)
class SearchRecord(RunFile):
    """A finished search: every Trial, the front (best first) and the chosen Arch by their ids.

    `hypervolume` is (scored Trials so far, hypervolume) where it grows; `rejections` counts the limits missed;
    `num_images` is how many held-out images a score is of, where that is known.
    """

    FILE = "search.json"
    COMMAND = "vitnas search"

    objectives: tuple[Objective, ...]
    budget: str
    seed: int
    num_scored: int
    num_rejected: int
    rejections: Mapping[str, int]
    trials: tuple[TrialRecord, ...]
    front: tuple[str, ...]
    chosen: str | None
    hypervolume: tuple[tuple[int, float], ...]
    seconds: float
    num_images: int | None = None


class Searcher(Protocol):
    """Says which Arch to try next.

    A pure function: the same history, index and generator give the same genes in any process, so that a search
    that was killed goes on as if it had not been.
    """

    def propose(self, goal: Goal, history: Sequence[Trial], index: int, rng: random.Random) -> Genes | None:
        """Canonical genes that meet the counted limits and are in no Trial of `history`; None if nothing is left.

        Args:
            goal: Space, Budget and objectives.
            history: all Trials so far, of every state, by proposal.
            index: the number of this proposal, from 0.
            rng: made from the Study's seed and `index`.
        """
        ...

    def generation(self, index: int) -> int | None:
        """The generation that proposal `index` belongs to; None for a Searcher without generations."""
        ...


class NamedSearcher(ABC):
    """A Searcher with a name in `SEARCHERS`: a dataclass whose defaults are the name's settings."""

    word: ClassVar[str]
    asks_sampler: ClassVar[bool] = False  # proposes what a learned Sampler answers
    trains: ClassVar[bool] = False  # scores are of brief trainings: a run with it has finals, and no supernet

    @classmethod
    def sized(cls, num_trials: int, answers: Callable[[], Sequence[Genes]] | None = None) -> Self:
        """The Searcher for a search of `num_trials` scored Archs.

        Args:
            answers: what a learned Sampler says to the Budget, best guess first.
        """
        return cls()

    @abstractmethod
    def propose(self, goal: Goal, history: Sequence[Trial], index: int, rng: random.Random) -> Genes | None:
        """See `Searcher.propose`."""

    def generation(self, index: int) -> int | None:
        """See `Searcher.generation`; None: there are none."""
        return None
