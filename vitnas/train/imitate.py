"""Winning back what a changed network lost: it learns to give the logits of the network that it was.

Plain distillation on any images of the kind, without labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.model.modes import evaluating
from vitnas.sample import Fixed
from vitnas.train.config import TrainConfig
from vitnas.train.loop import Fitted, fit
from vitnas.train.losses import Soft
from vitnas.train.teacher import Teacher

SHORT = TrainConfig(epochs=5, lr=1e-4, warmup_epochs=0.5, weight_decay=0.05, monitor_every=0)
"""A short recipe for a swapped model: trained weights move little, new ones have time to settle.

Small networks on few images take more: lr=1e-3 and 10 epochs of 18 steps won back seven eighths on the digits (LOG.md).
"""


def imitate(
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
    >>> imitate(swap_attention(model, "nystrom"), teacher, batches)  # doctest: +SKIP
    """
    return fit(
        model,
        Soft(temperature=temperature),
        Fixed(),
        loader,
        config=config,
        teacher=Teacher(teacher),
        **options,
    )


@torch.no_grad()
def agreement(
    model: nn.Module, teacher: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, int]:
    """Share of images that both networks give the same best class, and how many images that is of."""
    device, same, total = next(model.parameters()).device, 0, 0
    with evaluating(model, teacher.to(device)):
        for images_BCHW, _ in batches:
            images_BCHW = images_BCHW.to(device)
            same += int((model(images_BCHW).argmax(-1) == teacher(images_BCHW).argmax(-1)).sum())
            total += len(images_BCHW)
    return same / max(1, total), total
