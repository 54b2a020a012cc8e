"""A DeiT-like net slimmed to half of its MACs against a net of that size that was trained from scratch as long.

    python benchmarks/evidence_slim_trained.py --dataset hfds/FOLDER --out FOLDER [--device cuda] [--seeds 0 1 2]
        [--base-seconds 65] [--recover-seconds 18] [--torch-pruning FOLDER] [--size small]

The net (width 192, 6 blocks of 6 heads, patches of 4) is trained on CIFAR-10 at 32 pixels by AdamW with a cosine, label
smoothing, shifts and mirrored images, for about `--base-seconds` on this machine: a few steps are timed, and epochs are
set by them. Then, per seed:

    base     that net
    folded   half of its MACs gone, without training: order, sensitivity, allocation, compensation in closed form
    slimmed  that, recovered for `--recover-seconds` with labels and the base as its teacher
    scratch  the same Arch from new weights, as long as base, folding and recovery took together
    given    the same Arch from new weights, as long as folding and recovery took: what who has the base could do else
    pruned   heads and hidden units by Torch-Pruning (its folder is given), by magnitude at one ratio, to the same MACs;
             pruned_recovered: that, recovered as `slimmed`

Accuracy is of the test split, which nothing else looks at; recovery keeps the better of before and after by 5,000
images carved out of train. Each row goes to slim_trained-SEED.jsonl as it is known, networks lie beside it, and what is
there is not made again: one process per seed may run beside others.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.data import Augment, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.exporting import load_timm, save_timm
from vitnas.model import Model, build
from vitnas.runs import append_jsonl, read_jsonl
from vitnas.sample import Fixed
from vitnas.slimming import IMPORTANCE, PredictedDamage, allocate, fold, ordered, sensitivity
from vitnas.slimming.recovery import RECOVERY, recover
from vitnas.space import around
from vitnas.train import Classification, Engine, TrainConfig, evaluate, fit

AUGMENT = Augment(shift=0.125, hflip=0.5)
STEPS = tuple(step / 8 for step in range(1, 9))
ROUNDS, UNTIMED, TIMED = 2, 4, 24  # steps that say how long one takes
ARMS = ("base", "folded", "slimmed", "scratch", "given", "pruned", "pruned_recovered")


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    patch: int = 4
    dim: int = 192
    depth: int = 6
    heads: int = 6
    images: int | None = None
    holdout: int = 5000
    batch: int = 512
    calibration: int = 512

    @property
    def arch(self) -> Arch:
        block = Block(num_heads=self.heads, head_dim=self.dim // self.heads, mlp_hidden=4 * self.dim)
        stage = Stage(embed_dim=self.dim, blocks=(block,) * self.depth)
        return Arch(image_size=32, patch_size=self.patch, in_chans=3, num_classes=10, stages=(stage,))


SMALL = Size(dim=64, depth=4, heads=4, images=22_000, holdout=2000, batch=128, calibration=384)  # two cores
MICRO = replace(SMALL, patch=8, dim=48, batch=256)  # learns all it can in minutes
TINY = Size(
    patch=8, dim=64, depth=3, heads=4, images=1500, holdout=300, batch=64, calibration=96
)  # to rehearse
SIZES = {"full": Size(), "small": SMALL, "micro": MICRO, "tiny": TINY}


class Seed:
    """One seed: its data order, its networks, its rows."""

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        self.seed, self.options = seed, options
        self.size = SIZES[options.size]
        self.path: Path = options.out / f"slim_trained-{seed}.jsonl"
        self.rows: dict[str, dict[str, Any]] = {row["arm"]: row for row in read_jsonl(self.path)}
        self.precision: Any = "bf16" if options.device == "cuda" else "fp32"

    @cached_property
    def engine(self) -> Engine:
        return Engine(precision=self.precision, cpu=self.options.device == "cpu")

    @cached_property
    def data(self) -> Any:
        config = DataConfig(
            dataset=self.options.dataset, holdout=self.size.holdout, max_images=self.size.images
        )
        return open_data(config)

    @cached_property
    def test(self) -> EvalBatches:
        log = self.options.out / f"test_reads-{self.seed}.json"
        return EvalBatches(self.data.open_test(log, purpose="evidence"), batch_size=500)

    @cached_property
    def holdout(self) -> EvalBatches:
        return EvalBatches(self.data.holdout, batch_size=500)

    def batches(self) -> TrainBatches:
        workers, size = self.options.workers, self.size.batch
        return TrainBatches(self.data.train, AUGMENT, batch_size=size, seed=self.seed, workers=workers)

    def fresh(self, arch: Arch, number: int) -> Model:
        return build(arch, generator=torch.Generator().manual_seed(1000 * self.seed + number))

    def config(self, epochs: float) -> TrainConfig:
        return TrainConfig(
            epochs=epochs,
            lr=1e-3,
            weight_decay=0.05,
            warmup_epochs=epochs / 10,
            clip_grad=1.0,
            monitor_every=0,
            precision=self.precision,
        )

    def fit(self, model: Any, base: Model | None, loader: Any, epochs: float) -> float:
        """Train from new weights, or recover towards `base`; gives the seconds."""
        options: Any = {"seed": self.seed, "engine": self.engine}
        if base is None:
            task, config = Classification(label_smoothing=0.1), self.config(epochs)
            return self.timed(lambda: fit(model, task, Fixed(), loader, config=config, **options))[1]
        few = replace(RECOVERY, epochs=epochs, warmup_epochs=epochs / 10, lr=self.options.recover_lr)
        config = replace(few, precision=self.precision)
        return self.timed(
            lambda: recover(model, base, loader, self.holdout, config=config, labels=True, **options)
        )[1]

    def step_seconds(self, kinds: Sequence[tuple[Any, Model | None]]) -> list[float]:
        """What a step takes of each (network, its teacher or None), in rounds beside each other, on copies."""
        found: list[list[float]] = [[] for _ in kinds]
        for _ in range(ROUNDS):
            for times, (model, base) in zip(found, kinds, strict=True):
                short, long = (
                    self.fit(copy.deepcopy(model), base, self.some, steps / len(self.some))
                    for steps in (UNTIMED, UNTIMED + TIMED)
                )
                times.append(max(long - short, 1e-4) / TIMED)
        return [min(times) for times in found]

    @cached_property
    def some(self) -> list[Any]:
        """A few batches at hand, so that a step's time is the network's."""
        return list(itertools.islice(self.batches().from_step(0), 4))

    def epochs_of(self, seconds: float, step_seconds: float) -> float:
        return max(1.0, seconds / step_seconds) / self.batches().steps_per_epoch

    def row(self, arm: str, model: Any, *, seconds: float, epochs: float = 0.0, **more: Any) -> None:
        """Write down an arm and its network; `seconds` is what it took, without the timing of steps."""
        accuracy = evaluate(model.to(self.engine.device), self.test)
        if isinstance(model, Model):
            save_timm(copy.deepcopy(model).cpu(), self.options.out / f"{arm}-{self.seed}")
            cost = count(model.arch)
            more |= {"macs": cost.macs, "params": cost.params, "arch": model.arch.describe()}
        row = {
            "arm": arm, "seed": self.seed, "accuracy": accuracy.accuracy, "n": accuracy.n,
            "seconds": round(seconds, 1), "epochs": round(epochs, 2), **more,
        }  # fmt: skip
        append_jsonl(self.path, row)
        self.rows[arm] = row
        print(row, flush=True)

    def saved(self, arm: str) -> Model:
        model = load_timm(self.options.out / f"{arm}-{self.seed}")
        assert isinstance(model, Model)
        return model.to(self.engine.device)

    def timed(self, make: Callable[[], Any]) -> tuple[Any, float]:
        """What it makes, and the seconds: of the processor where it does the work, as others may share it."""
        clock = time.monotonic if self.options.device == "cuda" else time.process_time
        start = clock()
        made = make()
        if self.options.device == "cuda":
            torch.cuda.synchronize()
        return made, clock() - start

    def fold(self, base: Model) -> Model:
        """Half of the MACs, without training; unlabelled images."""
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(self.seed))
        some = self.data.train.subset(order[: self.size.calibration].tolist())
        device = self.engine.device
        images = [x.to(device) for x, _ in EvalBatches(some, batch_size=64)]
        heads = tuple(range(1, self.size.heads + 1))
        space = around(base, heads=heads, hidden=STEPS, blocks=range(1, self.size.depth))
        few = images[: max(1, len(images) // 2)]
        scores = IMPORTANCE["unexplained"](base, few, torch.Generator().manual_seed(self.seed))
        supernet = ordered(base, space, scores)
        damage = PredictedDamage(space, sensitivity(supernet, few))
        arch = allocate(damage, f"macs<={count(base.arch).macs // 2}", seed=self.seed)[0].arch
        return fold(supernet, arch, images)

    def run(self) -> None:
        options = self.options
        if "base" not in self.rows:
            model = self.fresh(self.size.arch, 0)
            (step_s,) = self.step_seconds([(model, None)])
            epochs = self.epochs_of(options.base_seconds, step_s)
            self.row("base", model, seconds=self.fit(model, None, self.batches(), epochs), epochs=epochs)
        base = self.saved("base")
        if "folded" not in self.rows:
            model, seconds = self.timed(lambda: self.fold(base))
            self.row("folded", model, seconds=seconds)
        folded = self.saved("folded")
        kinds = [(base, None), (folded, base), (folded, None)]
        base_s, recover_s, small_s = self.step_seconds(kinds)
        if "slimmed" not in self.rows:
            epochs = self.epochs_of(options.recover_seconds, recover_s)
            seconds = self.fit(folded, base, self.batches(), epochs)
            steps_ms = [round(1000 * each, 2) for each in (base_s, recover_s, small_s)]
            self.row("slimmed", folded, seconds=seconds, epochs=epochs, steps_ms=steps_ms)
        arch, of_epoch = folded.arch, self.batches().steps_per_epoch
        spent = self.rows["folded"]["seconds"] + self.rows["slimmed"]["epochs"] * of_epoch * recover_s
        trained = self.rows["base"]["epochs"] * of_epoch * base_s
        for number, (arm, seconds) in enumerate((("scratch", trained + spent), ("given", spent)), 1):
            if arm not in self.rows:
                model, epochs = self.fresh(arch, number), self.epochs_of(seconds, small_s)
                took = self.fit(model, None, self.batches(), epochs)
                self.row(arm, model, seconds=took, epochs=epochs, meant_seconds=round(seconds, 1))
        if options.torch_pruning is not None and "pruned_recovered" not in self.rows:
            self.prune(base)

    def prune(self, base: Model) -> None:
        """Torch-Pruning on timm's class with the same weights, and the same recovery."""
        from evidence_slim import macs_of, pruned_to

        limit = self.rows["slimmed"]["macs"]
        model, seconds = self.timed(lambda: pruned_to(self.options.torch_pruning, timm_of(base), limit, True))
        macs = macs_of(model)
        self.row("pruned", model, seconds=seconds, macs=macs)
        model.to(self.engine.device)
        epochs = self.rows["slimmed"]["epochs"]
        seconds = self.fit(model, base, self.batches(), epochs)
        self.row("pruned_recovered", model, seconds=seconds, epochs=epochs, macs=macs)


def timm_of(base: Model) -> Any:
    from vitnas.model.timm_keys import to_timm

    return to_timm(copy.deepcopy(base).cpu())


def table(folder: Path) -> str:
    rows = [row for path in sorted(folder.glob("slim_trained-*.jsonl")) for row in read_jsonl(path)]
    lines = [f"{'arm':<18} {'MACs':>7} {'accuracy, %':>16} {'seconds':>8} {'epochs':>7}   by seed"]
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        each = [100 * row["accuracy"] for row in mine]
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        macs, seconds, epochs = (
            statistics.mean(row[name] for row in mine) for name in ("macs", "seconds", "epochs")
        )
        lines.append(
            f"{arm:<18} {macs / 1e6:6.1f}M {statistics.mean(each):9.2f} ({spread:.2f}) {seconds:8.1f} {epochs:7.1f}   "
            + ", ".join(f"{value:.2f}" for value in each)
        )
    by = {(row["arm"], row["seed"]): row["accuracy"] for row in rows}
    for arm in ("scratch", "given", "pruned_recovered"):
        ahead = [
            100 * (by["slimmed", seed] - by[arm, seed])
            for a, seed in by
            if a == arm and ("slimmed", seed) in by
        ]
        if ahead:
            each_text = ", ".join(f"{value:+.2f}" for value in ahead)
            lines.append(f"slimmed - {arm}: {statistics.mean(ahead):+.2f} points ({each_text})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base-seconds", type=float, default=65.0)
    parser.add_argument("--recover-seconds", type=float, default=18.0)
    parser.add_argument("--recover-lr", type=float, default=3e-4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--torch-pruning", type=Path, default=None)
    parser.add_argument("--size", choices=SIZES, default="full")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        Seed(seed, options).run()
    print(table(options.out))


if __name__ == "__main__":
    main()
