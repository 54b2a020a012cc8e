"""TeacherConfig: who teaches what a run trains, and by which losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitnas.errors import UserError, check_words
from vitnas.train.answers import StoredTeacher
from vitnas.train.losses import TAUGHT_LOSSES, Distillation, Features, Manifold, Soft
from vitnas.train.losses.distillation import TaughtLoss
from vitnas.train.task import Task
from vitnas.train.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who teaches all that the run trains (`network`: a folder of a saved model, a timm name or NAME@FILE, or
    `pretrained` for the run's own, as it was), and by which `losses`: soft and hard on logits, features, tokens,
    manifold. `teacher=NAME` is short for `teacher.network=NAME`.

    They are added with `weights`, one each (none: 1 each), to `label_weight` times the loss of the run's task; with
    label_weight=0 labels are not looked at. Teachers of other classes teach features only. With `compare` the chosen
    Arch is also trained without the teacher, and where more than logits teaches by soft labels alone. The fields of a
    loss are under its name (`teacher.soft.temperature`).

    What the teacher says is rounded to half precision, and of logits to the `top_k` largest where that is given. With
    `cache` it is written into the run folder once and read wherever the same batch comes again, with the same result:
    all that the teacher teaches sees the same batches in the same order. `epoch_views` lets epochs come again after so
    many; without it no two epochs of a training are alike.
    """

    network: str | None = None
    losses: tuple[str, ...] = ("soft",)
    weights: tuple[float, ...] = ()
    label_weight: float = 1.0
    compare: bool = False
    cache: bool = False
    epoch_views: int | None = None
    top_k: int | None = None
    soft: Soft = field(default_factory=Soft)
    features: Features = field(default_factory=Features)
    manifold: Manifold = field(default_factory=Manifold)

    def __post_init__(self) -> None:
        check_words("teacher.losses", self.losses, TAUGHT_LOSSES)
        if not self.losses or len({*self.losses}) < len(self.losses):
            raise UserError(
                f"teacher.losses is {list(self.losses)}; it must name at least one, and each once. Use [soft]."
            )
        if self.weights and len(self.weights) != len(self.losses):
            raise UserError(
                f"teacher.weights has {len(self.weights)} numbers and teacher.losses {len(self.losses)}; each loss has "
                "one weight. Give as many, or leave them out for 1 each."
            )
        if self.label_weight < 0 or any(weight <= 0 for weight in self.weights):
            raise UserError(
                f"teacher.weights is {list(self.weights)} and teacher.label_weight {self.label_weight}; weights "
                "must be above 0, that of the labels at least 0. Leave out a loss that should not count."
            )
        for name in ("epoch_views", "top_k"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UserError(f"teacher.{name} is {number}; it must be at least 1. Leave it out for all.")
        for name, value in ((item.name, getattr(self, item.name)) for item in fields(self)):
            if isinstance(value, TaughtLoss) and name not in self.losses and value != type(value)():
                raise UserError(
                    f"teacher.{name} is given, but teacher.losses is {list(self.losses)}. Add {name} to it, or leave "
                    "its fields out."
                )
        if self.network is None and any(getattr(self, item.name) != _default(item) for item in fields(self)):
            raise UserError(
                "teacher.network is not given, but other fields of teacher are. Name a folder of a trained model or a "
                "timm model, or leave them out."
            )

    @property
    def learns_labels(self) -> bool:
        """Labels are looked at."""
        return not self.network or self.label_weight > 0

    def rivals(self) -> dict[str, TeacherConfig]:
        """How the chosen Arch is trained beside `chosen`, by role: without the teacher, and where features are learned
        besides logits, by soft labels alone."""
        if not (self.network and self.compare):
            return {}
        found = {"without_teacher": TeacherConfig()}
        logits = [loss.compares_classes for loss in self._losses()]
        if any(logits) and not all(logits):
            found["soft_labels"] = replace(
                self, losses=("soft",), weights=(), compare=False, features=Features(), manifold=Manifold()
            )
        return found

    @property
    def heads(self) -> tuple[str, ...]:
        """Fields of the Archs that learn this, which are then True."""
        return tuple(head for loss in self._losses() for head in loss.heads) if self.network else ()

    def task(self, labels: Task) -> Task:
        """What is learned: `labels` beside the teacher, or by itself where nobody teaches."""
        if not self.network:
            return labels
        weights = self.weights or (1.0,) * len(self.losses)
        return Distillation(
            losses={loss.word: (loss, weight) for loss, weight in zip(self._losses(), weights, strict=True)},
            labels=labels if self.learns_labels else None,
            label_weight=self.label_weight,
        )

    def build(self, network: nn.Module, folder: Path) -> Teacher:
        """Who teaches: `network`, whose answers are kept in `folder` where that is asked for."""
        return StoredTeacher(network, top_k=self.top_k, folder=folder if self.cache else None)

    def _losses(self) -> Iterator[TaughtLoss]:
        for word in self.losses:
            own = getattr(self, word, None)
            yield own if isinstance(own, TaughtLoss) else TAUGHT_LOSSES[word]()


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()
