"""What makes a Supernet's scores order trained networks, at equal cost of training the Supernet.

    python benchmarks/ranking.py --dataset hfds/FOLDER --out FILE.jsonl [--seeds 0 1] [--archs 12] [--epochs 12]

`--archs` random Archs of a small unified Space, within a tenth of 3 M multiply-accumulates, are trained by themselves
on 5,000 images. Each way trains a Supernet until it has multiplied as much as `--budget` epochs of the Space's mean
Arch do, then scores them by accuracy and by loss, on the held-out images that the trained ones are judged by. Kendall's
tau-b. Rows are written as they come, and what the file holds is not done again; `--only` the ways that are named.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.model import build
from vitnas.sample import Draw, Fixed, Sampler, Sandwich, Several, Uniform
from vitnas.searching import rank_correlation
from vitnas.space import Space, unified
from vitnas.supernet import Supernet
from vitnas.train import Classification, TrainConfig, evaluate, fit

MACS, NEAR, BATCH, LR = 3e6, 0.1, 64, 2e-3
AUGMENT = Augment(hflip=0.5, shift=0.125)


def space() -> Space:
    """Stems, patches, stages and mixers as genes, small enough for one core."""
    return unified(
        "micro", image_size=32, patch_sizes=(4, 8), stems=("linear", "conv"), positions=("learned",),
        reductions=("patch",), depths=(3, 2), embed_dims=((32, 48, 64), (64, 96, 128)),
        mixers=("softmax", "token_mlp", "fourier", "linformer"),
    )  # fmt: skip


def near(over: Space, rng: random.Random, low: float = 1 - NEAR, high: float = 1 + NEAR) -> Arch:
    """A random Arch of about the MACs."""
    while not low * MACS <= count(arch := over.sample(rng)).macs <= high * MACS:
        pass
    return arch


@dataclass(frozen=True)
class Near:
    """One random Arch per step, of half to one and a quarter of the MACs that are looked at later."""

    space: Space

    def draw(self, rng: random.Random) -> list[Draw]:
        return [Draw(arch=near(self.space, rng, 0.5, 1.25))]


@dataclass(frozen=True)
class Way:
    """How a Supernet trains. `first`: the share of the cost that its largest Arch trains for alone, before."""

    sampler: Callable[[Space], Sampler]
    first: float = 0.0
    ema: float | None = None


WAYS = {
    "plain": Way(Uniform),
    "average": Way(Uniform, ema=0.99),
    "near": Way(Near),
    "several": Way(lambda over: Several(over, num_archs=4)),
    "sandwich": Way(lambda over: Sandwich(over, num_random=2, distill=True)),
    "sandwich, labels": Way(lambda over: Sandwich(over, num_random=2, distill=False)),
    "largest first": Way(Uniform, first=0.3),
    "near, average": Way(Near, ema=0.99),
}


def train(
    network: nn.Module, data: Data, sampler: Sampler, epochs: float, seed: int, ema: float | None = None
) -> float:
    """Train in place; returns the processor's seconds."""
    config = TrainConfig(epochs=epochs, lr=LR, warmup_epochs=min(2, epochs / 5), ema=ema, monitor_every=0)
    began = time.process_time()
    batches = TrainBatches(data.train, AUGMENT, batch_size=BATCH, seed=seed)
    fit(network, Classification(), sampler, batches, config=config, seed=seed)
    return time.process_time() - began


def mean_macs(sampler: Sampler) -> float:
    """Multiply-accumulates per image of a step."""
    rng = random.Random(0)
    steps = [sampler.draw(rng) for _ in range(200)]
    return statistics.mean(sum(count(d.arch).macs / d.part[1] for d in draws if d.arch) for draws in steps)


def alone(arch: Arch, data: Data, scored: EvalBatches, epochs: float, seed: int) -> dict[str, Any]:
    model = build(arch, generator=torch.Generator().manual_seed(seed))
    seconds = train(model, data, Fixed(), epochs, seed)
    score = evaluate(model.eval(), scored)
    return {
        "arch": arch.to_json(),
        "macs": count(arch).macs,
        "accuracy": score.accuracy,
        "loss": score.loss,
        "s": seconds,
    }


def supernet(
    way: Way, archs: list[Arch], data: Data, scored: EvalBatches, epochs: float, seed: int
) -> dict[str, Any]:
    over = space()
    network = Supernet(over, generator=torch.Generator().manual_seed(seed))
    total, seconds = epochs * mean_macs(Uniform(over)), 0.0
    if way.first:
        seconds += train(
            network, data, Fixed(over.largest()), way.first * total / count(over.largest()).macs, seed
        )
    sampler = way.sampler(over)
    seconds += train(network, data, sampler, (1 - way.first) * total / mean_macs(sampler), seed, way.ema)
    scores = [evaluate(network.eval(), scored, arch) for arch in archs]
    return {"accuracy": [s.accuracy for s in scores], "loss": [s.loss for s in scores], "s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--archs", type=int, default=12)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--budget", type=float, default=60)
    parser.add_argument("--only", nargs="+", default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    known = {(row["what"], row["seed"]): row for row in rows}
    rng, over = random.Random(0), space()
    archs = [near(over, rng) for _ in range(args.archs)]
    data = open_data(DataConfig(dataset=args.dataset, max_images=7_000, holdout=2_000, seed=0))
    scored = EvalBatches(data.holdout, batch_size=500)

    def do(what: str, seed: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if (what, seed) not in known:
            known[what, seed] = {"what": what, "seed": seed, **make()}
            with args.out.open("a") as file:
                file.write(json.dumps(known[what, seed]) + "\n")
        return known[what, seed]

    for seed in args.seeds:
        each = [
            do(f"arch {i}", seed, partial(alone, arch, data, scored, args.epochs, seed))
            for i, arch in enumerate(archs)
        ]
        trained = {"accuracy": [row["accuracy"] for row in each], "loss": [-row["loss"] for row in each]}
        for name in args.only:
            row = do(name, seed, partial(supernet, WAYS[name], archs, data, scored, args.budget, seed))
            scores = {"accuracy": row["accuracy"], "loss": [-loss for loss in row["loss"]]}
            taus = {
                f"{one} / {other}": round(rank_correlation(scores[one], trained[other])["kendall_tau"], 2)
                for one in scores
                for other in trained
            }
            print(seed, name, taus, f"best {max(row['accuracy']):.3f}, {row['s']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
