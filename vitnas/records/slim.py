"""The files of a slimming that its stages write and its report reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from vitnas.budget import Cost
from vitnas.measure.latency import Latency
from vitnas.runs import RunFile
from vitnas.searching.latency import LatencyModel
from vitnas.slimming import Agreement

Effort: TypeAlias = Literal["fold", "recover", "search"]


@dataclass(frozen=True, kw_only=True)
class Original(RunFile):
    """The network that a run makes smaller, as it was found.

    Args:
        name: as it was typed.
        cost: with latency measured on every target that the budget names.
        budget: what it may become, in numbers.
        labels: whether the images' labels are of its classes.
        notes: what a person should know.
    """

    FILE = "original.json"
    COMMAND = "vitnas slim"

    name: str
    arch_id: str
    cost: Cost
    budget: str
    labels: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EffortForecast:
    """What one effort will take here.

    Args:
        parts: seconds by part; `seconds` is their sum.
        epochs: of each training, as many as the time leaves room for.
        fits: whether that is inside the time given.
    """

    effort: Effort
    seconds: float
    parts: Mapping[str, float]
    epochs: Mapping[str, float]
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Forecast(RunFile):
    """What each effort will take on this machine, and the one that was taken.

    Args:
        time_s: the seconds given.
        measured: seconds of the steps that this is reckoned from, by what they are.
        asked: whether the effort was asked for.
        images: train images that activations are taken from.
        disk_bytes, memory_bytes: that the run folder will take, and that the steps took at most.
    """

    FILE = "forecast.json"
    COMMAND = "vitnas slim"

    time_s: float
    measured: Mapping[str, float]
    efforts: tuple[EffortForecast, ...]
    effort: Effort
    asked: bool
    images: int = 256
    disk_bytes: int = 0
    memory_bytes: int = 0

    @property
    def taken(self) -> EffortForecast:
        """The row of the effort that was taken."""
        return next(row for row in self.efforts if row.effort == self.effort)


@dataclass(frozen=True, kw_only=True)
class Order(RunFile):
    """How the units of a network were sorted: by which importance, from how many images.

    Args:
        width: the channels of its stream in their new order; () where they stay.
    """

    FILE = "order.json"
    COMMAND = "vitnas train"

    importance: str
    images: int
    width: tuple[int, ...]


@dataclass(frozen=True)
class Tables(RunFile):
    """What latencies are expected of Archs that are not timed, by target."""

    FILE = "latency_tables.json"
    COMMAND = "vitnas search"

    models: Mapping[str, LatencyModel]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An Arch that a search within `budget` proposes: the damage predicted for it, and its cost."""

    arch_id: str
    genes: tuple[int, ...]
    damage: float
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place of the front: a budget, and the Archs proposed for it, best first."""

    number: int
    budget: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, kw_only=True)
class Allocation(RunFile):
    """How each budget of the front is shared out over the layers; `chosen` is the number of the asked one's place.

    Args:
        latency_error: mean relative error of the fitted latencies, by target.
        tried: latencies measured on the way to a candidate that meets the budget, as (Arch, target, ms).
    """

    FILE = "allocation.json"
    COMMAND = "vitnas search"

    places: tuple[Place, ...]
    chosen: int
    latency_error: Mapping[str, float] = field(default_factory=dict)
    tried: tuple[tuple[str, str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Member(RunFile):
    """A network of the front (front/NN/), folded and held against the original on held-out images.

    Args:
        predicted, measured: its damage, in the same unit.
        accuracy: where the images have labels of the original's classes.
    """

    FILE = "member.json"
    COMMAND = "vitnas slim"

    folder: str
    arch_id: str
    budget: str
    cost: Cost
    predicted: float
    measured: float
    agreement: Agreement
    accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class SlimFront(RunFile):
    """The networks made of one, largest first; further budgets come last."""

    FILE = "front.json"
    COMMAND = "vitnas slim"

    members: tuple[Member, ...]


@dataclass(frozen=True, kw_only=True)
class SlimRow:
    """A line of the final table: the original, a member of the front or the chosen one, on the test split."""

    role: str
    folder: str
    arch_id: str
    cost: Cost
    agreement: Agreement
    accuracy: float | None
    latency_ms: Mapping[str, Latency] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SlimResults(RunFile):
    """The final table of a slimmed network: the original first, then the chosen one, then the front."""

    FILE = "slimmed.json"
    COMMAND = "vitnas evaluate"

    rows: tuple[SlimRow, ...]
    budget: str
    met: bool
    files: Mapping[str, str]
