"""What makes a Supernet's scores order trained networks, at equal cost of training the Supernet.

    python benchmarks/ranking.py --dataset hfds/FOLDER --out FOLDER [--seeds 0 1 2] [--only plain near ...]

Goes on where `evidence_search.py --arms unified rank` ended in the same folder: the Archs that it drew within 10 % of
the budget and trained by themselves, its Space, images and costs. Each way trains a Supernet until it has multiplied as
much as that script's supernet, then scores the Archs on the held-out images that the trained ones were judged by.
Kendall's tau-b of inherited accuracy and loss with trained accuracy. Rows go to ranking.jsonl; what is there is not
done again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from evidence_search import SIZES, Evidence, mean_text, parsed

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.data import TrainBatches
from vitnas.runs import append_jsonl, read_jsonl
from vitnas.sample import Draw, Fixed, Moment, Sampler, Sandwich, Several, Uniform
from vitnas.searching import rank_correlation
from vitnas.space import Space
from vitnas.stages.context import Context
from vitnas.train import Classification, TrainConfig, evaluate, fit


@dataclass(frozen=True)
class Near:
    """`num_archs` random Archs per step, each on a slice of the batch, of `low` to `high` times the MACs looked for."""

    space: Space
    macs: float
    low: float = 0.5
    high: float = 1.25
    num_archs: int = 1

    def draw(self, rng: random.Random) -> list[Draw]:
        n = self.num_archs
        return [Draw(arch=self.sample(rng), part=(i, n), weight=1 / n) for i in range(n)]

    def sample(self, rng: random.Random) -> Arch:
        while not self.low * self.macs <= count(arch := self.space.sample(rng)).macs <= self.high * self.macs:
            pass
        return arch


@dataclass(frozen=True)
class Way:
    """How a Supernet trains. `first`: the share of the cost that its largest Arch trains for alone, before."""

    sampler: Callable[[Space, float], Sampler]
    first: float = 0.0
    ema: float | None = None
    lr: float = 1.0
    batch: int | None = None
    structure_first: float = 0.0


def uniform(space: Space, _: float) -> Sampler:
    return Uniform(space)


@dataclass(frozen=True)
class StructureFirst:
    """In the first `share` of the steps only stems, widths and blocks vary; other genes keep their last option, mixers
    softmax. A Hook, so that it knows the epoch."""

    near: Near
    epochs: float
    share: float = 0.5
    epoch: list[float] = field(default_factory=lambda: [0.0])

    def draw(self, rng: random.Random) -> list[Draw]:
        if self.epoch[0] >= self.share * self.epochs:
            return self.near.draw(rng)
        return [Draw(arch=self.sample(rng))]

    def sample(self, rng: random.Random) -> Arch:
        space, near = self.near.space, self.near
        while True:
            genes = list(space.encode(space.sample(rng)))
            for i, gene in enumerate(space.genes):
                if gene.name.startswith("mixer."):
                    genes[i] = list(gene.options).index("softmax")
                elif not gene.name.startswith(("stem", "embed_dim", "exists", "num_stages", "reduction")):
                    genes[i] = len(gene.options) - 1
            arch = space.decode(genes)
            if near.low * near.macs <= count(arch).macs <= near.high * near.macs:
                return arch

    def before(self, moment: Moment) -> None:
        self.epoch[0] = moment.epoch

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


WAYS = {
    "plain": Way(uniform),
    "near": Way(Near),
    "near, faster": Way(Near, lr=2.0),
    "near, small batches": Way(Near, batch=32),
    "near, structure first": Way(Near, structure_first=0.5),
    "sandwich": Way(lambda space, _: Sandwich(space, num_random=2, distill=True)),
    "largest first": Way(uniform, first=0.3),
    "near, average": Way(Near, ema=0.99),
    "several": Way(lambda space, _: Several(space, num_archs=4)),
    "near, several": Way(lambda space, macs: Near(space, macs, num_archs=4)),
    "within": Way(lambda space, macs: Near(space, macs, 0.9, 1.0)),
}


def mean_macs(sampler: Sampler) -> float:
    """Multiply-accumulates per image of a step."""
    rng = random.Random(0)
    steps = [sampler.draw(rng) for _ in range(400)]
    return statistics.mean(sum(count(d.arch).macs / d.part[1] for d in draws if d.arch) for draws in steps)


def supernet(way: Way, context: Context, macs: float, seed: int) -> tuple[Any, dict[str, Any]]:
    """One trained by `way` at the cost of the run's."""
    space, run = context.space, context.run
    network: Any = context.new_supernet()
    total = run.supernet.epochs * mean_macs(Uniform(space))
    sampler, began = way.sampler(space, macs), time.process_time()
    parts = [(way.first * total, Fixed(space.largest()))] if way.first else []
    for cost, each in [*parts, ((1 - way.first) * total, sampler)]:
        epochs = cost / mean_macs(each)
        config = TrainConfig(
            epochs=epochs, lr=way.lr * run.supernet.lr, warmup_epochs=epochs / 10, clip_grad=1.0, ema=way.ema,
            monitor_every=0,
        )  # fmt: skip
        if way.structure_first and isinstance(each, Near):
            each = StructureFirst(each, epochs, way.structure_first)
        data = context.images.data
        batches = TrainBatches(
            data.train, data.augment, batch_size=way.batch or context.run.data.batch_size, seed=seed
        )
        network = fit(network, Classification(), each, batches, config=config, seed=seed).network
    return network, {"epochs": epochs, "cpu_s": round(time.process_time() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = SIZES["small"]
    argv = ["--dataset", args.dataset, "--out", str(args.out)]
    evidence = Evidence(parsed(argv), size)
    trained = [row["accuracy"] for row in sorted(evidence.rows("trained"), key=lambda row: row["number"])]
    path = args.out / "ranking.jsonl"
    known = {(row["way"], row["seed"]) for row in read_jsonl(path)} if path.exists() else set()
    for name in args.only:
        for seed in args.seeds:
            if (name, seed) in known:
                continue
            with evidence.opened("unified", seed) as context:
                archs = list(evidence.drawn(context.space, len(trained)))
                network, cost = supernet(WAYS[name], context, size.macs, seed)
                scores = [evaluate(network.eval(), context.images.holdout, arch) for arch in archs]
            row = {
                "way": name,
                "seed": seed,
                **cost,
                "accuracy": [score.accuracy for score in scores],
                "loss": [score.loss for score in scores],
            }
            row["taus"] = {
                "accuracy": rank_correlation(row["accuracy"], trained)["kendall_tau"],
                "loss": rank_correlation([-loss for loss in row["loss"]], trained)["kendall_tau"],
            }
            append_jsonl(path, row)
            print(seed, name, row["taus"], f"mean {statistics.mean(row['accuracy']):.3f}, {cost}", flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(path):
        found.setdefault(row["way"], []).append(row)
    for name, rows in found.items():
        for score in ("loss", "accuracy"):
            print(f"{name:<18} {score:<9} {mean_text([row['taus'][score] for row in rows])}")


if __name__ == "__main__":
    main()
