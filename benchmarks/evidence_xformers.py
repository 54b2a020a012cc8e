"""Vision X-formers on CIFAR-10 under a clean protocol: accuracy, true parameters, MACs, measured memory and speed.

    python benchmarks/evidence_xformers.py --dataset hfds//path/to/cifar10-jpeg [--models vit vip vin ...] [--epochs 2]
        [--train-images 4000] [--device cpu] [--out FILE.csv]

The paper trains 40 to 150 epochs on a GPU, picks the best epoch on the test split and mostly leaves dropout on while
testing. Here: AdamW lr 1e-3, weight decay 0.01, no schedule, no warm-up, no augmentation, as the paper; a holdout split
for looking; the test split read once, in evaluation mode, after the last epoch. On a CPU a few epochs of a part
of the images say only how the variants compare at that little training, and the printed header says so.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitnas.counting import count
from vitnas.data import Augment, DataConfig, EvalBatches, open_data
from vitnas.measure.environment import environment
from vitnas.measure.memory import peak_activation_bytes
from vitnas.model import build
from vitnas.model.vision_xformers import VISION_XFORMERS
from vitnas.sample import Fixed
from vitnas.train import Classification, Engine, TrainConfig, evaluate, fit

MODELS = (
    "vit", "vip", "vil", "vin", "fnet", "vin_rope", "hybrid_vit", "hybrid_vin", "hybrid_vin_rope", "cct", "ccn", "ccp"
)  # fmt: skip
PAPER = {
    "vin": 65.06,
    "hybrid_vin": 75.26,
    "ccn": 83.36,
    "ccp": 82.2,
}  # top-1, where the facts at hand have it


class Part:
    """The first `n` train images as batches in an order that changes with the epoch."""

    def __init__(self, images: Any, n: int, batch_size: int) -> None:
        loaded = [pair for pair in EvalBatches(images, batch_size=500)]
        self.x = torch.cat([x for x, _ in loaded])[:n]
        self.y = torch.cat([y for _, y in loaded])[:n]
        self.batch_size, self.epoch = batch_size, 0

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch))
        self.epoch += 1
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size]
            yield self.x[index], self.y[index]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="torch/cifar10")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--train-images", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--patch-size", type=int, default=1, help="2 makes a quarter of the tokens, for a CPU"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    half = (0.5, 0.5, 0.5)
    data = open_data(
        DataConfig(
            dataset=options.dataset, image_size=32, mean=half, std=half, holdout=5000, augment=Augment()
        )
    )
    train = Part(data.train, options.train_images, options.batch_size)
    reads = (options.out or Path("evidence_xformers.csv")).with_suffix(".reads.json")
    holdout, test = (EvalBatches(part, batch_size=250) for part in (data.holdout, data.open_test(reads)))
    found = environment()
    print(
        f"{options.epochs:g} epochs of {len(train.x)} images, patch {options.patch_size}, seed {options.seed}, "
        f"{found.get('cpu', '')}, torch {torch.__version__}: NOT the paper's 40 to 150 epochs of 50,000"
    )
    rows = []
    for name in options.models:
        arch = replace(VISION_XFORMERS[f"vix_{name}"], image_size=32, num_classes=10)
        compact = name in ("cct", "ccn", "ccp")
        arch = arch if compact else replace(arch, patch_size=options.patch_size)
        model = build(arch, generator=torch.Generator().manual_seed(options.seed))
        config = TrainConfig(
            epochs=options.epochs, lr=1e-3, weight_decay=0.01, schedule="none", warmup_epochs=0, clip_grad=None,
            monitor_every=0,
        )  # fmt: skip
        train.epoch, started = 0, time.perf_counter()
        fit(
            model, Classification(), Fixed(), train, config=config, seed=options.seed,
            engine=Engine(precision="fp32", cpu=options.device == "cpu"),
        )  # fmt: skip
        seconds, cost = time.perf_counter() - started, count(arch)
        score, held = evaluate(model, test), evaluate(model, holdout)
        rows.append(
            {
                "model": f"vix_{name}",
                "test_accuracy": round(score.accuracy, 4),
                "n_test": score.n,
                "holdout_accuracy": round(held.accuracy, 4),
                "paper_top1_percent": PAPER.get(name, ""),
                "params": cost.params,
                "macs": cost.macs,
                "peak_activation_bytes": peak_activation_bytes(model, (3, 32, 32)),
                "train_images_per_s": round(options.epochs * len(train) * options.batch_size / seconds, 1),
                "epochs": options.epochs,
                "train_images": len(train.x),
                "patch_size": arch.patch_size,
                "seed": options.seed,
            }
        )
        print(rows[-1], flush=True)
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
