"""Does a learned sampler beat uniform sampling at equal cost? All arms of the claim, one table.

    python benchmarks/compare_samplers.py --out results.json [--dataset digits] [--space mixers] [--seeds 3]
        [--epochs 45] [--spacing even]

Arms (Supernet training + how a budget is answered):

    uniform + evolution     AutoFormer
    focus + sampler         FocusFormer: learned while training, asked directly
    focus + evolution       the same Supernet, searched
    uniform + sampler       the sampler is learned afterwards, on the finished uniform Supernet
    best_up + evolution     AttentiveNAS's BestUp, the strongest simple rival

Equal cost: every arm may spend the passes of images (forward 1, forward and backward 3) that `uniform + evolution`
spends in all; what an arm saves or adds in looks and search, its Supernet trains longer or shorter for. Passes do
not see that Archs differ in size, so the MACs spent are counted too. Archs are chosen on held-out images; the test
split is read once per Arch, for the table.

`--space autoformer` is easy: Archs of equal cost differ by about a point. In `--space mixers` (mixers, stem and
positions as genes; some are bad) they differ by 14 points and more, as a sampler can know and uniform draws cannot.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.extraction import extract
from vitnas.model import build
from vitnas.recipes.tour import on_digits
from vitnas.sample import BestUp, Draw, Fixed, Focus, FocusConfig, Moment, Uniform
from vitnas.searching import Evolution, Study, search
from vitnas.searching.pareto import hypervolume
from vitnas.space import Space, autoformer, mixer_space
from vitnas.stages.sampler import answers
from vitnas.supernet import Supernet
from vitnas.train import Classification, TrainConfig, evaluate, fit

ARMS = {
    "uniform + evolution": ("uniform", "evolution"),
    "focus + sampler": ("focus", "sampler"),
    "focus + evolution": ("focus", "evolution"),
    "uniform + sampler": ("uniform", "sampler"),
    "best_up + evolution": ("best_up", "evolution"),
}
TRAINING = 3  # passes of a forward and backward


@dataclass
class Bench:
    """What all arms of one seed share."""

    data: Data
    space: Space
    augment: Augment
    config: TrainConfig
    retrain: TrainConfig
    batch_size: int
    budgets: tuple[float, ...]
    num_trials: int
    num_looks: int
    focus: FocusConfig
    seed: int
    test: EvalBatches

    @functools.cached_property
    def holdout(self) -> EvalBatches:
        return EvalBatches(self.data.holdout, batch_size=512)

    def loader(self, stage: str) -> TrainBatches:
        seed = sum(map(ord, stage)) + 1000 * self.seed
        return TrainBatches(self.data.train, self.augment, batch_size=self.batch_size, seed=seed)


class Counted:
    """A Sampler that counts the MACs that its draws train."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.macs = inner, 0

    def draw(self, rng: Any) -> list[Draw]:
        draws: list[Draw] = self.inner.draw(rng)
        self.macs += sum(count(draw.arch).macs for draw in draws if draw.arch)
        return draws

    def before(self, moment: Moment) -> Any:
        return self.inner.before(moment) if hasattr(self.inner, "before") else None

    def tensors(self) -> dict[str, Any]:
        return {}

    def restore(self, tensors: Any) -> None:
        raise NotImplementedError("this comparison keeps no checkpoints")


def train(bench: Bench, kind: str, epochs: float) -> tuple[Supernet, Any, int, float]:
    """(Supernet, its sampler, MACs of one pass over what was trained, seconds)."""
    supernet = Supernet(bench.space, generator=torch.Generator().manual_seed(bench.seed))
    made: dict[str, Callable[[], Any]] = {
        "uniform": lambda: Uniform(bench.space),
        "focus": lambda: Focus(bench.space, bench.holdout, config=bench.focus, seed=bench.seed),
        "best_up": lambda: BestUp(bench.space, bench.holdout, config=bench.focus),
    }
    sampler, start = Counted(made[kind]()), time.monotonic()
    config = replace(bench.config, epochs=epochs)
    fit(supernet, Classification(), sampler, bench.loader(kind), config=config, seed=bench.seed)
    return supernet.eval(), sampler.inner, sampler.macs * bench.batch_size, time.monotonic() - start


def learn_afterwards(bench: Bench, supernet: Supernet, steps: int) -> Focus:
    """The sampler alone, on a Supernet that no longer changes; as many looks as while training."""
    focus = Focus(bench.space, bench.holdout, config=replace(bench.focus, warmup=0.0), seed=bench.seed)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.0)
    for step in range(steps):
        focus.before(Moment(step, steps, 0.0, bench.seed, supernet, optimizer, lambda tensor: None))
    return focus


def choose(
    bench: Bench, how: str, supernet: Supernet, focus: Focus | None, high: float
) -> tuple[Arch, int, float]:
    """(Arch for the budget, Archs scored on all held-out images, seconds)."""
    budget, start = Budget.parse(f"macs<={round(high)}"), time.monotonic()

    def score(arch: Arch) -> dict[str, float]:
        found = evaluate(supernet, bench.holdout, arch)
        return {"accuracy": found.accuracy, "loss": found.loss}

    if how == "sampler":
        assert focus is not None
        ranked = [
            bench.space.arch_of(genes) for genes in answers(focus, budget, seed=bench.seed)[: bench.num_looks]
        ]
        scored = [(score(arch), arch) for arch in ranked]
        best = max(scored, key=lambda pair: (pair[0]["accuracy"], -pair[0]["loss"]))[1]
        return best, len(scored), time.monotonic() - start
    searcher = Evolution(population=20, parents=6, mutants=8, crossovers=8, generations=100)
    study: Study = search(
        Study.open(bench.space, budget, seed=bench.seed),
        score,
        searcher=searcher,
        num_trials=bench.num_trials,
    )
    return study.best().arch, bench.num_trials, time.monotonic() - start


def retrained(bench: Bench, arch: Arch, known: dict[Arch, float]) -> float:
    """Test accuracy of `arch` trained from scratch."""
    if arch not in known:
        model: nn.Module = build(arch, generator=torch.Generator().manual_seed(bench.seed))
        fit(model, Classification(), Fixed(), bench.loader("retrain"), config=bench.retrain, seed=bench.seed)
        known[arch] = evaluate(model, bench.test).accuracy
    return known[arch]


def arms_of(bench: Bench, epochs: float) -> list[dict[str, Any]]:
    """All arms of one seed."""
    steps_per_epoch = bench.loader("steps").steps_per_epoch
    per_epoch = TRAINING * steps_per_epoch * bench.batch_size
    holdout = len(bench.data.holdout)
    scored = {"evolution": bench.num_trials, "sampler": bench.num_looks}
    passes = {how: n * len(bench.budgets) * holdout for how, n in scored.items()}
    total = epochs * per_epoch + passes["evolution"]
    per_look = bench.focus.archs * bench.focus.images
    known: dict[Arch, float] = {}
    trained: dict[tuple[str, float], tuple[Supernet, Any, int, float]] = {}
    rows = []
    for arm, (kind, how) in ARMS.items():
        learns = kind != "uniform" or how == "sampler"
        looks = int(epochs * steps_per_epoch / bench.focus.every * (1 - bench.focus.warmup)) if learns else 0
        mine = (total - passes[how] - looks * per_look) / per_epoch
        key = kind, round(mine, 3)
        if key not in trained:
            trained[key] = train(bench, kind, mine)
        supernet, sampler, macs, seconds = trained[key]
        start, focus = time.monotonic(), sampler if isinstance(sampler, Focus) else None
        if kind == "uniform" and how == "sampler":
            focus = learn_afterwards(bench, supernet, looks * bench.focus.every)
        learning = time.monotonic() - start
        answer = []
        for high in bench.budgets:
            arch, scored, took = choose(bench, how, supernet, focus, high)
            inherited = evaluate(extract(supernet, arch), bench.test)
            answer.append(
                {
                    "budget": high, "arch": arch.id, "macs": count(arch).macs, "scored": scored, "seconds": took,
                    "inherited": inherited.accuracy, "loss": inherited.loss, "retrained": retrained(bench, arch, known),
                }
            )  # fmt: skip
        points = np.array([[a["inherited"], -a["macs"] / max(bench.budgets)] for a in answer])
        rows.append(
            {
                "arm": arm, "seed": bench.seed, "epochs": mine, "looks": looks, "train_s": seconds, "learn_s": learning,
                "train_macs": TRAINING * macs, "passes": total, "answers": answer,
                "hypervolume": hypervolume(points, np.array([0.0, -1.05])), "n_test": len(bench.test.images),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def space_of(kind: str, data: Data, patch_size: int) -> tuple[Space, tuple[float, ...]]:
    """(The space, budgets: where a twentieth, a third and nine tenths of uniform draws cost less)."""
    of: dict[str, Any] = {
        "image_size": data.image_size, "patch_size": patch_size, "in_chans": data.in_chans,
        "num_classes": data.num_classes, "embed_dims": (48, 64, 80), "depths": (2, 3, 4), "num_heads": (1, 2, 3),
        "mlp_ratios": (1.0, 2.0, 3.0),
    }  # fmt: skip
    if kind == "mixers":
        mixers = ("fourier", "linformer", "performer", "softmax")
        of |= {"stems": ("linear", "hybrid"), "positions": ("none", "learned"), "mixers": mixers}
    space: Space = mixer_space("micro", **of) if kind == "mixers" else autoformer("micro", **of)
    costs = space.cost_table().costs(space.random_matrix(10_000, np.random.default_rng(0)))["macs"]
    return space, tuple(float(q) for q in np.quantile(costs, (0.05, 0.33, 0.9)))


def bench_of(options: argparse.Namespace, seed: int) -> Bench:
    run = on_digits()
    if options.dataset == "digits":
        data, augment, patch_size = (
            open_data(replace(run.data, seed=seed)),
            Augment(rotate=10, zoom=(0.9, 1.1)),
            2,
        )
    else:
        data = open_data(
            DataConfig(
                dataset=options.dataset,
                max_images=options.max_images,
                holdout=1000,
                seed=seed,
                augment="light",
            )
        )
        augment, patch_size = data.augment, 4
    space, budgets = space_of(options.space, data, patch_size)
    steps = TrainBatches(data.train, augment, batch_size=64, seed=0).steps_per_epoch
    looks = max(40, int(options.epochs * steps / 20))
    focus = FocusConfig(every=max(1, round(options.epochs * steps / looks)), spacing=options.spacing)
    reads = options.out.with_suffix(".test_reads.json")
    test = EvalBatches(data.open_test(reads, purpose="sampler comparison"), batch_size=512)
    return Bench(
        data=data, space=space, augment=augment, config=replace(run.supernet, epochs=options.epochs, monitor_every=0),
        retrain=replace(run.retrain.train, epochs=options.retrain_epochs), batch_size=64, budgets=budgets,
        num_trials=options.num_trials, num_looks=max(1, options.num_trials // 20), focus=focus, seed=seed, test=test,
    )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds (standard deviation)."""
    lines = []

    def cell(values: list[float], digits: int = 1, factor: float = 100) -> str:
        spread = statistics.stdev(values) * factor if len(values) > 1 else 0.0
        return f"{statistics.mean(values) * factor:.{digits}f} ({spread:.{digits}f})"

    budgets = [a["budget"] for a in rows[0]["answers"]]
    head = ["arm", "epochs", "train GMACs", *(f"inherited <={b / 1e6:.2g}M" for b in budgets)]
    head += [*(f"retrained <={b / 1e6:.2g}M" for b in budgets), "hypervolume", "Archs scored", "answer s"]
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        cells = [
            arm,
            f"{mine[0]['epochs']:.1f}",
            f"{statistics.mean(r['train_macs'] for r in mine) / 1e9:.0f}",
        ]
        for name in ("inherited", "retrained"):
            cells += [cell([row["answers"][i][name] for row in mine]) for i in range(len(budgets))]
        cells.append(cell([row["hypervolume"] for row in mine], 3, 1))
        cells.append(str(sum(a["scored"] for a in mine[0]["answers"])))
        cells.append(cell([sum(a["seconds"] for a in row["answers"]) for row in mine], 1, 1))
        lines.append(cells)
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--space", choices=("autoformer", "mixers"), default="autoformer")
    parser.add_argument("--spacing", choices=("log", "even"), default="log")
    parser.add_argument("--max-images", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=45)
    parser.add_argument("--retrain-epochs", type=float, default=50)
    parser.add_argument("--num-trials", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        rows += arms_of(bench_of(options, seed), options.epochs)
        options.out.write_text(json.dumps(rows, indent=1))
    print(f"\nn = {options.seeds} seeds, {rows[0]['n_test']} test images\n\n{table(rows)}")


if __name__ == "__main__":
    main()
