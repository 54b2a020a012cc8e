"""Outlook: what a run will take on this machine, and how much of its trainings and its search the time given leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from vitnas.records import Ranking
from vitnas.runs import RunFile
from vitnas.searching.halving import GuidedHalving
from vitnas.stages.finals import lengths
from vitnas.stages.run import Run
from vitnas.train import TrainConfig

Otherwise: TypeAlias = Literal["training", "finals"]

LEAST_TRIALS = 20
LEAST_RANKED = 5  # with fewer Archs an order says nothing of the supernet that it is of
TRAINED = 2  # Archs are trained where the supernet does not rank, per Arch by which that was found out
INSTEAD = 8  # Archs of the finals there, where these cannot be trained from new weights


@dataclass(frozen=True, kw_only=True)
class Outlook(RunFile):
    """What a run will take, from steps that were really done.

    Args:
        stages: seconds by stage, of as much as is done.
        share: how much of the epochs and trials asked for is done.
        step_s, model_step_s, image_s: of training the Supernet and a Model, and of one image through the Supernet.
        clock_s: of holding an Arch against limits of latency, those that miss them included, per Arch that is scored.
        memory_bytes: that the steps took at most; disk_bytes: that the run folder will take.
        time_s: that was given; None where it takes what it takes.
        distrusts: whether `stages` are those of a run whose supernet turns out not to rank, which take longer.
    """

    FILE = "outlook.json"
    COMMAND = "vitnas run"

    stages: Mapping[str, float]
    share: float
    step_s: float
    model_step_s: float
    image_s: float
    memory_bytes: int
    disk_bytes: int
    time_s: float | None = None
    distrusts: bool = False
    clock_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.stages.values())


def shortened(run: Run, share: float) -> Run:
    """The run with that share of its epochs and trials; a warm-up stays the part of its training that it was."""
    if share == 1:
        return run

    def less(config: TrainConfig) -> TrainConfig:
        return replace(config, epochs=config.epochs * share, warmup_epochs=config.warmup_epochs * share)

    trials = max(min(LEAST_TRIALS, run.search.num_trials), round(run.search.num_trials * share))
    finals = (
        run.finals if run.finals.epochs is None else replace(run.finals, epochs=run.finals.epochs * share)
    )
    retrain = replace(run.retrain, train=less(run.retrain.train), rank_epochs=run.retrain.rank_epochs * share)
    search = replace(run.search, num_trials=trials)
    return replace(run, supernet=less(run.supernet), search=search, finals=finals, retrain=retrain)


def settled(run: Run, folder: Path) -> Run:
    """The run as it is done in its folder: by `time` it has been shortened once, so that it is the same on a busier
    day, and where its supernet does not rank it goes on without."""
    if run.time is not None and Outlook.exists(folder):
        run = shortened(run, Outlook.read(folder).share)
    ranks = not (run.ranks and Ranking.exists(folder) and Ranking.read(folder).otherwise)
    return run if ranks else distrusting(run)


def otherwise(run: Run) -> Otherwise:
    """How a run goes on where its supernet does not rank: Archs are trained from new weights, unless what it is after
    has weights of the supernet, or a sampler that has learned answers."""
    inherits = run.retrain.start == "inherited" or run.pretrained or run.sampler.answers
    return "finals" if inherits else "training"


def distrusting(run: Run) -> Run:
    """The run where its supernet does not rank."""
    if otherwise(run) == "finals":
        return replace(run, finals=replace(run.finals, archs=max(INSTEAD, run.finals.archs)))
    search = replace(
        run.search, searcher=GuidedHalving.word, num_trials=max(2, TRAINED * run.retrain.rank_archs), folds=1
    )
    rungs = len(lengths(run.finals, run.retrain.train, search.num_trials))
    finals = replace(run.finals, epochs=run.retrain.rank_epochs * 2 ** (rungs - 1))
    return replace(run, search=search, finals=finals)
