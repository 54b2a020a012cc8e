"""Hard distillation (DeiT, arXiv 2012.12877, section 4; a variant of ViT-ResNAS): a teacher's decisions as labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.train.task import Batch, run


@dataclass(frozen=True, kw_only=True)
class HardDistillation:
    """Cross-entropy to the labels by the class token, and to the teacher's first choice by the distillation token.

    Without a distillation token both are by the class token.

    Attributes:
        teacher: a network with the same classes; it is put in evaluation mode and never trained.
        weight: share of the teacher's term; labels get the rest. Half and half in the papers.
        label_smoothing: for class numbers; mixed targets bring their own.
    """

    teacher: nn.Module
    weight: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UserError(f"weight is {self.weight}; it is a share from 0 to 1. Use 0.5.")
        self.teacher.eval().requires_grad_(False)

    def __call__(
        self, network: nn.Module, batch: Batch, arch: Arch | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        heads = run(network, batch.images_BCHW, arch, want=("head", "head_dist?"))
        self.teacher.to(batch.images_BCHW.device)
        with torch.no_grad():
            taught_B = self.teacher(batch.images_BCHW).argmax(-1)
        smoothing = self.label_smoothing if batch.targets.dim() == 1 else 0.0
        ce = functional.cross_entropy(heads["head"], batch.targets, label_smoothing=smoothing)
        kd = functional.cross_entropy(heads.get("head_dist", heads["head"]), taught_B)
        return {"loss": (1 - self.weight) * ce + self.weight * kd, "ce": ce, "kd": kd}, heads["head"]
