"""What a run goes through: its parts, what is checked before any work, and its stages in order.

There are three such plans: a search from images, slimming a trained network, and pretraining one. `plan_of` says which
a run has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitnas.budget import Budget
from vitnas.errors import UserError
from vitnas.model.named import Chosen
from vitnas.probing import Pretrained
from vitnas.records import (
    Allocation,
    Correlation,
    ExportRecord,
    Family,
    Finals,
    LatencyRecord,
    Ranking,
    Result,
    Results,
    SamplerSummary,
    SlimFront,
    SlimResults,
)
from vitnas.reporting.sampler_plots import family
from vitnas.reporting.slimming import members
from vitnas.reporting.tables import Table
from vitnas.runs import read_json
from vitnas.searching import SearchRecord
from vitnas.slimming import Sensitivity
from vitnas.space import Genes
from vitnas.stages.compare import train_models
from vitnas.stages.context import Context
from vitnas.stages.finals import choose_by_training
from vitnas.stages.models import roles_of
from vitnas.stages.outlook import otherwise
from vitnas.stages.prepare import prepare
from vitnas.stages.pretrain.context import PretrainContext
from vitnas.stages.pretrain.prepare import prepare_pretrain
from vitnas.stages.pretrain.stages import export, is_judged, judge, pretrain
from vitnas.stages.ranking import measure_ranking, of_equal_cost
from vitnas.stages.results import export_chosen, final_table, measure, timed_on
from vitnas.stages.run import Run
from vitnas.stages.searching import WEIGHTS, fold_folder, search_archs
from vitnas.stages.slim.context import SlimContext
from vitnas.stages.slim.prepare import prepare_slim
from vitnas.stages.slim.specialize import specialize_slim
from vitnas.stages.slim.stages import (
    choose,
    evaluate_front,
    fold_front,
    measure_damage,
    measure_side_by_side,
    order,
    share_out_budgets,
)
from vitnas.stages.specialize import specialize
from vitnas.stages.supernet import tell_sampler, train_supernet


@dataclass(frozen=True)
class Stage:
    """A stage: what it does with which parts of a run, and the files in the run folder that it is done with.

    Args:
        again: those of them that are made anew when an earlier stage went on; the stage itself sees to the rest.
        also: what else must be so, by the run folder, where the files are there.
    """

    do: Callable[[Any], object]
    makes: Callable[[Run], tuple[str, ...]]
    again: tuple[str, ...] = ()
    also: Callable[[Path], bool] = lambda folder: True

    def __call__(self, context: Context) -> None:
        """Do it, unless all that it makes is there."""

        def is_done() -> bool:
            context.check_folder()
            folder = context.folder
            made = [folder / name for name in self.makes(context.run)]
            if not all(path.exists() for path in made):
                return False
            for path in made:
                if path.suffix == ".json":
                    read_json(path)  # what is damaged is no result
            return self.also(folder)

        with context.engine.together():
            if not context.engine.from_first(is_done):  # all processes do it, or none
                self.do(context)


@dataclass(frozen=True)
class Plan:
    """A way to run: the parts that its stages are given, what checks them before any work and gives what is told first,
    the stages by name, and what answers further budgets, as a table and the folders of what is in it."""

    context: type[Context]
    prepare: Callable[[Any], Any]
    stages: Mapping[str, Stage]
    specialize: Callable[[Any, Sequence[Budget]], tuple[Table, list[str]]]


def plan_of(run: Run) -> Plan:
    """The plan of a run."""
    return PRETRAIN if run.pretrain else SLIM if run.slim else SEARCH


def go_on(run: Run, folder: Path, name: str) -> None:
    """Let a finished stage go on from what it has: it is no longer done, and what followed is looked at again."""
    stages = plan_of(run).stages
    later = list(stages).index(name)
    for file in (
        *stages[name].makes(run),
        *(file for stage in list(stages.values())[later:] for file in stage.again),
    ):
        (folder / file).unlink(missing_ok=True)


def _train(context: Context) -> None:
    run = context.run
    for fold in range(run.search.folds):
        train_supernet(
            context.work,
            context.images,
            context.new_supernet(),
            context.sampler,
            run.task,
            context.teacher,
            run.supernet,
            run.pretrained,
            fold,
        )
    if run.sampler.answers:
        tell_sampler(context.work, context.sampler, context.inherited)
    if run.ranks:
        measure_ranking(context.models, context.searches, context.inherited, otherwise(run))
        context.settle()


def _search(context: Context) -> None:
    def answers() -> list[Genes]:
        """What the sampler has learned; without a supernet that ranks, the Archs that were trained already."""
        if context.run.search.trains:
            known = Ranking.exists(context.folder)
            return of_equal_cost(context.searches, context.run.retrain.rank_archs) if known else []
        return context.sampler.answers(context.budget)

    search_archs(
        context.searches,
        context.inherited,
        answers,
        kind=context.run.space.kind,
        recipe=context.run.recipe,
    )


def _finals(context: Context) -> None:
    choose_by_training(
        context.models,
        context.searches,
        context.inherited,
        kind=context.run.space.kind,
        recipe=context.run.recipe,
    )


def _specialize(context: Context, budgets: Sequence[Budget]) -> tuple[Table, list[str]]:
    found = specialize(context.searches, context.sampler, context.inherited, context.run.export, budgets)
    lines = [f"{arch.id}: {arch.describe()}\n  {context.folder / answer.path}" for arch, answer in found]
    return family(Family(tuple(answer for _, answer in found))), lines


def _specialize_slim(context: SlimContext, budgets: Sequence[Budget]) -> tuple[Table, list[str]]:
    found = specialize_slim(context, budgets)
    return members(found), [f"  {context.folder / member.folder}" for member in found]


def _specialize_pretrained(context: PretrainContext, budgets: Sequence[Budget]) -> tuple[Table, list[str]]:
    raise UserError(
        f"{context.folder} is a pretraining, which knows no budgets; a search or a slimming of what it made does. Use "
        f"`vitnas slim {context.folder} data.dataset=PATH budget=TEXT`."
    )


def _models(run: Run) -> tuple[str, ...]:
    roles = roles_of(run.retrain, run.teacher)
    return (*(f"models/{role}/{Result.FILE}" for role in roles), Correlation.FILE)


def _supernets(run: Run) -> tuple[str, ...]:
    return tuple(str(fold_folder(Path(), fold) / WEIGHTS) for fold in range(run.search.folds))


def _learned(run: Run) -> tuple[str, ...]:
    return (SamplerSummary.FILE,) if run.sampler.answers else ()


def _ranked(run: Run) -> tuple[str, ...]:
    return (Ranking.FILE,) if run.ranks else ()


STAGES: Mapping[str, Stage] = {
    "train": Stage(
        _train,
        lambda run: () if run.search.trains else (*_supernets(run), *_learned(run), *_ranked(run)),
    ),
    "search": Stage(_search, lambda run: (SearchRecord.FILE, Chosen.FILE)),
    "finals": Stage(_finals, lambda run: (Finals.FILE,) if run.entrants else (), again=(Finals.FILE,)),
    "retrain": Stage(
        lambda run: train_models(run.models, run.searches, run.inherited), _models, again=(Correlation.FILE,)
    ),
    "export": Stage(
        lambda run: export_chosen(run.models, run.run.export), lambda run: (f"export/{ExportRecord.FILE}",)
    ),
    "bench": Stage(
        lambda run: measure(run.models, timed_on(run.run)), lambda run: (f"export/{LatencyRecord.FILE}",)
    ),
    "evaluate": Stage(
        lambda run: final_table(run.models), lambda run: (Results.FILE, "report.html"), again=("report.html",)
    ),
}

SLIM_STAGES: Mapping[str, Stage] = {
    "train": Stage(order, lambda run: (WEIGHTS,)),
    "sensitivity": Stage(measure_damage, lambda run: (Sensitivity.FILE,)),
    "search": Stage(share_out_budgets, lambda run: (Allocation.FILE,)),
    "fold": Stage(fold_front, lambda run: (SlimFront.FILE,)),
    "bench": Stage(measure_side_by_side, lambda run: (f"export/{LatencyRecord.FILE}",)),
    "retrain": Stage(choose, lambda run: (f"models/chosen/{Result.FILE}",)),
    "export": STAGES["export"],
    "evaluate": Stage(evaluate_front, lambda run: (SlimResults.FILE, "report.html")),
}

PRETRAIN_STAGES: Mapping[str, Stage] = {
    "train": Stage(pretrain, lambda run: (Pretrained.FILE,)),
    "export": Stage(export, lambda run: (f"export/{ExportRecord.FILE}",)),
    "evaluate": Stage(judge, lambda run: ("report.html",), also=is_judged),
}

SEARCH = Plan(Context, prepare, STAGES, _specialize)
SLIM = Plan(SlimContext, prepare_slim, SLIM_STAGES, _specialize_slim)
PRETRAIN = Plan(PretrainContext, prepare_pretrain, PRETRAIN_STAGES, _specialize_pretrained)
