"""Winning back what a changed network lost: it learns to give the logits of the network that it was.

Plain distillation (Hinton et al., arXiv 1503.02531) on any images of the kind, without labels: the soft cross-entropy
to the teacher's logits, scaled by the temperature squared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.sample import Fixed
from vitnas.train.config import TrainConfig
from vitnas.train.loop import Fitted, fit
from vitnas.train.task import Batch, run

SHORT = TrainConfig(epochs=5, lr=1e-4, warmup_epochs=0.5, weight_decay=0.05, monitor_every=0)
"""A short recipe for a swapped model: trained weights move little, new ones have time to settle.

Small networks on few images take more: lr=1e-3 and 10 epochs of 18 steps won back seven eighths on the digits (LOG.md).
"""


@dataclass(frozen=True)
class Imitation:
    """Task: the soft cross-entropy to the logits of `teacher`, which moves to the images and stays as it is."""

    teacher: nn.Module
    temperature: float = 1.0

    def __call__(
        self, network: nn.Module, batch: Batch, arch: Arch | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        self.teacher.to(batch.images_BCHW.device)  # `fit` moves the network that learns, and no other
        with torch.no_grad():
            wanted_BY = self.teacher(batch.images_BCHW)
        logits_BY = run(network, batch.images_BCHW, arch)
        soft_BY = (wanted_BY / self.temperature).softmax(-1)
        loss = functional.cross_entropy(logits_BY / self.temperature, soft_BY) * self.temperature**2
        return {"loss": loss}, logits_BY


def recover(
    model: nn.Module,
    teacher: nn.Module,
    loader: Any,
    *,
    config: TrainConfig = SHORT,
    temperature: float = 1.0,
    **options: Any,
) -> Fitted:
    """Train `model` in place to give what `teacher` gives, for example after `swap_attention`.

    Args:
        loader: as `fit` takes it; labels are not looked at.
        options: others of `fit` (folder, progress, engine, seed, ...).

    >>> teacher = copy.deepcopy(model).eval()               # doctest: +SKIP
    >>> recover(swap_attention(model, "nystrom"), teacher, batches)  # doctest: +SKIP
    """
    modes = [(module, module.training) for module in teacher.modules()]
    teacher.eval()
    try:
        return fit(model, Imitation(teacher, temperature), Fixed(), loader, config=config, **options)
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def agreement(
    model: nn.Module, teacher: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, int]:
    """Share of images that both networks give the same best class, and how many images that is of."""
    modes = [(module, module.training) for net in (model, teacher) for module in net.modules()]
    device = next(model.parameters()).device
    model.eval(), teacher.to(device).eval()
    same = total = 0
    for images_BCHW, _ in batches:
        images_BCHW = images_BCHW.to(device)
        same += int((model(images_BCHW).argmax(-1) == teacher(images_BCHW).argmax(-1)).sum())
        total += len(images_BCHW)
    for module, training in modes:
        module.training = training
    return same / max(1, total), total
