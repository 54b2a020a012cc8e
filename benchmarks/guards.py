"""What the guards of a run cost: its lock, signals and checks in a training step, its leases and record in a Trial.

    python benchmarks/guards.py [rounds=60]

Each round trains and searches a little twice, with the guards and with nothing in their place, one after the other in
one process, and every other round in the other order. What is told is the median over the rounds of the ratio of CPU
times, with the 95 % interval of that median: pieces are short and many, so that what else the machine does comes out.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from vitnas.data import Augment, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.sample import Uniform
from vitnas.searching import Study, search
from vitnas.space import autoformer
from vitnas.stages.lock import one_writer
from vitnas.stages.searching import SupernetEvaluator
from vitnas.stopping import working
from vitnas.supernet import Supernet
from vitnas.train import Classification, Engine, TrainConfig, fit

SPACE = autoformer(
    "micro", image_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dims=(16, 24, 32), depths=(2, 3),
    num_heads=(1, 2, 3), mlp_ratios=(1.0, 2.0), head_dim=8,
)  # fmt: skip
STEPS, TRIALS = 15, 10
GUARDS = {
    "vitnas.train.engine.Engine.together": lambda self: nullcontext(),
    "vitnas.train.engine.Engine.stop_if_asked": lambda self, put_away: None,
    "vitnas.train.loop.deferred": nullcontext,
    "vitnas.train.metrics.check_there": lambda folder: lambda: None,
    "vitnas.searching.search._kept": lambda study, trial: nullcontext(),
    "vitnas.searching.study.Study._retry_dead": lambda self: None,
}


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """As a command holds its run folder."""
    with working(), one_writer(folder):
        yield


@contextmanager
def bare(folder: Path) -> Iterator[None]:
    """Nothing is looked after."""
    with ExitStack() as stack:
        for name, nothing in GUARDS.items():
            stack.enter_context(patch(name, nothing))
        yield


def cpu_s(around: Callable[[Path], object], work: Callable[[Path], object]) -> float:
    """CPU seconds of one piece of work in a new folder."""
    with tempfile.TemporaryDirectory() as name, around(Path(name) / "run"):  # type: ignore[attr-defined]
        begun = time.process_time()
        work(Path(name))
        return time.process_time() - begun


def main(rounds: int) -> None:
    """Print a line of JSON."""
    torch.set_num_threads(1)
    engine, data = Engine(cpu=True), open_data(DataConfig(dataset="digits"))
    supernet = Supernet(SPACE, generator=torch.Generator().manual_seed(0))

    def training(folder: Path) -> None:
        batches = TrainBatches(data.train, Augment(), batch_size=32, seed=0)
        config = TrainConfig(epochs=STEPS / batches.steps_per_epoch, monitor_every=0, warmup_epochs=0)
        fit(supernet, Classification(), Uniform(SPACE), batches, config=config, engine=engine, folder=folder)

    evaluator = SupernetEvaluator(supernet, EvalBatches(data.holdout, batch_size=64))

    def searching(folder: Path) -> None:
        with Study.open(SPACE, "", storage=folder / "study.db") as study:
            search(study, evaluator, searcher="random", num_trials=TRIALS)

    found: dict[str, list[float]] = {}
    for name, work, count in (("step", training, STEPS), ("trial", searching, TRIALS)):
        cpu_s(bare, work)
        for number in range(rounds):
            order = (guarded, bare) if number % 2 else (bare, guarded)
            took = {around: cpu_s(around, work) for around in order}
            found.setdefault(f"{name}_ratio", []).append(took[guarded] / took[bare])
            found.setdefault(f"{name}_ms", []).append(1e3 * took[guarded] / count)
    told = {name: round(statistics.median(values), 4) for name, values in found.items()}
    between = {f"{name}_between": interval(found[name]) for name in ("step_ratio", "trial_ratio")}
    print(json.dumps({"rounds": rounds, **told, **between}))


def interval(values: list[float]) -> list[float]:
    """Between which two values the median lies with 95 % certainty, by drawing the rounds anew."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    return [round(medians[50], 4), round(medians[-50], 4)]


if __name__ == "__main__":
    main(int(dict(word.split("=", 1) for word in sys.argv[1:]).get("rounds", "60")))
