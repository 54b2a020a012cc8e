"""What a step costs whose teacher's answers are read, beside one without a teacher and one whose teacher is run.

    python benchmarks/teacher_cache.py [rounds] [losses,mode ...]

A ViT of 10.5 M MACs learns 32-pixel images, 128 a batch, on one thread, from one of 136 M. The arms take turns, a few
steps each, in one process; a step is timed from its start to the start of the next, by the clock and by the processor
time of this process, which tells more on a busy machine. Given are medians over all steps of an arm, and over rounds of
the ratio to the arm without a teacher. With answers in memory a step costs what the losses cost by themselves.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vitnas.counting import count
from vitnas.data import Augment, TrainBatches, synthetic
from vitnas.model import Model, build
from vitnas.sample import Fixed, Moment
from vitnas.space import autoformer
from vitnas.train import ClassificationConfig, Teacher, TeacherConfig, TrainConfig, fit
from vitnas.train.task import At, TaskGiven

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
NONE = "no teacher"
ARMS = [NONE, *(f"{name}, {mode}" for name in [*LOSSES][1:] for mode in ("read", "in memory", "computed"))]


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


class InMemory(Teacher):
    """Says what it said to that batch before."""

    def __init__(self, network: Model, said: dict[int, dict[str, Tensor]]) -> None:
        super().__init__(network)
        self.said = said

    def answer(self, views: Sequence[Tensor], want: Sequence[str], at: At | None = None) -> dict[str, Tensor]:
        assert at is not None
        if at.place not in self.said:
            self.said[at.place] = super().answer(views, want)
        return self.said[at.place]


SAID: dict[str, dict[int, dict[str, Tensor]]] = {}


def steps_of(student: Model, teacher: Model, arm: str, folder: Path) -> Times:
    """Milliseconds of the steps of a short training but the first, by the clock and of the processor."""
    name, _, mode = arm.rpartition(", ") if arm != NONE else (arm, "", "")
    losses = LOSSES[name]
    augment = Augment(shift=0.125, hflip=0.5)
    loader = TrainBatches(IMAGES, augment, batch_size=BATCH, seed=0, epoch_views=1)
    labels = ClassificationConfig().build(TaskGiven(augment=augment, num_classes=CLASSES, grid=(8, 8)))
    config = TeacherConfig(
        network="here" if losses else None, losses=losses or ("soft",), cache=mode == "read"
    )
    taught_by = config.build(teacher, folder) if losses else None
    if mode == "in memory":
        taught_by = InMemory(teacher, SAID.setdefault(name, {}))
    clock = Clock()
    fit(
        student,
        config.task(labels),
        Fixed(),
        loader,
        config=TrainConfig(epochs=STEPS / loader.steps_per_epoch, monitor_every=0, checkpoint_minutes=60),
        teacher=taught_by,
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
    arms = [NONE, *sys.argv[2:]] if len(sys.argv) > 2 else ARMS
    found: dict[str, Times] = {arm: [[], []] for arm in arms}
    ratios: dict[str, Times] = {arm: [[], []] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        for arm in arms:
            if arm.endswith(("read", "memory")):  # for the first time they are computed
                steps_of(student, teacher, arm, Path(folder))
        for path in sorted(Path(folder).iterdir()):
            print(f"{path.name}: {path.stat().st_size / STEPS / BATCH / 1000:.2f} kB an image")
        for _ in range(rounds):
            of_round = {arm: steps_of(student, teacher, arm, Path(folder)) for arm in arms}
            for arm, times in of_round.items():
                for by, each in enumerate(times):
                    found[arm][by] += each
                    alone = statistics.median(of_round[NONE][by])
                    ratios[arm][by].append(statistics.median(each) / alone)
    for arm, times in found.items():
        print(arm)
        for by, name in enumerate(("clock", "processor")):
            low, high = min(ratios[arm][by]), max(ratios[arm][by])
            took, ratio = statistics.median(times[by]), statistics.median(ratios[arm][by])
            print(
                f"  {name}: {took:.0f} ms, {ratio:.3f} times a step without ({low:.3f} to {high:.3f}; "
                f"n = {rounds} rounds of {len(times[by]) // rounds} steps)"
            )


if __name__ == "__main__":
    main()
