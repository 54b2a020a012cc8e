"""What a step costs whose teacher's answers are read, beside one without a teacher and one whose teacher is run.

    python benchmarks/teacher_cache.py [rounds]

A ViT of 10.5 M MACs learns 32-pixel images, 128 a batch, on one thread, from one of 136 M. The arms take turns, a few
steps each, in one process; a step is timed from its start to the start of the next, by the clock and by the processor
time of this process, which tells more on a busy machine. Given are medians over all steps of an arm, and over rounds of
the ratio to the arm without a teacher.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vitnas.counting import count
from vitnas.data import Augment, TrainBatches, synthetic
from vitnas.model import Model, build
from vitnas.sample import Fixed, Moment
from vitnas.space import autoformer
from vitnas.train import ClassificationConfig, TeacherConfig, TrainConfig, fit
from vitnas.train.task import TaskGiven

Times = list[list[float]]
STEPS, BATCH, CLASSES = 8, 128, 10
SPACE = autoformer(
    "micro", image_size=32, patch_size=4, num_classes=CLASSES, embed_dims=(44, 192), depths=(5, 6), num_heads=(2, 3),
    mlp_ratios=(4.0,), head_dim=16,
)  # fmt: skip
LOSSES: Mapping[str, tuple[str, ...]] = {
    "no teacher": (),
    "soft": ("soft",),
    "features": ("features",),
    "soft, features": ("soft", "features"),
    "soft, manifold": ("soft", "manifold"),
}
ARMS = [("no teacher", False)] + [(name, cache) for name in [*LOSSES][1:] for cache in (True, False)]


@dataclass
class Clock:
    """A Hook for `fit` that notes when each step begins."""

    at: list[tuple[float, float]] = field(default_factory=list)

    def before(self, moment: Moment) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """There is nothing to take back."""


def steps_of(student: Model, teacher: Model, losses: tuple[str, ...], folder: Path | None) -> Times:
    """Milliseconds of the steps of a short training but the first, by the clock and of the processor."""
    augment = Augment(shift=0.125, hflip=0.5)
    loader = TrainBatches(IMAGES, augment, batch_size=BATCH, seed=0, epoch_views=1)
    labels = ClassificationConfig().build(TaskGiven(augment=augment, num_classes=CLASSES, grid=(8, 8)))
    config = TeacherConfig(network="here" if losses else None, losses=losses or ("soft",), cache=bool(folder))
    clock = Clock()
    fit(
        student,
        config.task(labels),
        Fixed(),
        loader,
        config=TrainConfig(epochs=STEPS / loader.steps_per_epoch, monitor_every=0, checkpoint_minutes=60),
        teacher=config.build(teacher, folder or Path()) if losses else None,
        hooks=[clock],
    )
    return [
        [1000 * (end[by] - start[by]) for start, end in zip(clock.at[1:], clock.at[2:], strict=False)]
        for by in (0, 1)
    ]


IMAGES = synthetic(num_classes=CLASSES, image_size=32, n=1440, seed=0).train


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    student, teacher = (
        build(arch, generator=torch.Generator().manual_seed(0))
        for arch in (SPACE.smallest(), SPACE.largest())
    )
    macs = [f"{count(model.arch).macs / 1e6:.1f} M MACs" for model in (student, teacher)]
    print(f"student {macs[0]}, teacher {macs[1]}, batch {BATCH}, {torch.get_num_threads()} thread")
    found: dict[tuple[str, bool], Times] = {arm: [[], []] for arm in ARMS}
    ratios: dict[tuple[str, bool], Times] = {arm: [[], []] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for name in [*LOSSES][1:]:
            steps_of(student, teacher, LOSSES[name], Path(folder))  # writes the answers
        for path in sorted(Path(folder).iterdir()):
            print(f"{path.name}: {path.stat().st_size / len(IMAGES) / 1000:.2f} kB an image")
        for _ in range(rounds):
            of_round = {
                arm: steps_of(student, teacher, LOSSES[arm[0]], Path(folder) if arm[1] else None)
                for arm in ARMS
            }
            for arm, times in of_round.items():
                for by, each in enumerate(times):
                    found[arm][by] += each
                    alone = statistics.median(of_round[ARMS[0]][by])
                    ratios[arm][by].append(statistics.median(each) / alone)
    for arm, times in found.items():
        print(arm[0] if arm == ARMS[0] else f"{arm[0]}, {'read' if arm[1] else 'computed'}")
        for by, name in enumerate(("clock", "processor")):
            low, high = min(ratios[arm][by]), max(ratios[arm][by])
            took, ratio = statistics.median(times[by]), statistics.median(ratios[arm][by])
            print(
                f"  {name}: {took:.0f} ms, {ratio:.3f} times a step without ({low:.3f} to {high:.3f}; "
                f"n = {rounds} rounds of {len(times[by]) // rounds} steps)"
            )


if __name__ == "__main__":
    main()
