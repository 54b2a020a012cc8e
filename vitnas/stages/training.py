"""How a run trains whatever it trains: its images, the Task that its `task` fields describe, who teaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from vitnas.data import Data, require_labels
from vitnas.exporting.networks import load_network
from vitnas.grids import Grid
from vitnas.sample import Fixed, Hook, Sampler
from vitnas.stages.work import RunImages, Work
from vitnas.supernet import Supernet
from vitnas.train import (
    CombinedSides,
    Fitted,
    Monitor,
    Task,
    TaskConfig,
    TaskGiven,
    Teacher,
    TeacherConfig,
    TrainConfig,
    fit,
)

TAUGHT = "taught"  # names the order and the variations of the images in all trainings with a teacher


def make_task(
    config: TaskConfig, teacher: TeacherConfig, data: Data, grid: Grid, folder: Path
) -> tuple[Task, Teacher | None]:
    """The Task of a run, and who teaches it.

    Args:
        folder: of the run.
        grid: rows and columns of patches in the last stage of what trains.

    Raises:
        UserError: a teacher that cannot be loaded; images that would be mixed twice, or that have no labels where the
            Task learns from them.
    """
    if config.needs_labels and teacher.learns_labels:
        require_labels(data.train.targets, f"task.kind {config.kind!r}")
    task = config.build(TaskGiven(augment=data.augment, num_classes=data.num_classes, grid=grid))
    network = load_network(teacher.network, what="teacher") if teacher.network else None
    return teacher.task(task), None if network is None else teacher.build(network, folder / "teacher")


def train(
    work: Work,
    images: RunImages,
    network: nn.Module,
    task: TaskConfig,
    teacher: TeacherConfig,
    config: TrainConfig,
    *,
    stage: str,
    grid: Grid,
    monitor: Monitor | None,
    sampler: Sampler | None = None,
    hooks: Sequence[Hook] = (),
) -> Fitted:
    """Train a network of the run on its images, continuing from the stage's checkpoint.

    Args:
        stage: its name in metrics.jsonl and of its checkpoint.
        grid: see `make_task`.
        sampler: which Archs of a Supernet train.
    """
    learned, taught_by = make_task(task, teacher, images.data, grid, work.folder)
    batches = images.train_batches(stage if taught_by is None else TAUGHT, teacher.epoch_views)
    return fit(
        network,
        CombinedSides(learned) if isinstance(network, Supernet) and network.sides > 1 else learned,
        sampler or Fixed(),
        batches,
        config=config,
        teacher=taught_by,
        augment=images.data.augment,
        num_classes=images.data.num_classes,
        seed=work.seed,
        engine=work.engine,
        folder=work.folder,
        stage=stage,
        monitor=monitor,
        progress=work.progress,
        hooks=hooks,
    )
