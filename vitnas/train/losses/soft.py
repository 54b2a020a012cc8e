"""Learning from labels, from a teacher's logits, and from both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from vitnas.data import require_labels
from vitnas.data.config import LabelKind
from vitnas.errors import UserError
from vitnas.train.losses.distillation import TaughtLoss
from vitnas.train.task import Batch, Outputs, Task, TaskConfig, TaskGiven


def label_loss(logits_BY: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Cross-entropy to the labels; binary, the mean over classes, where images may have several; of numbers the mean
    squared error. Smoothing is for class numbers; mixed targets bring their own.

    Raises:
        UserError: images without labels, or not as many numbers as the network tells.
    """
    require_labels(batch.targets, "this task")
    if batch.kind == "numbers":
        if logits_BY.shape != batch.targets.shape:
            raise UserError(
                f"the network tells {logits_BY.shape[-1]} numbers of an image and the labels "
                f"{batch.targets.shape[-1]}; they must be the same. Set num_classes to that."
            )
        return functional.mse_loss(logits_BY, batch.targets)
    if batch.kind == "classes":
        return functional.binary_cross_entropy_with_logits(logits_BY, batch.targets)
    smoothing = label_smoothing if batch.targets.dim() == 1 else 0.0
    return functional.cross_entropy(logits_BY, batch.targets, label_smoothing=smoothing)


def soft_loss(
    logits_BY: Tensor, taught_BY: Tensor, temperature: float, *, kind: LabelKind = "class"
) -> Tensor:
    """Soft cross-entropy to a teacher's logits, times the temperature squared (Hinton et al., arXiv 1503.02531);
    binary, the mean over classes, where images may have several; of numbers the mean squared difference.

    Raises:
        UserError: the teacher has other classes.
    """
    check_classes(logits_BY, taught_BY)
    if kind == "numbers":
        return functional.mse_loss(logits_BY, taught_BY)
    if kind == "classes":
        soft_BY = (taught_BY / temperature).sigmoid()
        return functional.binary_cross_entropy_with_logits(logits_BY / temperature, soft_BY) * temperature**2
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
        kd = soft_loss(outputs["logits"], taught["logits"], self.temperature, kind=batch.kind)
        return {"loss": (1 - self.distill_weight) * ce + self.distill_weight * kd, "ce": ce, "kd": kd}


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(TaskConfig):
    """The labels."""

    kind = "classification"
    learns_from_archs = True

    def build(self, given: TaskGiven) -> Classification:
        return Classification(label_smoothing=given.augment.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Soft(TaughtLoss):
    """The teacher's probabilities at `temperature` (Hinton et al., arXiv 1503.02531): the divergence of the student's
    from them, mean over images, times the temperature squared."""

    word = "soft"
    compares_classes = True

    temperature: float = 1.0
    wants_taught = ("logits",)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}; logits are divided by it. Use 1 to 4.")

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        logits_BY, taught_BY = outputs["logits"], taught["logits"]
        if batch.kind != "class":
            return {"loss": soft_loss(logits_BY, taught_BY, self.temperature, kind=batch.kind)}
        check_classes(logits_BY, taught_BY)
        student_BY, teacher_BY = ((x / self.temperature).log_softmax(-1) for x in (logits_BY, taught_BY))
        divergence = functional.kl_div(student_BY, teacher_BY, reduction="batchmean", log_target=True)
        return {"loss": divergence * self.temperature**2}


@dataclass(frozen=True, kw_only=True)
class Hard(TaughtLoss):
    """The teacher's first choices as labels (DeiT, arXiv 2012.12877, section 4; a variant of ViT-ResNAS)."""

    word = "hard"
    compares_classes = True
    heads = ("distill_token",)

    wants_taught = ("logits",)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        check_classes(outputs["logits"], taught["logits"])
        if batch.kind == "numbers":
            raise UserError(
                "hard learns a teacher's first choices, and these images have numbers. Use teacher.losses=[soft]."
            )
        return {"loss": functional.cross_entropy(outputs["logits"], taught["logits"].argmax(-1))}
