"""What a run's trainings took, and how Archs that were trained briefly did."""

from __future__ import annotations

from dataclasses import dataclass

from vitnas.budget import Cost
from vitnas.runs import RunFile
from vitnas.train.evaluate import interval_of


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What something took.

    Args:
        learned: images learned from, each as often as it was (forward and backward).
        looked: images that a network only looked at, each as often as one did.
        seconds: of work; breaks between a kill and the next start do not count.
    """

    learned: int = 0
    looked: int = 0
    seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            learned=self.learned + other.learned,
            looked=self.looked + other.looked,
            seconds=self.seconds + other.seconds,
        )

    def __sub__(self, other: Spent) -> Spent:
        return Spent(
            learned=self.learned - other.learned,
            looked=self.looked - other.looked,
            seconds=self.seconds - other.seconds,
        )


@dataclass(frozen=True)
class TrainedSupernet(RunFile):
    """What training the supernet took."""

    FILE = "supernet.json"
    COMMAND = "vitnas train"

    spent: Spent


@dataclass(frozen=True, kw_only=True)
class Rung(RunFile):
    """An Arch that was trained for `epochs` in all: its accuracy on `n` held-out images (of numbers R^2, which has an
    `error`), and what this rung took."""

    epochs: float
    accuracy: float
    n: int
    spent: Spent
    error: float | None = None


@dataclass(frozen=True)
class Finalist:
    """An Arch that was trained to be chosen or not, and how it did behind each rung that it reached.

    Args:
        score: what the search gave it; None where it came from no search.
    """

    arch_id: str
    cost: Cost
    score: float | None
    rungs: tuple[Rung, ...]


@dataclass(frozen=True, kw_only=True)
class Finals(RunFile):
    """Archs that were trained briefly, from `start` weights, in rungs of rising length: the best first."""

    FILE = "finals.json"
    COMMAND = "vitnas finals"

    start: str
    finalists: tuple[Finalist, ...]

    @classmethod
    def of_one(cls, arch_id: str, cost: Cost) -> Finals:
        """There was nothing to decide, and nothing was trained."""
        return cls(start="scratch", finalists=(Finalist(arch_id, cost, None, ()),))

    @property
    def chosen(self) -> str:
        """The id of the winner."""
        return self.finalists[0].arch_id

    @property
    def says(self) -> str:
        """One sentence on the winner, for people; "" where nothing was trained."""
        best = self.finalists[0]
        if not best.rungs:
            return ""
        last, rivals = (
            best.rungs[-1],
            [each for each in self.finalists[1:] if len(each.rungs) == len(best.rungs)],
        )
        low, high = interval_of(last.accuracy, last.n, last.error)
        told = f"{last.accuracy:.1%} of", f"{100 * low:.1f} to {100 * high:.1f}"
        if last.error is not None:
            told = f"R² {last.accuracy:.3f} on", f"{low:.3f} to {high:.3f}"
        found = (
            f"The finals chose {best.arch_id} of {len(self.finalists)} Archs: {told[0]} {last.n} held-out "
            f"images (95 % interval {told[1]}) after {last.epochs:.3g} epochs"
        )
        if rivals:
            ahead = last.accuracy - rivals[0].rungs[-1].accuracy
            by = f"{100 * abs(ahead):.1f} points" if last.error is None else f"{abs(ahead):.3f}"
            if ahead < 0:  # search.prefer=cost
                return f"{found}, {by} behind the best that came as far, which costs more and is not surely better."
            found += f", {f'{by} ahead of' if ahead else 'level with'} the next that came as far"
        return f"{found}; as the best of several it is on average a little less good than it looks."

    @property
    def spent(self) -> Spent:
        """What all rungs took."""
        return sum((rung.spent for each in self.finalists for rung in each.rungs), Spent())
