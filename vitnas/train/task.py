"""Tasks: from a network and a batch to losses by name. A Task neither prints, nor counts calls, nor runs backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch


@dataclass(frozen=True, slots=True)
class Batch:
    """Images and what to learn from them.

    Attributes:
        images_BCHW: float images.
        targets: (B,) class numbers, or (B, Y) probabilities after mixing.
        teacher_BY: logits to imitate, without gradient, or None.
        patch_targets: (B, N, Y) probabilities per patch, or None.
    """

    images_BCHW: Tensor
    targets: Tensor
    teacher_BY: Tensor | None = None
    patch_targets: Tensor | None = None

    def part(self, rows: slice, teacher_BY: Tensor | None = None) -> Batch:
        """Some of the images, with the logits to imitate."""
        patches = None if self.patch_targets is None else self.patch_targets[rows]
        return Batch(self.images_BCHW[rows], self.targets[rows], teacher_BY, patches)


class Task(Protocol):
    """Losses of a network on a batch; `loss` is what is minimised, the others are only logged.

    Returns the logits too, so that one Arch can teach another in the same step.
    """

    def __call__(
        self, network: nn.Module, batch: Batch, arch: Arch | None
    ) -> tuple[dict[str, Tensor], Tensor]: ...


@runtime_checkable
class Mixes(Protocol):
    """A Task that mixes the images of a whole batch before the Archs of a step share it."""

    def mix(self, batch: Batch) -> Batch: ...


@dataclass(frozen=True)
class Classification:
    """Cross-entropy, plus the soft cross-entropy to a teacher's logits when the batch brings them.

    Attributes:
        label_smoothing: for class numbers; mixed targets bring their own.
        distill_weight: share of the teacher's term in [0, 1]; labels get the rest.
        temperature: divides both logits in the teacher's term.
    """

    label_smoothing: float = 0.0
    distill_weight: float = 0.5
    temperature: float = 1.0

    def __call__(
        self, network: nn.Module, batch: Batch, arch: Arch | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        logits_BY = run(network, batch.images_BCHW, arch)
        smoothing = self.label_smoothing if batch.targets.dim() == 1 else 0.0
        ce = functional.cross_entropy(logits_BY, batch.targets, label_smoothing=smoothing)
        if batch.teacher_BY is None:
            return {"loss": ce}, logits_BY
        soft_BY = (batch.teacher_BY / self.temperature).softmax(-1)
        kd = functional.cross_entropy(logits_BY / self.temperature, soft_BY) * self.temperature**2
        return {
            "loss": (1 - self.distill_weight) * ce + self.distill_weight * kd,
            "ce": ce,
            "kd": kd,
        }, logits_BY


def run(
    network: nn.Module,
    images_BCHW: Tensor,
    arch: Arch | None,
    *,
    want: Sequence[str] | None = None,
    side: int = 0,
) -> Any:
    """Logits (B, Y): of `arch` in a Supernet, or of a plain network when `arch` is None.

    With `want` the outputs of these names, from a Supernet or a Model. `side` is a weight set of the
    Supernet's several.
    """
    given = (images_BCHW,) if arch is None else (images_BCHW, arch)
    options: dict[str, Any] = {} if want is None else {"want": want}
    return network(*given, **options, **({"side": side} if side else {}))
