"""retrain: train the chosen Arch and its baselines in the same way, and see how well the supernet ranked Archs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.exporting import load_timm, save_timm
from vitnas.extraction import extract
from vitnas.grids import Grid
from vitnas.model import Model, build
from vitnas.model.named import ArchFile
from vitnas.records import (
    Correlation,
    ExportRecord,
    FinalScores,
    LatencyRecord,
    RankedArch,
    Result,
    Results,
)
from vitnas.reporting.tokens import SHOWN, TokenMaps, token_maps
from vitnas.runs import writing
from vitnas.searching import Trial, rank_correlation
from vitnas.stages.hand_scaled import hand_scaled
from vitnas.stages.run import RetrainConfig
from vitnas.stages.searching import Inherited, Searches
from vitnas.stages.training import train
from vitnas.stages.work import RunImages, Work
from vitnas.train import Monitor, TaskConfig, TeacherConfig, TrainConfig, evaluate


@dataclass(frozen=True)
class Models:
    """The trained models of a run (models/<role>/): how they are trained, written and read.

    Args:
        cells: rows and columns that labels per patch are mixed by, where an Arch's patches lie in them.
    """

    work: Work
    images: RunImages
    task: TaskConfig
    teacher: TeacherConfig
    config: RetrainConfig
    cells: Callable[[], Grid]

    @property
    def heads(self) -> tuple[str, ...]:
        """Fields of Archs that what is learned makes True."""
        return (*self.task.heads, *self.teacher.heads)

    def folder(self, role: str) -> Path:
        return self.work.folder / "models" / role

    @property
    def own_roles(self) -> tuple[str, ...]:
        """The models that the run trains by itself, as they are shown."""
        return roles_of(self.config, self.teacher)

    @property
    def roles(self) -> list[str]:
        """The models that are there, the chosen one first, those that were asked for by name last."""
        wanted = self.own_roles
        results = {
            path.parent.name: path for path in sorted(self.work.folder.glob(f"models/*/{Result.FILE}"))
        }
        asked = [role for role, path in results.items() if role not in wanted and Result.load(path).asked]
        return [role for role in (*wanted, *asked) if role in results]

    def forget(self, role: str) -> None:
        """Take away a model, and first what was made from it: a kill in between leaves nothing that looks done."""
        folder = self.work.folder
        made = [Results.path(folder), FinalScores.path(folder), LatencyRecord.path(folder / "export")]
        made += [ExportRecord.path(folder / "export"), TokenMaps.path(folder)] if role == "chosen" else []
        made += [folder / "checkpoints" / f"retrain-{role}.safetensors"]

        def remove() -> None:
            for path in (*made, Result.path(self.folder(role))):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.folder(role))

        self.work.engine.from_first(remove)

    def show_tokens(self) -> None:
        """token_maps.json: which patches the chosen Model keeps of some held-out images, if it keeps fewer."""
        folder = self.work.folder

        def make() -> None:
            form, images = self.images.data.holdout.form, self.images.some()[:SHOWN]
            names = [self.images.data.holdout.name(number) for number in range(len(images))]
            token_maps(self.load("chosen"), images, names, mean=form.mean, std=form.std).write(folder)

        if ArchFile.read(self.folder("chosen")).arch.selector is not None:
            self.work.once(TokenMaps.path(folder), make)

    def load(self, role: str) -> Model:
        """The trained Model of a role, on the CPU."""
        model = load_timm(self.folder(role))
        assert isinstance(model, Model)
        return model.eval()

    def train(
        self, model: Model, config: TrainConfig, stage: str, teacher: TeacherConfig | None = None
    ) -> tuple[Model, float]:
        """Train `model` on the train split; returns what to use, with the seconds that it took.

        Args:
            teacher: in place of the run's.
        """
        cells, patches = self.cells(), model.arch.grids[-1]
        fits = all(n % c == 0 for n, c in zip(patches, cells, strict=True))
        fitted = train(
            self.work,
            self.images,
            model,
            self.task,
            self.teacher if teacher is None else teacher,
            config,
            stage=stage,
            grid=cells if fits else patches,
            monitor=Monitor((("model", None),), self.images.holdout),
        )
        assert isinstance(fitted.network, Model)
        return fitted.network.eval(), fitted.seconds

    def fresh(self, arch: Arch, stage: str) -> Model:
        """A Model with new weights, which follow from the run's seed and the stage."""
        return build(arch, generator=self.work.generator(stage))

    def train_role(
        self,
        role: str,
        model: Model,
        config: TrainConfig,
        stage: str,
        *,
        start: str,
        teacher: TeacherConfig | None = None,
        **more: Any,
    ) -> None:
        """Train `model` and write it with its result.json (holdout accuracy; test comes last).

        Args:
            teacher: in place of the run's.
            start, more: see `Result`.
        """
        model, seconds = self.train(model, config, stage, teacher)
        teacher = self.teacher if teacher is None else teacher
        score, cost = evaluate(model, self.images.holdout), count(model.arch)
        result = Result(
            role=role,
            arch_id=model.arch.id,
            macs=cost.macs,
            params=cost.params,
            memory_bytes=cost.memory_bytes,
            holdout_accuracy=score.accuracy,
            n_holdout=score.n,
            epochs=config.epochs,
            seconds=seconds,
            start=start,
            train=asdict(config),
            teacher=teacher.network,
            teacher_losses=teacher.losses if teacher.network else (),
            **more,
        )
        self.work.once(Result.path(self.folder(role)), lambda: self.write(model, result))

    def write(self, model: Model, result: Result) -> None:
        """A model's folder, with its result."""
        folder = self.folder(result.role)
        with writing(folder):
            save_timm(model.cpu(), folder, **self.images.about)
        ArchFile(model.arch).write(folder)
        result.write(folder)


def roles_of(config: RetrainConfig, teacher: TeacherConfig) -> tuple[str, ...]:
    """The models that a run trains: the chosen one, the same taught otherwise where that is compared, the baselines."""
    return ("chosen", *teacher.rivals(), *config.baselines)


def train_models(models: Models, searches: Searches, inherited: Inherited) -> None:
    """Train `chosen` and the baselines into models/<role>/, then correlation.json. Skips what is there."""
    chosen = searches.chosen()

    def pick(role: str) -> tuple[Arch, float | None]:
        """The Arch, and the accuracy that the supernet gives it where it is of this run's search."""
        if role == "hand_scaled":
            return hand_scaled(chosen.arch, searches.budget), None
        if role == "chosen" or role in rivals:
            return chosen.arch, chosen.values["accuracy"]
        with searches.run("random_search", "random", inherited.evaluator) as study:
            best = searches.best(study)
            return best.arch, best.values["accuracy"]

    rivals = models.teacher.rivals()
    for role in models.own_roles:
        arch, accuracy = pick(role)
        if Result.exists(models.folder(role)):
            if Result.read(models.folder(role)).arch_id == arch.id:
                continue
            models.work.progress.note(f"{role} is another Arch now, and is trained anew")
            models.forget(role)
        stage, inherits = f"retrain/{role}", models.config.start == "inherited" and accuracy is not None
        weights = "retrain/chosen" if role in rivals else stage  # the same new ones
        models.train_role(
            role,
            extract(inherited.supernet, arch).cpu() if inherits else models.fresh(arch, weights),
            models.config.train,
            stage,
            start="inherited" if inherits else "scratch",
            supernet_accuracy=accuracy,
            teacher=rivals.get(role),
        )
    rank_archs(models, searches)


def rank_archs(models: Models, searches: Searches) -> None:
    """Train a few Archs from scratch, briefly, and hold their accuracy against the supernet's (correlation.json)."""
    retrain, work = models.config, models.work
    if Correlation.exists(work.folder):
        return
    with searches.open() as study:
        trials = evenly(study.scored(), retrain.rank_archs)
    config = replace(retrain.train, epochs=retrain.rank_epochs)
    points: list[RankedArch] = []
    for trial in trials:
        done, stage = work.folder / "ranking" / f"{trial.arch.id}.json", f"ranking/{trial.arch.id}"
        if not done.exists():
            model, _ = models.train(models.fresh(trial.arch, stage), config, stage)
            accuracy = evaluate(model, models.images.holdout).accuracy
            point = RankedArch(trial.arch.id, trial.cost.macs, trial.values["accuracy"], accuracy)
            work.once(done, partial(point.save, done))
        points.append(RankedArch.load(done))
    pairs = ([point.supernet_accuracy for point in points], [point.trained_accuracy for point in points])
    tau, rho, note = None, None, ""
    try:
        found = rank_correlation(*pairs)
        tau, rho = found["kendall_tau"], found["spearman"]
    except UserError as error:  # too few Archs, or all equally good: there is no order to compare
        note = str(error) if trials else "retrain.rank_archs is 0."
    how = (
        f"{len(points)} scored Archs spread over the supernet's ranking, each trained from scratch for "
        f"{retrain.rank_epochs:g} epochs (seed {work.seed}); both accuracies on the holdout split"
    )
    record = Correlation(
        kendall_tau=tau, spearman=rho, n=len(points), how=how, points=tuple(points), note=note
    )
    work.once(Correlation.path(work.folder), lambda: record.write(work.folder))


def evenly(trials: list[Trial], n: int) -> list[Trial]:
    """`n` Trials evenly spaced over the ranking by accuracy, best and worst included."""
    ranked = sorted(trials, key=lambda trial: (trial.values["accuracy"], trial.number))
    if len(ranked) <= n or not n:
        return ranked[:n]
    return [ranked[round(i * (len(ranked) - 1) / max(1, n - 1))] for i in range(n)]
