"""Training on real images: images a second of a Model, of the same Arch in a Supernet, and of a fresh Arch each step.

With `--compile` also of the Model as `torch.compile` makes it, which a Supernet cannot be: each Arch is a graph of its
own.

    python benchmarks/throughput.py --dataset hfds//path/to/cifar10-jpeg [--device cuda] [--out throughput.csv]

Each is `vitnas.fit` on the same images, timed from its second epoch on, so that workers and kernels are warm. The
accuracy on the holdout (of the middle Arch) shows that something was learned.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.data import Augment, DataConfig, EvalBatches, Images, TrainBatches, open_data
from vitnas.model import build
from vitnas.sample import Fixed, Sampler, Uniform
from vitnas.space import autoformer
from vitnas.supernet import Supernet
from vitnas.train import Classification, Engine, TrainConfig, evaluate, fit


@dataclass
class Timed:
    """Batches that note when they were asked for."""

    batches: TrainBatches
    times: list[float] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for pair in self.batches.from_step(step):
            self.times.append(time.perf_counter())
            yield pair


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--size", default="tiny", help="of the AutoFormer space")
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--train-images", type=int, default=20000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("throughput.csv"))
    options = parser.parse_args()
    half = (0.5, 0.5, 0.5)
    data = open_data(DataConfig(dataset=options.dataset, image_size=32, mean=half, std=half, holdout=2000))
    images = data.train.subset(list(range(min(options.train_images, len(data.train)))))
    space = autoformer(options.size, image_size=32, patch_size=options.patch_size, num_classes=10)
    arch = space.middle()
    with open(options.out, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            "what,images_per_s,holdout_accuracy,n,steps,peak_mib,precision,device,torch".split(",")
        )
        kinds: dict[str, tuple[nn.Module, Sampler, Arch | None]] = {
            "model": (build(arch), Fixed(), None),
            "supernet, the same Arch": (Supernet(space), Fixed(arch), arch),
            "supernet, a fresh Arch each step": (Supernet(space), Uniform(space), arch),
        }
        if options.compile:
            kinds["model, compiled"] = build(arch), Fixed(), None
            kinds["model, compiled"][0].compile()
        for what, (network, sampler, scored) in kinds.items():
            row = [
                what,
                *train(network, sampler, scored, images, EvalBatches(data.holdout, batch_size=256), options),
            ]
            print(*row, flush=True)
            writer.writerow([*row, options.precision, options.device, torch.__version__])
            stream.flush()


def train(
    network: nn.Module,
    sampler: Sampler,
    arch: Arch | None,
    images: Images,
    holdout: EvalBatches,
    options: argparse.Namespace,
) -> list[object]:
    """Images a second, accuracy on the holdout with its n, steps, and peak memory."""
    batches = Timed(
        TrainBatches(images, Augment(), batch_size=options.batch, seed=0, workers=options.workers)
    )
    config = TrainConfig(
        epochs=options.epochs, lr=1e-3, warmup_epochs=0, monitor_every=0, precision=options.precision
    )
    engine = Engine(precision=options.precision, cpu=options.device == "cpu")
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    fitted = fit(network, Classification(), sampler, batches, config=config, engine=engine)
    seconds = time.perf_counter() - batches.times[batches.steps_per_epoch]
    timed = fitted.steps - batches.steps_per_epoch
    peak = torch.cuda.max_memory_allocated() / 2**20 if options.device != "cpu" else 0.0
    score = evaluate(fitted.network, holdout, arch)
    rate = timed * batches.batches.batch_size / seconds  # which few images make smaller
    return [f"{rate:.0f}", f"{score.accuracy:.4f}", score.n, fitted.steps, f"{peak:.0f}"]


if __name__ == "__main__":
    main()
