"""Watching a pretraining: what the teacher says of held-out images, what its features are worth, and the alarm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vitnas.data import EvalBatches, has_one_class
from vitnas.data.images import Images
from vitnas.probing import Features, Look, effective_rank, features, knn_accuracy
from vitnas.sample import Moment
from vitnas.train import SelfTeacher
from vitnas.train.collapse import CollapseAlarm, CollapseError, Vitals
from vitnas.train.losses.esvit import entropies

# Images at most of a check, and of a look those asked for and the bank.
CHECKED, ASKED, KNOWN = 128, 1000, 2000
NEIGHBOURS, TEMPERATURE = 20, 0.07
BATCH = 128


class Watch:
    """A Hook. Every look and every check becomes a line of metrics.jsonl.

    Args:
        looks: how often nearest neighbours are asked, evenly over the training, first before it.
        advice: what to do, by a clause that says how the training died; None: it goes on whatever is seen.
        note: told of every look.
    """

    def __init__(
        self,
        teacher: SelfTeacher,
        train: Images,
        held: Images,
        *,
        out_dim: int,
        looks: int,
        advice: Callable[[str], str] | None,
        note: Callable[[str], object],
    ) -> None:
        self._teacher, self._looks, self._out_dim = teacher, looks, out_dim
        self._advice, self._note = advice, note
        self._few, self._asked = _batches(held, CHECKED), _batches(held, ASKED)
        self._known = _batches(train, KNOWN) if has_one_class(train.targets) else None
        self._alarm: CollapseAlarm | None = None
        self._kept: dict[str, Tensor] = {}

    def before(self, moment: Moment) -> Mapping[str, Any] | None:
        if self._alarm is None:
            self._alarm = CollapseAlarm(moment.steps, self._out_dim)
            self._alarm.restore(self._kept)
        alarm, step = self._alarm, moment.step
        looks = bool(self._looks) and step % max(1, moment.steps // self._looks) == 0
        if step % alarm.every and not looks:
            return None
        vitals = self.vitals(step)
        if step % alarm.every == 0 and (dead := alarm.hear(vitals)) and self._advice is not None:
            raise CollapseError(self._advice(f"at step {step} (epoch {moment.epoch:.1f}) {dead}"))
        if not looks:
            return asdict(vitals)
        found = self.look(vitals)
        self._note(f"epoch {moment.epoch:.1f}: {told(found)}")
        return {"step": step, **asdict(found)}

    def vitals(self, step: int) -> Vitals:
        """What the teacher says now."""
        teacher = self._teacher
        found = self._features(self._few)
        said = entropies(teacher.probabilities(found.values_ND).double())
        mean_K = teacher.logits(found.values_ND).mean(0)
        return Vitals(
            step=step,
            teacher_entropy=float(said["teacher_entropy"]),
            winner_entropy=float(said["winner_entropy"]),
            center_norm=float(teacher.centre().norm()),
            center_gap=float((mean_K - teacher.centre()).norm() / mean_K.norm().clamp_min(1e-9)),
            images=len(found.values_ND),
            rank=effective_rank(found.values_ND),
        )

    def look(self, vitals: Vitals) -> Look:
        """With what nearest neighbours find, where there are labels."""
        knn, n = None, 0
        if self._known is not None:
            asked = self._features(self._asked)
            knn = knn_accuracy(*self._features(self._known), *asked, k=NEIGHBOURS, temperature=TEMPERATURE)
            n = len(asked.targets)
        return Look(
            knn=knn,
            n=n,
            rank=vitals.rank,
            teacher_entropy=vitals.teacher_entropy,
            winner_entropy=vitals.winner_entropy,
            center_norm=vitals.center_norm,
        )

    def tensors(self) -> dict[str, Tensor]:
        return self._kept if self._alarm is None else self._alarm.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._kept, self._alarm = dict(tensors), None

    def _features(self, batches: EvalBatches) -> Features:
        return features(self._teacher.network, batches, arch=self._teacher.arch)


def _batches(images: Images, most: int) -> EvalBatches:
    """Up to so many, evenly spread: folders have their classes in order."""
    count = min(most, len(images))
    spread = torch.arange(count) * len(images) // count
    return EvalBatches(images.subset(spread.tolist()), batch_size=BATCH)


def told(found: Look) -> str:
    """A look in a line."""
    neighbours = "" if found.knn is None else f"k-NN {found.knn:.1%} of {found.n} held-out images, "
    return f"{neighbours}effective rank {found.rank:.1f}, answers tell images apart by {found.information:.2f} nats"
