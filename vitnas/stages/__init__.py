"""Stages of a run folder. Each is given the parts of a run that it needs, reads files and writes files.

`STAGES` lists them in order; `vitnas run` does them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitnas.records import Correlation, ExportRecord, LatencyRecord, Result, Results, SamplerSummary
from vitnas.searching import SearchRecord
from vitnas.stages.context import Context
from vitnas.stages.models import train_models
from vitnas.stages.prepare import prepare
from vitnas.stages.results import export_chosen, final_table, measure
from vitnas.stages.run import Run
from vitnas.stages.searching import WEIGHTS, search_archs
from vitnas.stages.supernet import tell_sampler, train_supernet


@dataclass(frozen=True)
class Stage:
    """A stage: what it does with which parts of a run, and the files in the run folder that it is done with.

    Args:
        again: those of them that are made anew when an earlier stage went on; the stage itself sees to the rest.
    """

    do: Callable[[Context], object]
    makes: Callable[[Run], tuple[str, ...]]
    again: tuple[str, ...] = ()

    def __call__(self, context: Context) -> None:
        """Do it, unless all that it makes is there."""

        def is_done() -> bool:
            return all((context.folder / name).exists() for name in self.makes(context.run))

        with context.engine.together():
            if not context.engine.from_first(is_done):  # all processes do it, or none
                self.do(context)


def go_on(run: Run, folder: Path, name: str) -> None:
    """Let a finished stage go on from what it has: it is no longer done, and what followed is looked at again."""
    later = list(STAGES).index(name)
    for file in (
        *STAGES[name].makes(run),
        *(file for stage in list(STAGES.values())[later:] for file in stage.again),
    ):
        (folder / file).unlink(missing_ok=True)


def _train(context: Context) -> None:
    run = context.run
    if not context.engine.from_first((context.folder / WEIGHTS).exists):
        train_supernet(
            context.work,
            context.images,
            context.new_supernet(),
            context.sampler,
            run.task,
            run.supernet,
            run.pretrained,
        )
    if run.sampler.answers:
        tell_sampler(context.work, context.sampler, context.inherited)


def _search(context: Context) -> None:
    search_archs(
        context.searches,
        context.inherited,
        lambda: context.sampler.answers(context.budget),
        kind=context.run.space.kind,
        recipe=context.run.recipe,
    )


def _models(run: Run) -> tuple[str, ...]:
    roles = ("chosen", *run.retrain.baselines)
    return (*(f"models/{role}/{Result.FILE}" for role in roles), Correlation.FILE)


STAGES: dict[str, Stage] = {
    "train": Stage(_train, lambda run: (WEIGHTS, *((SamplerSummary.FILE,) if run.sampler.answers else ()))),
    "search": Stage(_search, lambda run: (SearchRecord.FILE,)),
    "retrain": Stage(
        lambda run: train_models(run.models, run.searches, run.inherited), _models, again=(Correlation.FILE,)
    ),
    "export": Stage(
        lambda run: export_chosen(run.models, run.run.export), lambda run: (f"export/{ExportRecord.FILE}",)
    ),
    "bench": Stage(
        lambda run: measure(run.models, run.run.export), lambda run: (f"export/{LatencyRecord.FILE}",)
    ),
    "evaluate": Stage(
        lambda run: final_table(run.models), lambda run: (Results.FILE, "report.html"), again=("report.html",)
    ),
}

__all__ = ["STAGES", "Context", "Run", "Stage", "go_on", "prepare"]
