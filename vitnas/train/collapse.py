"""Collapse of self-distillation: a teacher that says the same of every image, noticed by what it says.

The loss does not show it: it stands still at a number that means nothing by itself (ln K where all prototypes are
alike, 0 where one takes all). What a teacher's answers say of images does: the mutual information between image and
prototype, H(mean answer) - mean H(answer), is 0 nats exactly when all answers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from vitnas.errors import UserError

TWENTIETH = 20  # of a training's steps: how soon a dead one is stopped
CHECKS = 8  # in a twentieth
LEAST_STEPS = 24  # a shorter while is no evidence
NOTHING = 0.01  # nats: answers that differ by less do not tell images apart
ROUNDING = 1e-9  # nats
ONE = math.log(1.1)  # nats: entropy of what is shared among no more than 1.1


class CollapseError(UserError):
    """The teacher says the same of every image, and more training will not change that."""


@dataclass(frozen=True)
class Vitals:
    """What a teacher says of some images it does not learn from.

    Attributes:
        step: that it is before.
        teacher_entropy, winner_entropy: mean entropy of its answers, and entropy of their mean, in nats.
        center_norm: length of the centre of its logits.
        center_gap: from the mean of its logits to their centre, as a share of that mean's length.
        images: how many.
        rank: effective rank of its features.
    """

    step: int
    teacher_entropy: float
    winner_entropy: float
    center_norm: float
    center_gap: float
    images: float
    rank: float

    @property
    def information(self) -> float:
        """How much an answer says about which image it is of, in nats."""
        return self.winner_entropy - self.teacher_entropy


class CollapseAlarm:
    """Hears a training's vitals, and says when it is dead.

    Dead is a teacher whose answers, or whose features, are the same for all images and do not begin to differ, for half
    of a twentieth of the steps. So whatever is dead before the first fortieth is over is stopped within a twentieth. A
    teacher passes through little information when it begins, and then differs more and more.
    As good as dead is a teacher whose logits nothing centres, once its answers run together onto fewer prototypes than
    the root of the number of images.

    Args:
        steps: of the training.
        out_dim: prototypes (K).
    """

    def __init__(self, steps: int, out_dim: int) -> None:
        self.every = max(1, steps // (TWENTIETH * CHECKS))
        self._least = max(LEAST_STEPS, math.ceil(steps / (2 * TWENTIETH)))
        self._most_entropy = math.log(out_dim)
        self._heard: list[Vitals] = []

    def hear(self, vitals: Vitals) -> str | None:
        """Why the training is dead, in a clause; None while it lives."""
        self._heard.append(vitals)
        answers = self._while([each.information < NOTHING for each in self._heard])
        if answers and not _rises([each.information for each in answers]):
            return self._same_answers(vitals)
        uncentred = self._while([each.center_gap > 0.5 for each in self._heard])
        if uncentred and vitals.winner_entropy < math.log(vitals.images) / 2:
            return (
                f"the centre of its logits is not where they are (length {vitals.center_norm:.2f}), and its answers "
                f"run together ({math.exp(vitals.winner_entropy):.1f} prototypes for {vitals.images:.0f} images)"
            )
        features = self._while([math.log(max(1.0, each.rank)) < ONE for each in self._heard])
        if features and not _rises([each.rank for each in features]):
            return f"features of different images lie on one line (effective rank {vitals.rank:.2f})"
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What was heard, for a checkpoint."""
        return {"heard": torch.tensor([astuple(each) for each in self._heard], dtype=torch.float64)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        rows = tensors["heard"].tolist() if "heard" in tensors else []
        self._heard = [Vitals(int(step), *others) for step, *others in rows]

    def _while(self, so: Sequence[bool]) -> list[Vitals]:
        """The vitals since which it has been so, where that is long enough; else none."""
        begin = len(so)
        while begin and so[begin - 1]:
            begin -= 1
        found = self._heard[begin:]
        return found if found and found[-1].step - found[0].step >= self._least else []

    def _same_answers(self, vitals: Vitals) -> str:
        told = f"it says the same of all images ({max(0.0, vitals.information):.4f} nats apart)"
        if vitals.winner_entropy < math.log(2):
            return f"{told}: one prototype takes all (entropy {vitals.winner_entropy:.2f} nats)"
        if vitals.teacher_entropy > 0.9 * self._most_entropy:
            return (
                f"{told}: all prototypes are alike (entropy {vitals.teacher_entropy:.2f} of at most "
                f"{self._most_entropy:.2f} nats)"
            )
        return told


def _rises(values: Sequence[float]) -> bool:
    """The later half is a tenth higher than the earlier one, on average: more than noise."""
    half, seen = len(values) // 2, [max(ROUNDING, value) for value in values]
    return half > 0 and sum(seen[-half:]) > 1.1 * sum(seen[:half])
