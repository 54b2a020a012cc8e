"""Learning from labels, from a teacher's logits, and from both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from vitnas.data import require_labels
from vitnas.errors import UserError
from vitnas.train.task import Batch, Outputs, Task, TaskConfig, TaskGiven


def label_loss(logits_BY: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Cross-entropy to the labels. Smoothing is for class numbers; mixed targets bring their own.

    Raises:
        UserError: images without labels.
    """
    require_labels(batch.targets, "this task")
    smoothing = label_smoothing if batch.targets.dim() == 1 else 0.0
    return functional.cross_entropy(logits_BY, batch.targets, label_smoothing=smoothing)


def soft_loss(logits_BY: Tensor, taught_BY: Tensor, temperature: float) -> Tensor:
    """Soft cross-entropy to a teacher's logits, times the temperature squared (Hinton et al., arXiv 1503.02531).

    Raises:
        UserError: the teacher has other classes.
    """
    check_classes(logits_BY, taught_BY)
    soft_BY = (taught_BY / temperature).softmax(-1)
    return functional.cross_entropy(logits_BY / temperature, soft_BY) * temperature**2


def check_classes(logits_BY: Tensor, taught_BY: Tensor) -> None:
    """Raise UserError where student and teacher have not the same number of classes."""
    if logits_BY.shape[-1] != taught_BY.shape[-1]:
        raise UserError(
            f"the teacher has {taught_BY.shape[-1]} classes, the network {logits_BY.shape[-1]}; it can only teach its "
            "own. Use a teacher of these classes."
        )


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy, plus the soft cross-entropy to a teacher's logits where there is one.

    Attributes:
        label_smoothing: for class numbers; mixed targets bring their own.
        distill_weight: share of the teacher's term in [0, 1]; labels get the rest.
        temperature: divides both logits in the teacher's term.
    """

    label_smoothing: float = 0.0
    distill_weight: float = 0.5
    temperature: float = 1.0
    wants_taught = ("logits?",)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        ce = label_loss(outputs["logits"], batch, self.label_smoothing)
        if "logits" not in taught:
            return {"loss": ce}
        kd = soft_loss(outputs["logits"], taught["logits"], self.temperature)
        return {"loss": (1 - self.distill_weight) * ce + self.distill_weight * kd, "ce": ce, "kd": kd}


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TaskConfig):
    """The labels."""

    kind = "classification"
    learns_from_archs = True

    def build(self, given: TaskGiven) -> Classification:
        return Classification(label_smoothing=given.augment.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class HardDistillation(Task):
    """A teacher's decisions as labels (DeiT, arXiv 2012.12877, section 4; a variant of ViT-ResNAS).

    Cross-entropy to the labels by the class token, and to the teacher's first choice by the distillation token; without
    a distillation token both are by the class token.

    Attributes:
        weight: share of the teacher's term; labels get the rest. Half and half in the papers.
        label_smoothing: for class numbers; mixed targets bring their own.
    """

    weight: float = 0.5
    label_smoothing: float = 0.0
    wants = ("head", "head_dist?")
    wants_taught = ("logits",)

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UserError(f"weight is {self.weight}; it is a share from 0 to 1. Use 0.5.")

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        ce = label_loss(outputs["head"], batch, self.label_smoothing)
        by_token_BY = outputs.get("head_dist", outputs["head"])
        check_classes(by_token_BY, taught["logits"])
        kd = functional.cross_entropy(by_token_BY, taught["logits"].argmax(-1))
        return {"loss": (1 - self.weight) * ce + self.weight * kd, "ce": ce, "kd": kd}


@dataclass(frozen=True, kw_only=True)
class HardDistillationConfig(TaskConfig):
    """The labels, and with `teacher_weight` the choices of `teacher`: a folder of a trained model, or a timm name."""

    kind = "hard_distillation"
    heads = ("distill_token",)

    teacher: str = ""
    teacher_weight: float = 0.5

    def __post_init__(self) -> None:
        if not self.teacher:
            raise UserError(
                "task.teacher is empty; hard_distillation learns from one. Name a folder of a trained model, or a timm "
                "model."
            )
        if not 0 <= self.teacher_weight <= 1:
            raise UserError(
                f"task.teacher_weight is {self.teacher_weight}; it is a share from 0 to 1. Use 0.5."
            )

    @property
    def taught_by(self) -> str:
        return self.teacher

    def build(self, given: TaskGiven) -> HardDistillation:
        return HardDistillation(weight=self.teacher_weight, label_smoothing=given.augment.label_smoothing)


@dataclass(frozen=True)
class Imitation(Task):
    """The teacher's logits alone; labels are not looked at."""

    temperature: float = 1.0
    wants_taught = ("logits",)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        return {"loss": soft_loss(outputs["logits"], taught["logits"], self.temperature)}
