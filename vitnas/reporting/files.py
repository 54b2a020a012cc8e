"""Read a run folder for its report: every file is optional; one that cannot be read is named, not fatal."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vitnas.arch import Arch
from vitnas.data import Readings
from vitnas.errors import UserError
from vitnas.measure.latency import Latency
from vitnas.model.named import ArchFile
from vitnas.predicting.examine import Evaluation
from vitnas.probing import Pretrained, PretrainForecast, Probed
from vitnas.records import (
    Allocation,
    Correlation,
    ExportRecord,
    Family,
    Finals,
    FocusLook,
    Forecast,
    LatencyRecord,
    Manifest,
    Order,
    Original,
    Ranking,
    Result,
    Results,
    SamplerSummary,
    SlimFront,
    SlimResults,
    SpaceRecord,
)
from vitnas.reporting.tokens import TokenMaps
from vitnas.runs import RunFile, from_json
from vitnas.searching import Feasibility, SearchRecord, TokenSpeeds, TrialRecord
from vitnas.slimming import Recovery, Sensitivity
from vitnas.train import metrics

F = TypeVar("F", bound=RunFile)

# The order in which models are shown; other roles follow by name.
ROLES = {
    "chosen": "chosen",
    "without_teacher": "same without the teacher",
    "soft_labels": "same by soft labels alone",
    "hand_scaled": "hand-scaled ViT",
    "random_search": "random search",
}
# What proves that a folder belongs to a run: one of these is enough to make a report.
SIGNS = (
    "run.yaml",
    metrics.FILE,
    *(file.FILE for file in (Manifest, SpaceRecord, Feasibility, SearchRecord, Results)),
)


@dataclass
class SlimFiles:
    """What the folder of a slimmed network holds beside."""

    original: Original | None = None
    forecast: Forecast | None = None
    order: Order | None = None
    sensitivity: Sensitivity | None = None
    allocation: Allocation | None = None
    front: SlimFront | None = None
    recovery: Recovery | None = None
    results: SlimResults | None = None

    def __bool__(self) -> bool:
        return self.original is not None


@dataclass
class PretrainFiles:
    """What the folder of a pretraining holds beside."""

    forecast: PretrainForecast | None = None
    made: Pretrained | None = None
    probed: Probed | None = None

    def __bool__(self) -> bool:
        return self.forecast is not None


@dataclass
class RunFiles:
    """What a run folder holds now; None, or nothing, is not there yet."""

    folder: Path
    manifest: Manifest | None = None
    space: SpaceRecord | None = None
    search: SearchRecord | None = None
    correlation: Correlation | None = None
    ranking: Ranking | None = None
    sampler: SamplerSummary | None = None
    export: ExportRecord | None = None
    feasibility: Feasibility | None = None
    family: Family | None = None
    latency: LatencyRecord | None = None
    token_speeds: TokenSpeeds | None = None
    token_maps: TokenMaps | None = None
    test_reads: Readings | None = None
    evaluation: Evaluation | None = None
    slim: SlimFiles = field(default_factory=SlimFiles)
    pretrain: PretrainFiles = field(default_factory=PretrainFiles)
    metrics: list[metrics.Line] = field(default_factory=list)
    results: Results | None = None
    finals: Finals | None = None
    models: dict[str, Result] = field(default_factory=dict)
    archs: dict[str, Arch] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def chosen_id(self) -> str:
        """The id of the chosen Arch, or "" while none is chosen."""
        model = self.models.get("chosen")
        if model:
            return model.arch_id
        return self.finals.chosen if self.finals else (self.search and self.search.chosen) or ""

    @property
    def budget(self) -> str:
        """The budget of the run, or "" where none is on record."""
        if self.slim.results:
            return self.slim.results.budget
        return self.search.budget if self.search else ""

    @property
    def tells_numbers(self) -> bool:
        """The images have numbers, and what is called accuracy in files is R^2."""
        return self.manifest is not None and self.manifest.data.label_kind == "numbers"

    @property
    def has_supernet(self) -> bool:
        """Scores are of inherited weights; a search without a supernet trains each Arch briefly."""
        trains = any((self.folder / "finals" / group).is_dir() for group in ("search", "ranking"))
        return not trains or (self.folder / "supernet.safetensors").exists()

    @property
    def scores_are_inherited(self) -> bool:
        """Scores are of weights of the supernet, which may be there without being relied on."""
        return self.has_supernet and not (self.ranking and self.ranking.otherwise == "training")

    @property
    def scored_how(self) -> str:
        """What scores are of, in words."""
        return (
            "with weights inherited from the Supernet"
            if self.scores_are_inherited
            else "after a brief training each"
        )

    @property
    def chosen(self) -> Arch | None:
        """The chosen Arch, when its arch.json is in the folder."""
        return self.archs.get(self.chosen_id)

    @property
    def chosen_trial(self) -> TrialRecord | None:
        """The chosen Arch's Trial."""
        trials = self.search.trials if self.search else ()
        return next((trial for trial in trials if trial.arch_id == self.chosen_id), None)

    @property
    def latencies(self) -> dict[str, dict[str, Latency]]:
        """Latency by role and target."""
        return self.latency.by_role if self.latency else {}

    @property
    def looks(self) -> list[tuple[float, FocusLook]]:
        """(epoch, what it said) of a learned sampler."""
        lines = [line for line in self.metrics if isinstance(line, metrics.Hooked) and line.event == "focus"]
        return [(line.epoch, from_json(FocusLook, dict(line.said))) for line in lines]


def read_run(folder: Path) -> RunFiles:
    """Read everything the report shows.

    Raises:
        UserError: `folder` is not a folder, or holds none of the files of a run.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; a report is made from a run folder. Give the folder of a run."
        )
    if not any((folder / name).exists() for name in SIGNS):
        raise UserError(
            f"{folder} holds no file of a run ({', '.join(SIGNS)}); a report needs at least one. "
            "Give the folder that `vitnas run` wrote."
        )
    run, export = RunFiles(folder), folder / "export"
    run.manifest = _read(run, Manifest, folder)
    run.space = _read(run, SpaceRecord, folder)
    run.search = _read(run, SearchRecord, folder)
    run.results = _read(run, Results, folder)
    run.finals = _read(run, Finals, folder)
    run.correlation = _read(run, Correlation, folder)
    run.ranking = _read(run, Ranking, folder)
    run.sampler = _read(run, SamplerSummary, folder)
    run.feasibility = _read(run, Feasibility, folder)
    run.token_speeds = _read(run, TokenSpeeds, folder)
    run.token_maps = _read(run, TokenMaps, folder)
    run.family = _read(run, Family, folder)
    run.test_reads = _read(run, Readings, folder)
    run.evaluation = _read(run, Evaluation, folder)
    run.slim = SlimFiles(
        original=_read(run, Original, folder),
        forecast=_read(run, Forecast, folder),
        order=_read(run, Order, folder),
        sensitivity=_read(run, Sensitivity, folder),
        allocation=_read(run, Allocation, folder),
        front=_read(run, SlimFront, folder),
        recovery=_read(run, Recovery, folder),
        results=_read(run, SlimResults, folder),
    )
    run.pretrain = PretrainFiles(
        forecast=_read(run, PretrainForecast, folder),
        made=_read(run, Pretrained, folder),
        probed=_read(run, Probed, folder),
    )
    run.export, run.latency = _read(run, ExportRecord, export), _read(run, LatencyRecord, export)
    found = {
        path.parent.name: _read(run, Result, path.parent) for path in folder.glob(f"models/*/{Result.FILE}")
    }
    run.models = {role: result for role in sorted(found, key=_role_order) if (result := found[role])}
    for path in (*folder.glob(f"front/*/{ArchFile.FILE}"), *folder.glob(f"models/*/{ArchFile.FILE}")):
        if file := _read(run, ArchFile, path.parent):
            run.archs[file.arch.id] = file.arch
    try:
        run.metrics.extend(metrics.read_lines(folder))  # those before a bad line stay
    except UserError as error:
        run.problems.append(str(error))
    return run


def _read(run: RunFiles, kind: type[F], folder: Path) -> F | None:
    try:
        return kind.read(folder) if kind.exists(folder) else None
    except UserError as error:
        run.problems.append(str(error))
        return None


def _role_order(role: str) -> tuple[int, str]:
    known = list(ROLES)
    return (known.index(role) if role in known else len(known), role)


def role_name(role: str) -> str:
    """The words for a role of the models folder; another role is its own name."""
    return ROLES.get(role, role)


def stage_label(stage: str) -> str:
    """The words for a stage of metrics.jsonl: "retrain/hand_scaled" is "hand-scaled ViT"."""
    return role_name(stage.partition("/")[2] or stage)
