"""What a teacher's losses bring a narrow student with few images: handwritten digits, minutes on one core.

    python benchmarks/teacher.py [seeds] [arm ...]

A ViT of width 64 learns 1,190 digits; one of width 16 learns 400 of them, by labels alone and with each of the
teacher's losses beside. All see the same number of images; accuracy is on the other 597 digits.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import torch
from sklearn.datasets import load_digits

from vitnas.data import Augment, Data, DataConfig, TrainBatches
from vitnas.model import Model, build
from vitnas.sample import Fixed
from vitnas.space import autoformer
from vitnas.train import ClassificationConfig, Teacher, TeacherConfig, TrainConfig, fit
from vitnas.train.task import TaskGiven

STEPS, BATCH, FEW, MANY, HELD = 1000, 50, 400, 1200, 597
SPACE = autoformer(
    "micro", image_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dims=(16, 64), depths=(3, 4),
    num_heads=(1, 4), mlp_ratios=(2.0,), head_dim=16,
)  # fmt: skip
ARMS: dict[str, tuple[str, ...]] = {
    "labels alone": (),
    "soft": ("soft",),
    "features": ("features",),
    "soft, features": ("soft", "features"),
    "manifold": ("manifold",),
    "soft, manifold": ("soft", "manifold"),
}


def train(model: Model, data: Data, losses: tuple[str, ...], teacher: Model | None, seed: int) -> float:
    """Train `model` in place; returns the seconds."""
    augment = Augment(rotate=10, zoom=(0.9, 1.1))
    batches = TrainBatches(data.train, augment, batch_size=BATCH, seed=seed)
    config = TrainConfig(
        epochs=STEPS / batches.steps_per_epoch,
        lr=4e-3,
        warmup_epochs=2,
        monitor_every=0,
        checkpoint_minutes=60,
    )
    labels = ClassificationConfig().build(TaskGiven(augment=augment, num_classes=10, grid=(4, 4)))
    task = TeacherConfig(network="here", losses=losses).task(labels) if losses else labels
    taught_by = Teacher(teacher) if losses and teacher is not None else None
    start = time.monotonic()
    fit(model, task, Fixed(), batches, config=config, teacher=taught_by, seed=seed)
    return time.monotonic() - start


def main() -> None:
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    arms = {name: ARMS[name] for name in sys.argv[2:] or ARMS}
    digits = load_digits()
    pixels, targets = (digits.images / 16 * 255).astype(np.uint8), digits.target
    found: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}

    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(pixels))
        held, rest = order[:HELD], order[HELD:]

        def data_of(count: int, held: np.ndarray = held, rest: np.ndarray = rest) -> Data:
            config = DataConfig(augment="none", holdout=10)
            chosen = rest[: count + 10]
            return Data.from_arrays(
                train=(pixels[chosen], targets[chosen]), test=(pixels[held], targets[held]), config=config
            )

        few, many = data_of(FEW), data_of(MANY - 10)
        images = few.train.form.normalise(torch.as_tensor(pixels[held])[:, None])

        def score(model: Model, images: torch.Tensor = images, held: np.ndarray = held) -> float:
            with torch.no_grad():
                return float(
                    (model.eval()(images).argmax(-1) == torch.as_tensor(targets[held])).float().mean()
                )

        teacher = build(SPACE.largest(), generator=torch.Generator().manual_seed(seed))
        train(teacher, many, (), None, seed)
        found.setdefault("the teacher", []).append(score(teacher))
        for name, losses in arms.items():
            student = build(SPACE.smallest(), generator=torch.Generator().manual_seed(100 + seed))
            seconds.setdefault(name, []).append(train(student, few, losses, teacher, seed))
            found.setdefault(name, []).append(score(student))
            print(seed, name, f"{found[name][-1]:.1%}", flush=True)
    for name, scores in found.items():
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        took = f", {statistics.mean(seconds[name]):.1f} s" if name in seconds else ""
        each = ", ".join(f"{value:.1%}" for value in scores)
        print(f"{name}: {statistics.mean(scores):.1%} +- {spread:.1%} ({each}; n = {len(scores)}){took}")


if __name__ == "__main__":
    main()
