"""retrain: train the chosen Arch and its baselines in the same way, and see how well the supernet ranked Archs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.exporting import load_timm, save_timm
from vitnas.grids import Grid
from vitnas.model import Model, build
from vitnas.model.named import ArchFile
from vitnas.records import (
    ExportRecord,
    FinalScores,
    LatencyRecord,
    Result,
    Results,
    Spent,
)
from vitnas.reporting.tokens import SHOWN, TokenMaps, token_maps
from vitnas.runs import writing
from vitnas.stages.run import RetrainConfig
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

    def checkpoint(self, stage: str) -> Path:
        """Of a training that goes on, by its stage's name."""
        return self.work.folder / "checkpoints" / f"{stage.replace('/', '-')}.safetensors"

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
        made += [self.checkpoint(f"retrain/{role}")]

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
    ) -> tuple[Model, Spent]:
        """Train `model` on the train split; returns what to use, and what it took.

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
        return fitted.network.eval(), Spent(learned=fitted.images, seconds=fitted.seconds)

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
        before: Spent | None = None,
        **more: Any,
    ) -> None:
        """Train `model` and write it with its result.json (holdout accuracy; test comes last).

        Args:
            teacher: in place of the run's.
            before: what finding its Arch took, where that is known.
            start, more: see `Result`.
        """
        model, spent = self.train(model, config, stage, teacher)
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
            holdout_error=score.error,
            epochs=config.epochs,
            seconds=spent.seconds,
            start=start,
            train=asdict(config),
            teacher=teacher.network,
            teacher_losses=teacher.losses if teacher.network else (),
            spent=None if before is None else before + spent + Spent(looked=score.n),
            **more,
        )
        self.work.once(Result.path(self.folder(role)), lambda: self.write(model, result))

    def copy(self, first: str, role: str, found_first: Spent | None, found: Spent | None) -> None:
        """Let a role have the model of another with the same Arch. Trained a second time it would be another by chance
        alone, and a comparison would take that for the Archs.

        Args:
            found_first, found: what finding the Arch took for each, where that is known.
        """
        result = Result.read(self.folder(first))
        trained = None if result.spent is None or found_first is None else result.spent - found_first
        spent = None if trained is None or found is None else found + trained
        self.work.progress.note(f"{role} is the same Arch as {first}, and is not trained again")
        copied = replace(result, role=role, spent=spent)
        self.work.once(Result.path(self.folder(role)), lambda: self.write(self.load(first), copied))

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
