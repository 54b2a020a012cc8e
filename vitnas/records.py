"""The files of a run folder that its stages write and its report reads, as dataclasses (see `vitnas.runs.RunFile`).

Files of earlier parts lie with these: search.json, feasibility.json, chosen.json, test_reads.json, metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from vitnas.budget import Cost
from vitnas.data import Fingerprint
from vitnas.measure.latency import Latency
from vitnas.runs import RunFile
from vitnas.searching.latency import LatencyModel
from vitnas.slimming import Agreement
from vitnas.train import Score

Effort: TypeAlias = Literal["fold", "recover", "search"]


@dataclass(frozen=True, kw_only=True)
class Manifest(RunFile):
    """Where and how a run is made: what a number needs beside it."""

    FILE = "manifest.json"

    command: str
    started: str
    seed: int
    processes: int
    device: str
    git: str | None
    data: Fingerprint
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class GeneRecord:
    """A gene of the Space, for people."""

    name: str
    options: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class SpaceRecord(RunFile):
    """The Space: its genes, how many Archs it has, and `space`, from which it is made again."""

    FILE = "space.json"

    name: str
    size: float
    genes: tuple[GeneRecord, ...]
    space: Mapping[str, Any]


@dataclass(frozen=True)
class SamplerLatency(RunFile):
    """What Archs were timed for before a sampler of latency learns: a linear model of it."""

    FILE = "sampler_latency.json"

    target: str
    space: Mapping[str, Any]
    model: LatencyModel


@dataclass(frozen=True)
class Sample:
    """Mean, standard deviation and number of accuracies."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Compared:
    """Archs that the policy draws for `budget` and random ones of equal cost: accuracy on held-out images."""

    budget: float
    cost_ratio: float
    policy: Sample
    random: Sample


@dataclass(frozen=True, kw_only=True)
class SamplerSummary(RunFile):
    """What a learned sampler prefers: per gene and budget the share of each option."""

    FILE = "sampler.json"
    COMMAND = "vitnas train"

    quantity: str
    low: float
    high: float
    budgets: tuple[float, ...]
    options: Mapping[str, tuple[Any, ...]]
    preferences: Mapping[str, tuple[tuple[float, ...], ...]]
    compared: tuple[Compared, ...]


@dataclass(frozen=True, kw_only=True)
class FocusLook:
    """What a learned sampler says in metrics.jsonl after each look at held-out images; None where it cannot yet.

    Args:
        score: mean of the Archs scored: minus their loss.
        gain: loss of random Archs minus the policy's at equal cost.
        reward, miss: of the last update; `miss` is the mean distance from the budget, as a share.
        budgets, cost_ratio: the anchors, and the mean cost that the policy draws there over each.
        entropy: per kind of gene and anchor, of a decision, in nats.
    """

    score: float | None = None
    gain: float | None = None
    reward: float | None = None
    miss: float | None = None
    budgets: tuple[float, ...] = ()
    cost_ratio: tuple[float, ...] = ()
    entropy: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result(RunFile):
    """A trained model (models/<role>/): what it costs, how it was trained, its accuracy.

    Args:
        start: `scratch`, `inherited` (from the supernet), or the role or folder of the front that it went on from.
        holdout_accuracy: None where the images have no labels that it could be told by.
        train: the TrainConfig's fields; none where it was not trained.
        teacher, teacher_losses: who taught it, and by what.
        agreement: with the network that it was slimmed from.
        supernet_accuracy: with inherited weights, where the Arch is of this run's search.
        test_balanced: mean over classes of the accuracy on each one's test images.
        asked: what a user called the Arch, where it is none of the run's own.
        image_size, holdout_accuracy_before: of finetuning.
    """

    FILE = "result.json"
    COMMAND = "vitnas retrain"

    role: str
    arch_id: str
    macs: int
    params: int
    memory_bytes: int
    holdout_accuracy: float | None
    n_holdout: int
    epochs: float
    seconds: float
    start: str
    train: Mapping[str, Any]
    agreement: Agreement | None = None
    teacher: str | None = None
    teacher_losses: tuple[str, ...] = ()
    supernet_accuracy: float | None = None
    test_accuracy: float | None = None
    test_balanced: float | None = None
    n_test: int | None = None
    asked: str | None = None
    image_size: int | tuple[int, int] | None = None
    holdout_accuracy_before: float | None = None


@dataclass(frozen=True)
class RankedArch(RunFile):
    """One Arch trained from scratch, briefly, and what the supernet said of it (ranking/<arch id>.json)."""

    COMMAND = "vitnas retrain"

    arch_id: str
    macs: int
    supernet_accuracy: float
    trained_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Correlation(RunFile):
    """How well the supernet ranks Archs; `note` says why there is no number."""

    FILE = "correlation.json"
    COMMAND = "vitnas retrain"

    kendall_tau: float | None
    spearman: float | None
    n: int
    how: str
    points: tuple[RankedArch, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A file and how it compares with the Model."""

    path: str
    params: int
    exported_params: int
    max_abs_diff: float
    n_images: int
    top1_agreement: float | None = None
    opset: int | None = None
    exporter: str | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportRecord(RunFile):
    """What was exported, by format."""

    FILE = "export.json"
    COMMAND = "vitnas export"

    files: Mapping[str, ExportedFile]


@dataclass(frozen=True)
class LatencyRow:
    """One model on one target."""

    role: str
    target: str
    latency: Latency


@dataclass(frozen=True)
class LatencyRecord(RunFile):
    """Latency of the trained models, all timed in the same rounds."""

    FILE = "latency.json"
    COMMAND = "vitnas bench"

    rows: tuple[LatencyRow, ...]

    @property
    def by_role(self) -> dict[str, dict[str, Latency]]:
        """Latency by role and target."""
        found: dict[str, dict[str, Latency]] = {}
        for row in self.rows:
            found.setdefault(row.role, {})[row.target] = row.latency
        return found


@dataclass(frozen=True)
class FinalScores(RunFile):
    """What the one reading of the test split gave, by role."""

    FILE = "test_scores.json"
    COMMAND = "vitnas evaluate"

    scores: Mapping[str, Score]


@dataclass(frozen=True, kw_only=True)
class FinalRow(Result):
    """A model of the final table, with its 95 % interval on the test split and its latency by target."""

    name: str
    ci95: tuple[float, float]
    latency_ms: Mapping[str, Latency] = field(default_factory=dict)


@dataclass(frozen=True)
class Results(RunFile):
    """The final table: the chosen model first, and the files that a person wants by what they are."""

    FILE = "results.json"
    COMMAND = "vitnas evaluate"

    rows: tuple[FinalRow, ...]
    chosen: str
    files: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The best Arch for one more budget: held-out accuracy with inherited weights, and what finding it cost."""

    budget: str
    arch_id: str
    accuracy: float
    cost: Cost
    path: str
    source: str
    evaluated: int
    seconds: float


@dataclass(frozen=True)
class Family(RunFile):
    """The answers of `vitnas specialize`, one per budget."""

    FILE = "family.json"
    COMMAND = "vitnas specialize"

    answers: tuple[Answer, ...] = ()


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
    """

    FILE = "forecast.json"
    COMMAND = "vitnas slim"

    time_s: float
    measured: Mapping[str, float]
    efforts: tuple[EffortForecast, ...]
    effort: Effort
    asked: bool
    images: int = 256

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
