"""What the networks of a run learn: the Task that its `task` fields describe."""

from __future__ import annotations

from pathlib import Path

import timm
from torch import nn

from vitnas.data import Augment
from vitnas.errors import UserError
from vitnas.exporting import load_timm
from vitnas.grids import Grid
from vitnas.stages.run import Run
from vitnas.train import Task, TaskGiven, Teacher


def make_task(run: Run, *, augment: Augment, num_classes: int, grid: Grid) -> tuple[Task, Teacher | None]:
    """The Task of a run, and who teaches it.

    Args:
        grid: rows and columns of patches in the last stage of what trains.

    Raises:
        UserError: a teacher that cannot be loaded or has other classes; images that would be mixed twice.
    """
    task = run.task.build(TaskGiven(augment=augment, num_classes=num_classes, grid=grid))
    taught_by = run.task.taught_by
    return task, Teacher(load_teacher(taught_by, num_classes)) if taught_by else None


def load_teacher(name: str, num_classes: int) -> nn.Module:
    """A network from a folder that `save_timm` wrote, or by timm's name with its published weights.

    Raises:
        UserError: it cannot be loaded, or has another number of classes.
    """
    try:
        teacher: nn.Module = (
            load_timm(name) if Path(name).is_dir() else timm.create_model(name, pretrained=True)
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"task.teacher {name!r} cannot be loaded ({' '.join(str(error).split())[:120]}); it must be a folder of a "
            "trained model or a timm name whose weights are at hand. Train one first, or choose another."
        ) from error
    found = getattr(teacher, "num_classes", num_classes)
    if found != num_classes:
        raise UserError(
            f"task.teacher {name!r} has {found} classes; the data have {num_classes}. Choose a teacher of these."
        )
    return teacher
