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
from vitnas.train import Classification, HardDistillation, Task, Teacher, TokenMixup


def make_task(run: Run, *, augment: Augment, num_classes: int, grid: Grid) -> tuple[Task, Teacher | None]:
    """The Task of a run, and who teaches it.

    Args:
        grid: rows and columns of patches in the last stage of what trains.

    Raises:
        UserError: a teacher that cannot be loaded or has other classes; images that would be mixed twice.
    """
    config, smoothing = run.task, augment.label_smoothing
    if config.kind == "token_mixup":
        if augment.mixup or augment.cutmix:
            raise UserError(
                f"data.augment mixes images (mixup {augment.mixup}, cutmix {augment.cutmix}) and task.kind token_mixup "
                "does so itself; only one may. Set data.augment.mixup and data.augment.cutmix to 0."
            )
        task = TokenMixup(
            num_classes=num_classes,
            grid=grid,
            label_smoothing=smoothing,
            patch_weight=config.patch_weight,
        )
        return task, None
    if config.kind == "hard_distillation":
        teacher = Teacher(load_teacher(config.teacher, num_classes))
        return HardDistillation(weight=config.teacher_weight, label_smoothing=smoothing), teacher
    return Classification(label_smoothing=smoothing), None


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
