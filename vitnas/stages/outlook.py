"""Outlook: what a run will take on this machine, and how much of its trainings and its search the time given leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vitnas.runs import RunFile
from vitnas.stages.run import Run
from vitnas.train import TrainConfig

LEAST_TRIALS = 20


@dataclass(frozen=True, kw_only=True)
class Outlook(RunFile):
    """What a run will take, from steps that were really done.

    Args:
        stages: seconds by stage, of as much as is done.
        share: how much of the epochs and trials asked for is done.
        step_s, model_step_s, image_s: of training the Supernet and a Model, and of one image through the Supernet.
        memory_bytes: that the steps took at most; disk_bytes: that the run folder will take.
        time_s: that was given; None where it takes what it takes.
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
    day."""
    if run.time is None or not Outlook.exists(folder):
        return run
    return shortened(run, Outlook.read(folder).share)
