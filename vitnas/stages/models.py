"""retrain: train the chosen Arch and its baselines in the same way, and see how well the supernet ranked Archs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.exporting import load_timm, save_timm
from vitnas.extraction import extract
from vitnas.grids import Grid
from vitnas.model import Model, build
from vitnas.model.named import ArchFile
from vitnas.records import Correlation, RankedArch, Result
from vitnas.runs import writing
from vitnas.sample import Fixed
from vitnas.searching import SearchRecord, Trial, rank_correlation
from vitnas.stages.context import Context
from vitnas.stages.hand_scaled import hand_scaled
from vitnas.stages.searching import open_study, run_study
from vitnas.stages.tasks import make_task
from vitnas.train import Monitor, TrainConfig, evaluate, fit


def chosen_trial(context: Context) -> Trial:
    """The Trial that search.json chose.

    Raises:
        UserError: the study does not hold it, or one of the two cannot be read.
    """
    chosen = SearchRecord.read(context.folder).chosen
    with open_study(context, "search") as study:
        for trial in study.scored():
            if trial.arch.id == chosen:
                return trial
    raise UserError(
        f"{SearchRecord.path(context.folder)} chose Arch {chosen}, which the study does not hold; they must be of one "
        f"search. Delete {SearchRecord.FILE} and run `vitnas search` again."
    )


def train_models(context: Context) -> None:
    """Train `chosen` and the baselines into models/<role>/, then correlation.json. Skips what is there."""
    trial = chosen_trial(context)
    train_role(context, "chosen", lambda: (trial.arch, trial.values["accuracy"]))
    for role in context.run.retrain.baselines:
        train_role(context, role, _baseline(context, role, trial.arch))
    rank_archs(context)


def _baseline(context: Context, role: str, chosen: Arch) -> Callable[[], tuple[Arch, float | None]]:
    def pick() -> tuple[Arch, float | None]:
        if role == "hand_scaled":
            return hand_scaled(chosen, context.budget), None
        with run_study(context, "random_search", "random", "random search") as study:
            best = study.best()
            return best.arch, best.values["accuracy"]

    return pick


def train_role(
    context: Context,
    role: str,
    pick: Callable[[], tuple[Arch, float | None]],
    *,
    asked: str | None = None,
) -> None:
    """Train one model of the comparison and write it with its result.json (holdout accuracy; test comes last).

    Args:
        pick: the Arch, and the accuracy that the supernet gives it where it is of this run's search.
        asked: what a user called it, where it is no model of the run's own.
    """
    folder = context.folder / "models" / role
    if Result.exists(folder):
        return
    arch, supernet_accuracy = pick()
    retrain = context.run.retrain
    inherit = retrain.start == "inherited" and supernet_accuracy is not None
    model, seconds = train_one(context, arch, retrain.train, f"retrain/{role}", inherit=inherit)
    score = evaluate(model, context.holdout)
    cost = count(arch)
    result = Result(
        role=role,
        arch_id=arch.id,
        macs=cost.macs,
        params=cost.params,
        memory_bytes=cost.memory_bytes,
        holdout_accuracy=score.accuracy,
        n_holdout=score.n,
        epochs=retrain.train.epochs,
        seconds=seconds,
        start="inherited" if inherit else "scratch",
        train=asdict(retrain.train),
        supernet_accuracy=supernet_accuracy,
        asked=asked,
    )
    context.once(Result.path(folder), lambda: save_model(context, model, folder, result))


def train_one(
    context: Context, arch: Arch, config: TrainConfig, stage: str, *, inherit: bool
) -> tuple[Model, float]:
    """A Model of `arch`, trained on the train split; returns it with the seconds that it took."""
    if inherit:
        model = extract(context.supernet, arch).cpu()
    else:
        model = build(arch, generator=context.generator(stage))
    data = context.data
    task, teacher = make_task(
        context.run,
        augment=context.augment,
        num_classes=data.num_classes,
        grid=_task_grid(context, arch),
    )
    fitted = fit(
        model,
        task,
        Fixed(),
        context.train_batches(stage),
        config=config,
        teacher=teacher,
        augment=context.augment,
        num_classes=context.data.num_classes,
        seed=context.run.seed,
        engine=context.engine,
        folder=context.folder,
        stage=stage,
        monitor=Monitor((("model", None),), context.holdout),
        progress=context.progress,
    )
    network = fitted.network
    assert isinstance(network, Model)
    return network.eval(), fitted.seconds


def _task_grid(context: Context, arch: Arch) -> Grid:
    """Rows and columns of cells that patch labels are mixed by: the Space's, where the Arch's patches lie in them."""
    cells, patches = context.space.largest().grids[-1], arch.grids[-1]
    return cells if all(n % c == 0 for n, c in zip(patches, cells, strict=True)) else patches


def load_model(context: Context, role: str) -> Model:
    """The trained Model of a role, on the CPU."""
    model = load_timm(context.folder / "models" / role)
    assert isinstance(model, Model)
    return model.eval()


def rank_archs(context: Context) -> None:
    """Train a few Archs from scratch, briefly, and hold their accuracy against the supernet's (correlation.json)."""
    retrain = context.run.retrain
    if Correlation.exists(context.folder) or not retrain.rank_archs:
        return
    with open_study(context, "search") as study:
        trials = spread(study.scored(), retrain.rank_archs)
    config = replace(retrain.train, epochs=retrain.rank_epochs)
    points: list[RankedArch] = []
    for trial in trials:
        done = context.folder / "ranking" / f"{trial.arch.id}.json"
        if not done.exists():
            model, _ = train_one(context, trial.arch, config, f"ranking/{trial.arch.id}", inherit=False)
            accuracy = evaluate(model, context.holdout).accuracy
            point = RankedArch(trial.arch.id, trial.cost.macs, trial.values["accuracy"], accuracy)
            context.once(done, partial(point.save, done))
        points.append(RankedArch.load(done))
    pairs = ([point.supernet_accuracy for point in points], [point.trained_accuracy for point in points])
    tau, rho, note = None, None, ""
    try:
        found = rank_correlation(*pairs)
        tau, rho = found["kendall_tau"], found["spearman"]
    except UserError as error:  # too few Archs, or all equally good: there is no order to compare
        note = str(error)
    how = (
        f"{len(points)} scored Archs spread over the supernet's ranking, each trained from scratch for "
        f"{retrain.rank_epochs:g} epochs (seed {context.run.seed}); both accuracies on the holdout split"
    )
    record = Correlation(
        kendall_tau=tau, spearman=rho, n=len(points), how=how, points=tuple(points), note=note
    )
    context.once(Correlation.path(context.folder), lambda: record.write(context.folder))


def spread(trials: list[Trial], n: int) -> list[Trial]:
    """`n` Trials evenly spaced over the ranking by accuracy, best and worst included."""
    ranked = sorted(trials, key=lambda trial: (trial.values["accuracy"], trial.number))
    if len(ranked) <= n:
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / max(1, n - 1))] for i in range(n)]


def save_model(context: Context, model: Model, folder: Path, result: Result) -> None:
    """Write a trained model and its result into `folder`."""
    with writing(folder):
        save_timm(model.cpu(), folder, class_names=context.data.class_names, data_config=context.data_config)
    ArchFile(model.arch).write(folder)
    result.write(folder)
