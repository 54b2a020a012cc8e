"""Learning from a teacher: one or several losses, added up, beside the labels' loss or without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.train.gives import Gives
from vitnas.train.task import Batch, Outputs, Task

BY_TOKEN = ("head?", "head_dist?")


@dataclass(frozen=True, kw_only=True)
class TaughtLoss(Task):
    """Base of what can be learned from a teacher; its fields are those of `teacher.<word>` in a run.

    Attributes:
        word: in `teacher.losses`.
        compares_classes: the teacher must have the student's classes.
        heads: fields of the Archs that learn this, which are then True where the Space has them.
    """

    word: ClassVar[str]
    compares_classes: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ()

    def meet(self, student: Gives, teacher: Gives) -> Task:
        if self.compares_classes and (student.classes != teacher.classes or not teacher.classes):
            raise UserError(
                f"the teacher has {teacher.classes or 'no'} classes, the network {student.classes or 'none'}; the loss "
                f"{self.word!r} compares them. Use a teacher of these classes, or a loss on features, such as features."
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Distillation(Task):
    """`label_weight` times the loss of `labels`, plus each of `losses` times its weight.

    Where a network has a distillation token and there are labels, its own head learns from the teacher and the class
    token's from the labels (DeiT, arXiv 2012.12877); without labels the logits of both together learn.

    Attributes:
        losses: by a name for metrics.jsonl, each with its weight.
        labels: None where labels are not looked at.
    """

    losses: Mapping[str, tuple[Task, float]]
    labels: Task | None = None
    label_weight: float = 1.0
    wants: tuple[str, ...] = field(init=False)
    wants_taught: tuple[str, ...] = field(init=False)
    own: nn.Module | None = field(init=False, compare=False)

    def __post_init__(self) -> None:
        tasks = [task for task, _ in self.losses.values()]
        beside = () if self.labels is None else (*self.labels.wants, *BY_TOKEN)
        wants = dict.fromkeys((*beside, *(name for task in tasks for name in task.wants)))
        taught = dict.fromkeys(name for task in tasks for name in task.wants_taught)
        owned = {name: task.own for name, (task, _) in self.losses.items() if task.own is not None}
        for name, value in [
            ("wants", tuple(wants)),
            ("wants_taught", tuple(taught)),
            ("own", nn.ModuleDict(owned) if owned else None),
        ]:
            object.__setattr__(self, name, value)

    def meet(self, student: Gives, teacher: Gives) -> Distillation:
        met = {name: (task.meet(student, teacher), weight) for name, (task, weight) in self.losses.items()}
        return replace(self, losses=met)

    def mix(self, batch: Batch) -> Batch:
        return batch if self.labels is None else self.labels.mix(batch)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        if self.labels is not None:
            by_token = "head_dist" in outputs
            found = self.labels({**outputs, "logits": outputs["head"]} if by_token else outputs, batch, {})
            total = self.label_weight * (label := found.pop("loss"))
            found = {"labels": label, **found}
            if by_token:
                outputs = {**outputs, "logits": outputs["head_dist"]}
        for name, (task, weight) in self.losses.items():
            parts = task(outputs, batch, taught)
            total = total + weight * (loss := parts.pop("loss"))
            found |= {name: loss, **{f"{name}_{part}": value for part, value in parts.items()}}
        assert isinstance(total, Tensor)
        return {"loss": total, **found}
