"""How a run trains whatever it trains: its images, the Task that its `task` fields describe, who teaches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vitnas.data import Data, require_labels
from vitnas.errors import UserError
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
    TrainConfig,
    fit,
)


def make_task(config: TaskConfig, data: Data, grid: Grid) -> tuple[Task, Teacher | None]:
    """The Task of a run, and who teaches it.

    Args:
        grid: rows and columns of patches in the last stage of what trains.

    Raises:
        UserError: a teacher that cannot be loaded or has other classes; images that would be mixed twice, or that have
            no labels where the Task learns from them.
    """
    if config.needs_labels:
        require_labels(data.train.targets, f"task.kind {config.kind!r}")
    task = config.build(TaskGiven(augment=data.augment, num_classes=data.num_classes, grid=grid))
    return task, Teacher(load_teacher(config.taught_by, data.num_classes)) if config.taught_by else None


def train(
    work: Work,
    images: RunImages,
    network: nn.Module,
    task: TaskConfig,
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
    learned, teacher = make_task(task, images.data, grid)
    return fit(
        network,
        CombinedSides(learned) if isinstance(network, Supernet) and network.sides > 1 else learned,
        sampler or Fixed(),
        images.train_batches(stage),
        config=config,
        teacher=teacher,
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


def load_teacher(name: str, num_classes: int) -> nn.Module:
    """A trained network with the same classes, by what `load_network` takes.

    Raises:
        UserError: it cannot be loaded, or has another number of classes.
    """
    teacher = load_network(name, what="task.teacher")
    found = getattr(teacher, "num_classes", num_classes)
    if found != num_classes != 0:  # 0: images without labels
        raise UserError(
            f"task.teacher {name!r} has {found} classes; the data have {num_classes}. Choose a teacher of these."
        )
    return teacher
