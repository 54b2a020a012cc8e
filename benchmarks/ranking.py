"""What makes a Supernet's scores order trained networks, at equal cost of training the Supernet.

    python benchmarks/ranking.py --dataset hfds/FOLDER --out FOLDER [--seeds 0 1 2] [--only plain near ...]

Goes on where `evidence_search.py --arms unified rank` ended in the same folder: the Archs that it drew within 10 % of
the budget and trained by themselves, its Space, images and costs. Each way trains a Supernet until it has multiplied as
much as that script's supernet, then scores the Archs on the held-out images that the trained ones were judged by.
`near, norms anew` gives each Arch statistics of its own for batch norms, from 16 batches, before it is scored.
Kendall's tau-b of inherited accuracy, loss, and loss beside size, with trained accuracy. Rows go to ranking.jsonl; what
is there is not done again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_search import SIZES, Evidence, mean_text, parsed, ranked_accuracies
from torch import nn

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.data import TrainBatches
from vitnas.exporting.timm_dir import load_timm
from vitnas.extraction import extract
from vitnas.model import Model
from vitnas.runs import append_jsonl, read_jsonl
from vitnas.sample import Draw, Fixed, Moment, NearBudget, Sampler, Sandwich, Several, Uniform, use_of
from vitnas.searching import rank_correlation
from vitnas.searching.choosing import standing
from vitnas.space import Space
from vitnas.stages.context import Context
from vitnas.supernet import Supernet
from vitnas.train import Classification, Distillation, Soft, Task, Teacher, TrainConfig, evaluate, fit


def near(space: Space, macs: float, low: float = 0.5, high: float = 1.25) -> NearBudget:
    """Random Archs of `low` to `high` times the MACs that are looked for."""
    use = use_of(space, Budget(macs=macs))
    assert use
    return NearBudget(space, use, low, high)


@dataclass(frozen=True)
class Way:
    """How a Supernet trains. `first`: the share of the cost that its largest Arch trains for alone, before. `private`:
    how much faster tensors learn that not all Archs share. `taught`: by what the run `near` of the same seed chose and
    trained, whose cost is not counted. `anew`: batch norms take statistics of each Arch."""

    sampler: Callable[[Space, float], Sampler]
    first: float = 0.0
    ema: float | None = None
    lr: float = 1.0
    batch: int | None = None
    private: float = 1.0
    taught: bool = False
    anew: bool = False


@dataclass
class StructureFirst:
    """In the first half only stems, widths and blocks vary: other genes keep their last option, mixers softmax. A Hook,
    so that it knows the step."""

    space: Space
    macs: float
    is_late: bool = False

    def draw(self, rng: random.Random) -> list[Draw]:
        source = near(self.space, self.macs)
        while True:
            arch = source.sample(rng)
            if self.is_late:
                return [Draw(arch=arch)]
            genes = list(self.space.encode(arch))
            for i, gene in enumerate(self.space.genes):
                if gene.name.startswith("mixer."):
                    genes[i] = list(gene.options).index("softmax")
                elif not gene.name.startswith(("stem", "embed_dim", "exists", "num_stages", "reduction")):
                    genes[i] = len(gene.options) - 1
            arch = self.space.decode(genes)
            if 0.5 * self.macs <= count(arch).macs <= 1.25 * self.macs:
                return [Draw(arch=arch)]

    def before(self, moment: Moment) -> None:
        self.is_late = moment.step * 2 >= moment.steps

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


WAYS = {
    "plain": Way(lambda space, _: Uniform(space)),
    "near": Way(lambda space, macs: Uniform(near(space, macs))),
    "within": Way(lambda space, macs: Uniform(near(space, macs, 0.9, 1.0))),
    "near, faster": Way(lambda space, macs: Uniform(near(space, macs)), lr=2.0),
    "near, small batches": Way(lambda space, macs: Uniform(near(space, macs)), batch=32),
    "near, average": Way(lambda space, macs: Uniform(near(space, macs)), ema=0.99),
    "near, several": Way(lambda space, macs: Several(near(space, macs), num_archs=4)),
    "near, structure first": Way(StructureFirst),
    "near, private faster": Way(lambda space, macs: Uniform(near(space, macs)), private=2.0),
    "near, taught": Way(lambda space, macs: Uniform(near(space, macs)), taught=True),
    "near, norms anew": Way(lambda space, macs: Uniform(near(space, macs)), anew=True),
    "sandwich": Way(lambda space, _: Sandwich(space, num_random=2, distill=True)),
    "near, sandwich": Way(lambda space, macs: Sandwich(space, num_random=2, source=near(space, macs))),
    "largest first": Way(lambda space, _: Uniform(space), first=0.3),
}


def mean_macs(sampler: Sampler) -> float:
    """Multiply-accumulates per image of a step."""
    rng = random.Random(0)
    steps = [sampler.draw(rng) for _ in range(400)]
    return statistics.mean(sum(count(d.arch).macs / d.part[1] for d in draws if d.arch) for draws in steps)


def with_own_statistics(network: Supernet, arch: Arch, batches: TrainBatches, steps: int = 16) -> Model:
    """The Arch's Model, whose batch norms have seen images as it sees them and none of other Archs."""
    model = extract(network, arch).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    if norms:
        with torch.no_grad():
            for images_BCHW, _ in islice(batches.from_step(0), steps):
                model(images_BCHW)
    return model.eval()


def supernet(way: Way, context: Context, macs: float, seed: int) -> tuple[Any, dict[str, Any]]:
    """One trained by `way` at the cost of the run's."""
    space, run = context.space, context.run
    network: Any = context.new_supernet()
    total = run.supernet.epochs * mean_macs(Uniform(space))
    sampler, began = way.sampler(space, macs), time.process_time()
    task: Task = Classification()
    teacher = None
    if way.taught:
        task = Distillation(losses={"soft": (Soft(), 1.0)}, labels=task)
        teacher = Teacher(load_timm(context.folder.parent / f"near-{seed}" / "models" / "chosen"))
    parts = [(way.first * total, Fixed(space.largest()))] if way.first else []
    for cost, each in [*parts, ((1 - way.first) * total, sampler)]:
        epochs = cost / mean_macs(each)
        config = TrainConfig(
            epochs=epochs, lr=way.lr * way.private * run.supernet.lr, warmup_epochs=epochs / 10, clip_grad=1.0,
            ema=way.ema, monitor_every=0, slow_names="" if way.private == 1 else "^(?!private)",
            slow_lr_scale=1 / way.private,
        )  # fmt: skip
        data = context.images.data
        batches = TrainBatches(
            data.train, data.augment, batch_size=way.batch or context.run.data.batch_size, seed=seed
        )
        network = fit(network, task, each, batches, config=config, seed=seed, teacher=teacher).network
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
    trained = ranked_accuracies(evidence.rows("trained"), 0)
    path = args.out / "ranking.jsonl"
    known = {(row["way"], row["seed"]) for row in read_jsonl(path)} if path.exists() else set()
    with evidence.opened("unified", 0) as context:
        archs = list(evidence.drawn(context.space, len(trained)))
    for name in args.only:
        for seed in args.seeds:
            if (name, seed) in known:
                continue
            with evidence.opened("unified", seed) as context:
                network, cost = supernet(WAYS[name], context, size.macs, seed)
                data, holdout = context.images.data, context.images.holdout
                if WAYS[name].anew:
                    batches = TrainBatches(data.train, data.augment, batch_size=size.batch, seed=seed)
                    scores = [
                        evaluate(with_own_statistics(network, arch, batches), holdout) for arch in archs
                    ]
                else:
                    scores = [evaluate(network.eval(), holdout, arch) for arch in archs]
            row = {
                "way": name,
                "seed": seed,
                **cost,
                "accuracy": [score.accuracy for score in scores],
                "loss": [score.loss for score in scores],
            }
            append_jsonl(path, row)
            print(seed, name, f"mean {statistics.mean(row['accuracy']):.3f}, {cost}", flush=True)
    costs = [count(arch) for arch in archs]
    sizes = [(cost.params, arch.depth) for cost, arch in zip(costs, archs, strict=True)]
    taus: dict[tuple[str, str], list[float]] = {}
    for row in read_jsonl(path):
        loss = -np.array(row["loss"])
        orders = {
            "loss": loss,
            "accuracy": np.array(row["accuracy"]),
            "loss and size": standing(loss, np.array([cost.macs for cost in costs]), sizes),
        }
        for order, values in orders.items():
            tau = rank_correlation(values.tolist(), trained)["kendall_tau"]
            taus.setdefault((row["way"], order), []).append(tau)
    for (way, order), each in taus.items():
        print(f"{way:<22} {order:<14} {mean_text(each)}")


if __name__ == "__main__":
    main()
