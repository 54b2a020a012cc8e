"""search: score Archs with the supernet's weights within the budget; save every member of the front."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from optuna.exceptions import StorageInternalError

from vitnas.arch import Arch
from vitnas.data import EvalBatches, require_not_test
from vitnas.errors import UserError
from vitnas.exporting import save_timm
from vitnas.extraction import extract
from vitnas.model.named import ArchFile, Chosen
from vitnas.runs import writing
from vitnas.searching import SEARCHERS, Objective, SearchRecord, Study, Trial, search
from vitnas.space import Genes
from vitnas.stages.context import Context
from vitnas.stages.run import lasting, plain
from vitnas.stages.sampler import answers, load_sampler
from vitnas.supernet import Supernet
from vitnas.train import evaluate


class SupernetEvaluator:
    """Scores an Arch on held-out train images with inherited weights. The test split is refused."""

    def __init__(self, supernet: Supernet, batches: EvalBatches) -> None:
        require_not_test(batches.images, "search")
        self.supernet, self.batches, self.split = supernet, batches, batches.images.split

    def __call__(self, arch: Arch) -> Mapping[str, float]:
        score = evaluate(self.supernet, self.batches, arch)
        return {"accuracy": score.accuracy, "loss": score.loss}


def objectives(names: tuple[str, ...]) -> tuple[Objective, ...]:
    """`accuracy` up, costs down."""
    return tuple(Objective(name, "maximize" if name == "accuracy" else "minimize") for name in names)


def study_name(context: Context, name: str) -> str:
    """`name` in the run's own file; in a storage that runs may share, with a mark of the run, as another supernet's
    scores are not comparable."""
    if context.run.search.storage is None:
        return name
    fields = json.dumps(lasting(plain(context.run)), sort_keys=True)
    return f"{name}-{hashlib.sha256(fields.encode()).hexdigest()[:12]}"


@contextmanager
def open_study(context: Context, name: str) -> Iterator[Study]:
    """The Study of that name in the run's storage.

    Raises:
        UserError: the storage cannot be read or written, now or while the Study is open.
    """
    storage = context.run.search.storage or context.folder / "study.db"
    try:
        with Study.open(
            context.space,
            context.budget,
            storage=storage,
            name=study_name(context, name),
            objectives=objectives(context.run.search.objectives),
            seed=context.run.seed,
        ) as study:
            yield study
    except StorageInternalError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"{storage} cannot be used ({reason}); it must be a whole study on a disk with free space. Mend that, or "
            "delete it and search.json to search anew, and run the same command again."
        ) from error


@contextmanager
def run_study(context: Context, name: str, searcher: str, stage: str) -> Iterator[Study]:
    """Continue a Study until it has the run's number of scored Archs, and give it, still open.

    Several processes may do so together; all of them are done when this yields.
    """
    wanted = context.run.search.num_trials

    def report(study: Study, trial: Trial) -> None:
        scored = study.scored()
        best = max((t.values["accuracy"] for t in scored), default=0.0)
        context.progress.update(
            stage, len(scored), wanted, f"best {best:.1%}, {study.num_rejected()} rejected"
        )

    evaluator = SupernetEvaluator(context.supernet, context.holdout)
    with open_study(context, name) as study:
        with context.engine.together():
            search(
                study,
                evaluator,
                searcher=SEARCHERS[searcher].sized(wanted, lambda: _answers(context)),
                num_trials=wanted,
                latency_meter=context.meters or None,
                on_trial=report,
            )
        yield study


def _answers(context: Context) -> list[Genes]:
    return answers(load_sampler(context), context.budget, seed=context.run.seed)


def search_archs(context: Context) -> None:
    """The search of a run: study.db, search.json and front/<arch id>/ for every member of the front."""
    if SearchRecord.exists(context.folder):
        return
    with run_study(context, "search", context.run.search.searcher, "search") as study:
        if not study.scored():
            raise UserError(
                f"the search scored no Arch: {study.num_rejected()} missed {context.budget.text!r}. Widen the budget."
            )

        def write() -> None:
            for trial in study.front():
                save_front_member(context, trial.arch)
            chosen_arch(context, study.best()).write(context.folder)
            study.summary().write(context.folder)

        context.engine.from_first(write)


def chosen_arch(context: Context, trial: Trial) -> Chosen:
    """The search's answer, for people and for `vitnas retrain FOLDER arch=chosen.json` in any run folder."""
    return Chosen.of(
        trial.arch,
        context.run.space.kind,
        macs=trial.cost.macs,
        params=trial.cost.params,
        supernet_accuracy=trial.values["accuracy"],
        budget=context.budget.text,
        recipe=context.run.recipe,
    )


def front_folder(context: Context, arch: Arch) -> Path:
    """Where `arch` lies with inherited weights."""
    return context.folder / "front" / arch.id


def save_front_member(context: Context, arch: Arch) -> None:
    """Inherited weights, config and Arch."""
    folder = front_folder(context, arch)
    if not ArchFile.exists(folder):
        model = extract(context.supernet, arch)
        with writing(folder):
            save_timm(model, folder, class_names=context.data.class_names, data_config=context.data_config)
        ArchFile(arch).write(folder)
