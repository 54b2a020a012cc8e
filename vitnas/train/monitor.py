"""Watching a Supernet learn: the smallest, middle, largest and a few random Archs on held-out images.

A Supernet that has not converged ranks Archs badly; `convergence_warning` says so in words.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.data import EvalBatches, require_not_test
from vitnas.space import Space
from vitnas.train.evaluate import Z95, evaluate
from vitnas.train.metrics import MonitoredArch

STILL_RISING = 0.01  # mean accuracy gained over the last third of the record that counts as not converged
LEAST_EXPLAINED = 0.05  # R^2 of Archs that have learned anything


@dataclass(frozen=True)
class Monitor:
    """Evaluates a fixed set of Archs whenever it is called.

    Args:
        archs: (role, Arch) pairs; (role, None) for a Model by itself.
        batches: held-out images; the test split is refused.
    """

    archs: tuple[tuple[str, Arch | None], ...]
    batches: EvalBatches

    def __post_init__(self) -> None:
        require_not_test(self.batches.images, "monitoring")

    @classmethod
    def of(cls, space: Space, batches: EvalBatches, *, num_random: int = 3, seed: int = 0) -> Monitor:
        """The smallest, middle and largest Arch of `space` and `num_random` random ones."""
        rng = random.Random(f"monitor/{seed}")
        fixed = (("smallest", space.smallest()), ("middle", space.middle()), ("largest", space.largest()))
        return cls((*fixed, *(("random", space.sample(rng)) for _ in range(num_random))), batches)

    def __call__(self, network: nn.Module) -> tuple[MonitoredArch, ...]:
        """Evaluate every Arch."""
        found = []
        for role, arch in self.archs:
            score = evaluate(network, self.batches, arch)
            own: Arch = network.arch if arch is None else arch  # type: ignore[assignment]
            found.append(
                MonitoredArch(
                    role=role,
                    arch_id=own.id,
                    macs=count(own).macs,
                    accuracy=score.accuracy,
                    loss=score.loss,
                    n=score.n,
                    error=score.error,
                )
            )
        return tuple(found)


def convergence_warning(history: Sequence[Sequence[MonitoredArch]], num_classes: int) -> str | None:
    """Why the Supernet should not be trusted yet, or None.

    Args:
        history: what the Monitor found over time.
        num_classes: for the accuracy of guessing.
    """
    if not history:
        return None
    means = [sum(arch.accuracy for arch in archs) / len(archs) for archs in history]
    tells = history[-1][0].error is not None
    what = "mean R²" if tells else "mean accuracy"
    if tells and means[-1] < LEAST_EXPLAINED:
        return (
            f"The supernet has not learned: its Archs reach an R² of {means[-1]:.2f} on average, always saying the "
            "mean gives 0. Train longer or change the learning rate."
        )
    if not tells and means[-1] < 1.5 / num_classes:
        return (
            f"The supernet has not learned: its Archs reach {means[-1]:.1%} on average, guessing gives "
            f"{1 / num_classes:.1%}. Train longer or change the learning rate."
        )
    if len(means) >= 4:
        gained = means[-1] - means[-1 - max(1, len(means) // 3)]
        if gained > STILL_RISING:
            return (
                f"The supernet has not converged: {what} still rose by {gained:.1%} over the last third of the "
                "evaluations. Its ranking of Archs may change with more epochs."
            )
    last = {arch.role: arch for arch in history[-1]}
    if {"largest", "smallest"} <= {*last} and _is_worse(last["largest"], last["smallest"]):
        return (
            f"The supernet is unbalanced: {'R² of ' * tells}the largest Arch reaches {last['largest'].accuracy:.1%}, "
            f"the smallest {last['smallest'].accuracy:.1%}. Train longer, or use the sandwich sampler."
        )
    return None


def _is_worse(large: MonitoredArch, small: MonitoredArch) -> bool:
    """Whether `large` is behind by a point, and by more than so few images make by chance."""
    errors = (
        each.error or math.sqrt(each.accuracy * (1 - each.accuracy) / each.n) for each in (large, small)
    )
    noise = Z95 * math.hypot(*errors)
    return large.accuracy < small.accuracy - max(0.01, noise)
