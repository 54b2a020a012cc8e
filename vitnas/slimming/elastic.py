"""An elastic network: a Supernet that starts as a trained network, and learns from it to be good at every size."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitnas.sample import Sandwich
from vitnas.slimming.recovery import RECOVERY, Streams
from vitnas.space import Space
from vitnas.supernet import Supernet
from vitnas.train import Classification, Distillation, Features, Fitted, Soft, Task, Teacher, TrainConfig, fit


def train_elastic(
    supernet: Supernet,
    original: nn.Module,
    batches: Any,
    *,
    config: TrainConfig = RECOVERY,
    labels: bool = False,
    num_random: int = 2,
    **options: Any,
) -> Fitted:
    """Train `supernet` in place by the sandwich rule, with `original` as the teacher of every Arch.

    Args:
        supernet: of `ordered`, which is the original at its largest.
        original: with its channels in the supernet's order.
        batches: as `fit` takes them.
        labels: learn from the labels too.
        num_random: Archs of a step beside the largest and the smallest.
        options: others of `fit` (folder, stage, progress, engine, seed, hooks, ...).
    """
    sampler = Sandwich(supernet.space, num_random=num_random, distill=False)
    task = elastic_task(supernet.space, original, labels=labels)
    return fit(supernet, task, sampler, batches, config=config, teacher=Teacher(original), **options)


def elastic_task(space: Space, original: nn.Module, *, labels: bool) -> Distillation:
    """What every Arch of `space` can learn from `original`: its logits where it has classes, and its streams where all
    Archs are as wide, behind every block where none can go; else its final tokens through a projection."""
    widths = {option for gene in space.genes if gene.field == "embed_dim" for option in gene.options}
    losses: dict[str, tuple[Task, float]] = {}
    if getattr(original, "num_classes", 0):
        losses["soft"] = (Soft(), 1.0)
    if len(widths) > 1:
        losses["features"] = (Features(), 1.0)
    else:
        some_go = any(gene.field in ("exists", "depth") for gene in space.genes)
        depth = 0 if some_go else space.largest().depth
        losses["streams"] = (Streams([(index, index) for index in range(depth)]), 1.0)
    return Distillation(losses=losses, labels=Classification() if labels else None)
