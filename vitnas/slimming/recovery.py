"""Recovery: a slimmed network learns to answer as the network that it was cut out of, on any images of the kind.

It is trained by the ordinary loop, so with checkpoints. It never ends worse: the network is scored on held-out images
before and behind, and the better of both is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.model import Model
from vitnas.model.features import stage_starts
from vitnas.model.outputs import output_names
from vitnas.runs import RunFile
from vitnas.sample import Fixed
from vitnas.slimming.agreement import Standing, standings
from vitnas.train import (
    Batch,
    Classification,
    Distillation,
    Features,
    NonFiniteLossError,
    Soft,
    Task,
    Teacher,
    TrainConfig,
    fit,
)
from vitnas.train.task import Outputs

RECOVERY = TrainConfig(epochs=5, lr=1e-4, warmup_epochs=0.5, weight_decay=0.0, clip_grad=1.0, monitor_every=0)
"""Trained weights that were folded move little."""


@dataclass(frozen=True, kw_only=True)
class Recovery(RunFile):
    """What recovery did.

    Args:
        is_better: the trained network is kept; else the one before.
        problem: what ended the training early, if anything.
    """

    FILE = "recovery.json"
    COMMAND = "vitnas slim"

    before: Standing
    after: Standing
    is_better: bool
    steps: int
    seconds: float
    problem: str = ""

    def __str__(self) -> str:
        n = self.before.agreement.n
        told = f"{self.before} before, {self.after} behind {self.steps} steps ({n} held-out images)"
        if self.problem:
            return f"recovery failed ({self.problem}); the network from before it is kept"
        if self.is_better:
            return f"recovery: {told}"
        return f"recovery did not help: {told}; the network from before it is kept"


def recover(
    model: nn.Module,
    original: nn.Module,
    batches: Any,
    holdout: Iterable[tuple[Tensor, Tensor]],
    *,
    config: TrainConfig = RECOVERY,
    labels: bool = False,
    task: Distillation | None = None,
    **options: Any,
) -> Recovery:
    """Train `model` in place to answer as `original`; what it was before comes back if that was better on `holdout`.

    Args:
        batches: as `fit` takes them.
        labels: learn from the labels too, and judge by accuracy; else they are not looked at.
        task: what is learned; by default `recovery_task`.
        options: others of `fit` (folder, stage, progress, engine, seed, hooks, ...). With a folder, a training that was
            killed goes on, bit for bit; `model` is then given as it was before.

    Raises:
        UserError: networks of other classes, or options that do not fit.
    """
    known = copy.deepcopy(model.state_dict())
    before = standing(model, original, holdout, labels=labels)
    task = task or recovery_task(model, original, labels=labels)
    problem, steps, seconds = "", 0, 0.0
    try:
        fitted = fit(model, task, Fixed(), batches, config=config, teacher=Teacher(original), **options)
    except NonFiniteLossError as error:
        after, problem = before, str(error)
    else:
        model.load_state_dict(fitted.network.state_dict())
        after, steps, seconds = (
            standing(model, original, holdout, labels=labels),
            fitted.steps,
            fitted.seconds,
        )
    is_better = after.key > before.key
    if not is_better:
        model.load_state_dict(known)
    model.eval()
    return Recovery(
        before=before, after=after, is_better=is_better, steps=steps, seconds=seconds, problem=problem
    )


def standing(
    model: nn.Module, original: nn.Module, holdout: Iterable[tuple[Tensor, Tensor]], *, labels: bool
) -> Standing:
    """How `model` does on held-out images."""
    original.to(next(model.parameters()).device)
    return standings([model], original, holdout, labels=labels)[0]


def recovery_task(model: nn.Module, original: nn.Module, *, labels: bool) -> Distillation:
    """Learning all that `original` can teach: its logits where it has classes; its streams where `model` is as wide,
    else its final tokens through a projection."""
    widths = [getattr(network, "num_features", 0) for network in (model, original)]
    losses: dict[str, tuple[Task, float]] = {}
    if getattr(original, "num_classes", 0):
        losses["soft"] = (Soft(), 1.0)
    if widths[0] != widths[1]:
        losses["features"] = (Features(), 1.0)
    else:
        losses["streams"] = (Streams(same_places(model, original)), 1.0)
    return Distillation(losses=losses, labels=Classification() if labels else None)


def same_places(model: nn.Module, original: nn.Module) -> tuple[tuple[int, int], ...]:
    """(block of `model`, block of `original`) behind which the streams should be the same: the latter is the last in
    front of the block that `model` has next."""
    depth = sum(name.startswith("blocks.") for name in output_names(original))
    if not isinstance(model, Model) or not depth:
        return ()
    starts = stage_starts(original.arch) if isinstance(original, Model) else [0]
    slots = [
        start + slot for start, stage in zip(starts, model.arch.stages, strict=True) for slot in stage.slots
    ]
    behind = [slot - 1 for slot in (*slots[1:], depth)]
    return tuple((index, there) for index, there in enumerate(behind) if there < depth)


class Streams(Task):
    """The tokens between the blocks, entry by entry, of a network that is as wide as its teacher.

    The last tokens, behind the norm, by 1 - cosine similarity, and those behind each of `places` by their mean square
    difference as a share of the teacher's variance; added up. So every block has a gradient of its own: from the last
    tokens alone little is learned in the steps that a recovery has (LOG.md).
    """

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        self.places = [(f"blocks.{mine}", f"blocks.{theirs}") for mine, theirs in places]
        self.wants = ("tokens", "keep?", *(mine for mine, _ in self.places))
        self.wants_taught = ("tokens", *dict.fromkeys(theirs for _, theirs in self.places))

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        keep_BP = outputs["keep"][:, -1].detach() if "keep" in outputs else None
        mine, theirs = outputs["tokens"].float(), taught["tokens"].float()
        with torch.autocast(mine.device.type, enabled=False):
            loss_BN = 1 - functional.cosine_similarity(mine, theirs, dim=-1)
            losses = {"tokens": _mean_of_kept(loss_BN, keep_BP)}
            shares = [self._share(outputs[a].float(), taught[b].float(), keep_BP) for a, b in self.places]
        if shares:
            losses["blocks"] = torch.stack(shares).mean()
        return {"loss": sum(losses.values(), torch.zeros_like(loss_BN[0, 0])), **losses}

    @staticmethod
    def _share(mine: Tensor, theirs: Tensor, keep_BP: Tensor | None) -> Tensor:
        """Mean square difference of (B, N, D) tokens over the teacher's variance."""
        square_BN = (mine - theirs).square().mean(-1)
        variance = (theirs - theirs.mean((0, 1), keepdim=True)).square().mean()
        return _mean_of_kept(square_BN, keep_BP) / variance


def _mean_of_kept(loss_BN: Tensor, keep_BP: Tensor | None) -> Tensor:
    """The mean over tokens; where patches are dropped, over those that stay to the end and those in front of them."""
    if keep_BP is None or loss_BN.shape[1] < keep_BP.shape[1]:
        return loss_BN.mean()
    ones_BK = keep_BP.new_ones(len(keep_BP), loss_BN.shape[1] - keep_BP.shape[1])
    kept_BN = torch.cat([ones_BK, keep_BP], dim=1)
    return (loss_BN * kept_BN).sum() / kept_BN.sum()


def step_seconds(
    model: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    config: TrainConfig = RECOVERY,
    labels: bool = False,
    steps: int = 3,
    **options: Any,
) -> float:
    """Seconds of a step of recovery here, by a few of them on a copy of `model`."""
    copied, of_epoch = copy.deepcopy(model), max(1, batches.steps_per_epoch // config.accumulate)
    few = [replace(config, epochs=n / of_epoch, warmup_epochs=0, monitor_every=0) for n in (1, 1 + steps)]
    task = recovery_task(model, original, labels=labels)
    first, more = (
        fit(copied, task, Fixed(), batches, config=each, teacher=Teacher(original), **options).seconds
        for each in few
    )
    return max(more - first, 1e-6) / steps
