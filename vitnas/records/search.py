"""The files of a search from images: how it was made, what was trained, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from vitnas.budget import Cost
from vitnas.data import Fingerprint
from vitnas.exporting.precision import Beside
from vitnas.measure.latency import Latency
from vitnas.records.finals import Spent
from vitnas.runs import RunFile
from vitnas.searching.latency import LatencyModel
from vitnas.slimming import Agreement
from vitnas.train import Score


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
        holdout_error, test_error: standard errors of what is R^2 then, of images with numbers; None of an accuracy.
        test_mae: mean absolute errors of numbers, in units of their own.
        asked: what a user called the Arch, where it is none of the run's own.
        image_size, holdout_accuracy_before: of finetuning.
        spent: all that it took to come to this model, the search for its Arch and the supernet of that included.
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
    holdout_error: float | None = None
    test_accuracy: float | None = None
    test_balanced: float | None = None
    test_error: float | None = None
    test_mae: tuple[float, ...] = ()
    n_test: int | None = None
    asked: str | None = None
    image_size: int | tuple[int, int] | None = None
    holdout_accuracy_before: float | None = None
    spent: Spent | None = None


@dataclass(frozen=True)
class RankedArch:
    """One Arch, trained briefly, and what the supernet said of it; `standing` is what a search by loss orders it by,
    among these Archs. The rest is what else may order Archs."""

    arch_id: str
    macs: int
    supernet_accuracy: float
    trained_accuracy: float
    supernet_loss: float | None = None
    standing: float | None = None
    params: int | None = None
    depth: int | None = None
    expressivity: float | None = None


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
class Ranking(Correlation):
    """How well the supernet ranks Archs of about equal cost, found out before the search.

    Args:
        ci95: interval of the tau, of as many Archs drawn anew.
        alike, told_apart: pairs whose accuracies after training differ by more than the error of so many images, and
            how many of these the supernet orders alike.
        least_tau: what the run asks for.
        otherwise: how the run goes on where its supernet does not rank; "" where it relies on it.
        rulers: Kendall's tau of whatever else may order Archs, each by itself, and of their mean.
        spent: what finding out took.
    """

    FILE = "ranking.json"
    COMMAND = "vitnas train"

    ci95: tuple[float, float] | None
    alike: int
    told_apart: int
    least_tau: float
    otherwise: Literal["", "training", "finals"] = ""
    rulers: Mapping[str, float] = field(default_factory=dict)
    spent: Spent

    @property
    def says(self) -> str:
        """One sentence for people."""
        found = self.note
        if not found and self.ci95 is not None:
            ranks = (
                "does not rank Archs as training does" if self.otherwise else "ranks Archs as training does"
            )
            found = (
                f"The supernet {ranks}: Kendall's tau {self.kendall_tau:.2f} (95 % interval {self.ci95[0]:.2f} to "
                f"{self.ci95[1]:.2f}) of {self.n} Archs of about equal cost, where {self.least_tau:g} is asked for; it "
                f"orders {self.alike} of {self.told_apart} pairs alike that training tells apart"
            )
        then = {
            "": "the search relies on its scores all the same"
            if self.note
            else "so the search relies on its scores",
            "training": "so the search trains Archs instead, and does not use its scores",
            "finals": "so finals choose, by brief trainings",
        }
        return f"{found}; {then[self.otherwise]}."


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A file and how it compares with the Model; `input` is `uint8` (pixels of any size) or `float`.

    One of another precision was compared with the Model in that precision, and stands `beside` the float32 one. `ms`
    are of one image on so many threads, by runtimes in the same rounds, where a file runs in one that latency targets
    do not have.
    """

    path: str
    params: int
    exported_params: int
    max_abs_diff: float
    n_images: int
    top1_agreement: float | None = None
    opset: int | None = None
    exporter: str | None = None
    input: str = "float"
    problems: tuple[str, ...] = ()
    beside: Beside | None = None
    ms: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1


@dataclass(frozen=True)
class ExportRecord(RunFile):
    """What was exported, by format, and why what else was asked for was not."""

    FILE = "export.json"
    COMMAND = "vitnas export"

    files: Mapping[str, ExportedFile]
    refused: Mapping[str, str] = field(default_factory=dict)


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
    """What the one reading of the test split gave, by role.

    Args:
        right: which images each model gets right, a bit each in their order, as hexadecimal digits; where images may
            have several classes, those of which the likeliest is one.
        several: images may have several.
        explained: in place of that, of images with numbers: what of each image's each model explains.
    """

    FILE = "test_scores.json"
    COMMAND = "vitnas evaluate"

    scores: Mapping[str, Score]
    right: Mapping[str, str] = field(default_factory=dict)
    several: bool = False
    explained: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Mapping[str, tuple[Score, Tensor]], *, several: bool = False) -> FinalScores:
        """From what `evaluate_each` gives of each role."""
        scores = {role: score for role, (score, _) in found.items()}
        if any(right_N.is_floating_point() for _, right_N in found.values()):
            told = {role: tuple(round(x, 6) for x in each_N.tolist()) for role, (_, each_N) in found.items()}
            return cls(scores, explained=told)
        bits = {role: np.packbits(right_N.numpy()) for role, (_, right_N) in found.items()}
        return cls(scores, {role: packed.tobytes().hex() for role, packed in bits.items()}, several)

    def is_right(self, role: str) -> np.ndarray:
        """bool (N,): which images a role's model gets right."""
        packed = np.frombuffer(bytes.fromhex(self.right[role]), dtype=np.uint8)
        return np.unpackbits(packed, count=self.scores[role].n).astype(bool)


@dataclass(frozen=True, kw_only=True)
class Versus:
    """The chosen model against another on the same `n` test images.

    Args:
        role: the other.
        difference: of the accuracies, above 0 where the chosen one is ahead.
        ci95: its interval, by the images that only one of the two gets right. Another training of the same Archs may
            differ by more.
        only_chosen, only_other: numbers of these images; of images with numbers, those that one tells better.
        measure: what the difference is of.
        several: images may have several classes; what is compared is whether the likeliest is one of them.
    """

    role: str
    difference: float
    ci95: tuple[float, float]
    n: int
    only_chosen: int
    only_other: int
    several: bool = False
    measure: Literal["accuracy", "R^2"] = "accuracy"

    @property
    def says(self) -> Literal["better", "the same within the noise", "worse"]:
        """What the interval allows to say of the chosen one."""
        low, high = self.ci95
        return "better" if low > 0 else "worse" if high < 0 else "the same within the noise"


@dataclass(frozen=True, kw_only=True)
class FinalRow(Result):
    """A model of the final table, with its 95 % interval on the test split and its latency by target."""

    name: str
    ci95: tuple[float, float]
    latency_ms: Mapping[str, Latency] = field(default_factory=dict)


@dataclass(frozen=True)
class Results(RunFile):
    """The final table: the chosen model first, the files that a person wants by what they are, and what the chosen
    model is worth beside each baseline."""

    FILE = "results.json"
    COMMAND = "vitnas evaluate"

    rows: tuple[FinalRow, ...]
    chosen: str
    files: Mapping[str, str]
    verdict: tuple[Versus, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The best Arch for one more budget: held-out accuracy (or R^2, which has an `error`) with inherited weights, and
    what finding it cost."""

    budget: str
    arch_id: str
    accuracy: float
    cost: Cost
    path: str
    source: str
    evaluated: int
    seconds: float
    error: float | None = None


@dataclass(frozen=True)
class Family(RunFile):
    """The answers of `vitnas specialize`, one per budget."""

    FILE = "family.json"
    COMMAND = "vitnas specialize"

    answers: tuple[Answer, ...] = ()
