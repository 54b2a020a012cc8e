"""Accuracy of a network, or of one Arch of a Supernet."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.data import require_labels
from vitnas.model.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Score:
    """Top-1 and top-5 accuracy in [0, 1], mean cross-entropy, and the number of images they are of."""

    accuracy: float
    top5: float
    loss: float
    n: int


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    arch: Arch | None = None,
    *,
    device: torch.device | str | None = None,
) -> Score:
    """Score `network` (as `arch`) on all `batches`, in evaluation mode; the training mode is restored.

    Where a Supernet has several weight sets per Arch (bilateral sharing), every number is the mean over them, as
    ViTAS scores: all of them were trained, and which one extraction gives is no merit of the Arch. That takes as many
    passes.

    Args:
        batches: (B, C, H, W) images and (B,) class numbers.
        device: where the network is; found from its parameters when None.

    Raises:
        UserError: images without labels.
    """
    target_device = torch.device(device) if device is not None else next(network.parameters()).device
    sides = 1 if arch is None else int(getattr(network, "sides", 1))
    totals = torch.zeros(4, dtype=torch.float64)
    with evaluating(network):
        for images_BCHW, targets_B in batches:
            require_labels(targets_B, "accuracy")
            images_BCHW, targets_B = images_BCHW.to(target_device), targets_B.to(target_device)
            for side in range(sides):
                given = () if arch is None else (arch,)
                logits_BY = network(images_BCHW, *given, **({"side": side} if side else {})).float()
                best = logits_BY.topk(min(5, logits_BY.shape[1]), dim=1).indices == targets_B[:, None]
                loss = functional.cross_entropy(logits_BY, targets_B, reduction="sum")
                sums = torch.stack([best[:, 0].sum(), best.sum(), loss, loss.new_tensor(len(targets_B))])
                totals += sums.double().cpu()
    top1, top5, total_loss, n = totals.tolist()
    return Score(accuracy=top1 / n, top5=top5 / n, loss=total_loss / n, n=int(n) // sides)


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of the share `correct / n`, as fractions.

    Raises:
        ValueError: `n` is below 1, or `correct` is not in 0..n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(
            f"correct is {correct} of n = {n}; an interval needs 0 <= correct <= n and n >= 1. Count again."
        )
    share, z2 = correct / n, z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
