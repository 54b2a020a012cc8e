"""Run by test_distributed.py: two gloo processes on the CPU, forked after one import. Writes what it saw as JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.data import Augment, TrainBatches, synthetic
from vitnas.data.augment import seeded_globals
from vitnas.errors import UserError
from vitnas.model import build
from vitnas.sample import Draw, Moment, Uniform
from vitnas.searching import Study, search
from vitnas.space import autoformer
from vitnas.stages import Context, Run
from vitnas.stages.run import FinalsConfig, SearchConfig
from vitnas.stages.searching import Searches
from vitnas.supernet import Supernet
from vitnas.train import (
    Batch,
    Classification,
    Distillation,
    Engine,
    EsViTConfig,
    Features,
    Soft,
    StoredTeacher,
    Teacher,
    TrainConfig,
    fit,
    step_rng,
)
from vitnas.train.gives import Gives
from vitnas.train.metrics import MonitoredArch
from vitnas.train.task import Outputs

SPACE = autoformer(
    "micro",
    image_size=8,
    patch_size=4,
    in_chans=3,
    num_classes=4,
    embed_dims=(16, 32),
    depths=(1, 2, 3),
    num_heads=(1, 2),
    mlp_ratios=(1.0, 2.0),
    head_dim=8,
)
ARCHS = SPACE.smallest(), SPACE.middle()  # neither uses the third block
STEPS = 4


def supernet() -> Supernet:
    return Supernet(SPACE, generator=torch.Generator().manual_seed(0))


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(0, 4, (6,), generator=generator)


def backward(network: Supernet, arch: Arch, rank: int) -> None:
    images, targets = batch(rank)
    logits = network(images, arch)
    Classification()({"logits": logits}, Batch((images,), targets), {})["loss"].backward()


def gradients(engine: Engine) -> dict[str, float | bool]:
    """The averaged gradient against the mean of both ranks' gradients, computed here alone."""
    network = supernet()
    backward(network, ARCHS[engine.rank], engine.rank)
    own_none = sum(p.grad is None for p in network.parameters())
    engine.average_gradients(network.parameters())
    want: dict[str, Tensor] = {}
    for rank, arch in enumerate(ARCHS):
        alone = supernet()
        backward(alone, arch, rank)
        for name, p in alone.named_parameters():
            if p.grad is not None:
                want[name] = want.get(name, torch.zeros_like(p)) + p.grad / 2
    got = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    return {
        "difference": max(float((got[name] - want[name]).abs().max()) for name in want),
        "none_before": own_none,
        "none_after": sum(p.grad is None for p in network.parameters()),
        "third_block_unused": not any(name.startswith("blocks.2.") for name in got),
    }


class ByRank:
    """Each rank trains its own Arch."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def draw(self, rng: object) -> list[Draw]:
        return [Draw(arch=ARCHS[self.rank])]


def training(engine: Engine, folder: Path) -> dict[str, object]:
    network = supernet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    data = synthetic(num_classes=4, image_size=8, n=64, seed=0)
    loader = TrainBatches(data.train, Augment(), batch_size=8, seed=0, rank=engine.rank, world=engine.world)
    first = next(loader.from_step(0))[1].tolist(), float(next(loader.from_step(0))[0].sum())
    config = TrainConfig(
        epochs=STEPS / loader.steps_per_epoch,
        monitor_every=0,
        log_every=1,
        checkpoint_minutes=0,
        warmup_epochs=0,
    )
    fitted = fit(
        network,
        Classification(),
        ByRank(engine.rank),
        loader,
        config=config,
        engine=engine,
        folder=folder,
        stage="two",
    )
    state = network.state_dict()
    return {
        "steps": fitted.steps,
        "sum": [float(value.double().abs().sum()) for value in state.values()],
        "moved": [name for name, value in state.items() if not torch.equal(value, before[name])],
        "first_batch": first,
        "drawn": [Uniform(SPACE).draw(step_rng(0, step, engine.rank))[0].arch.id for step in range(20)],  # type: ignore[union-attr]
    }


def reductions(engine: Engine) -> float:
    """How often the processes reduce something together in a step of a training."""
    real, counts = torch.distributed.all_reduce, []
    for steps in (2, 6):
        calls: list[object] = []
        torch.distributed.all_reduce = lambda *given, **options: calls.append(real(*given, **options))  # noqa: B023
        config = TrainConfig(epochs=steps / STEPS, monitor_every=0, log_every=1, warmup_epochs=0)
        loader = Failing("nowhere", 0, engine)
        fit(supernet(), Classification(), ByRank(engine.rank), loader, config=config, engine=engine)
        counts.append(len(calls))
    torch.distributed.all_reduce = real
    return (counts[1] - counts[0]) / 4


def searching(engine: Engine, folder: Path) -> dict[str, object]:
    mine = []

    def score(arch: Arch) -> dict[str, float]:
        mine.append(arch.id)
        time.sleep(0.05)
        return {"accuracy": arch.depth / 10}

    with Study.open(SPACE, storage=folder / "study.db") as study:
        search(study, score, searcher="random", num_trials=12)
        engine.wait()
        return {"mine": mine, "scored": [trial.arch.id for trial in study.scored()]}


def once(folder: Path) -> dict[str, object]:
    """Only the first process makes a file; the other sees it when `once` returns."""
    work, made = Context(Run(device="cpu"), folder).work, []
    path = folder / "once.txt"

    def make() -> None:
        time.sleep(0.3)
        made.append(1)
        path.write_text("made")

    work.once(path, make)
    return {"made": len(made), "there": path.exists(), "tells": type(work.progress).__name__}


def told(engine: Engine) -> dict[str, object]:
    """What only the first process does reaches both: a value, an error, weights that began unequal."""

    def refuse() -> None:
        raise UserError(f"no such budget, says rank {engine.rank}")

    network = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(network.weight, engine.rank + 1)
    engine.broadcast(network)
    try:
        engine.from_first(refuse)
        error = ""
    except UserError as refused:
        error = str(refused)
    return {
        "value": engine.from_first(lambda: ["from", engine.rank]),
        "error": error,
        "weight": float(network.weight.sum()),
    }


class Failing:
    """A loader, Sampler, Task, Hook or Monitor of one rank that fails at the third step; elsewhere it does its work."""

    steps_per_epoch = STEPS

    def __init__(self, where: str, rank: int, engine: Engine) -> None:
        self.where, self.fails, self.engine = where, rank == engine.rank, engine

    def fail(self, where: str, step: int) -> None:
        if self.fails and where == self.where and step >= 2:
            raise UserError(f"the {where} of rank {self.engine.rank} failed at step {step}")

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            self.fail("loader", step)
            yield batch(self.engine.rank)
            step += 1

    def before(self, moment: Moment) -> None:
        self.fail("hook", moment.step)
        moment.share(torch.zeros(1))

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: object) -> None: ...

    def __call__(self, network: object) -> tuple[MonitoredArch, ...]:
        self.fail("monitor", 2)
        return (MonitoredArch(role="middle", arch_id="", macs=0, accuracy=0.5, loss=1.0, n=1),)


class NoNumber(Classification):
    """The loss of rank 1 is no number from the third step on."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        object.__setattr__(self, "left", 2 if rank == 1 else 99)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        losses = super().__call__(outputs, batch, taught)
        object.__setattr__(self, "left", self.left - 1)  # type: ignore[attr-defined]
        return {"loss": losses["loss"] * (1 if self.left >= 0 else torch.nan)}  # type: ignore[attr-defined]


def answers(engine: Engine, folder: Path) -> list[list[float]]:
    """What is learned from a teacher that is computed, kept and read, and how many answers were read."""
    found, data = [], synthetic(num_classes=4, image_size=8, n=64, seed=0)
    for kept in (None, folder, folder):
        network = supernet()
        loader = TrainBatches(
            data.train, Augment(), batch_size=8, seed=0, rank=engine.rank, world=engine.world
        )
        teacher = StoredTeacher(
            build(SPACE.largest(), generator=torch.Generator().manual_seed(1)), folder=kept
        )
        config = TrainConfig(epochs=1, monitor_every=0, warmup_epochs=0)
        fit(network, Soft(), ByRank(engine.rank), loader, config=config, engine=engine, teacher=teacher)
        sums = [float(value.double().abs().sum()) for value in network.state_dict().values()]
        found.append([teacher.read, *sums])
    return found


def lifts(engine: Engine) -> list[list[float]]:
    """What a loss trains itself, before each step: the last two groups of the optimizer."""
    sums: list[list[float]] = []

    class Looking(Failing):
        def before(self, moment: Moment) -> None:
            own = [p for group in moment.optimizer.param_groups[-2:] for p in group["params"]]
            sums.append([float(p.detach().double().abs().sum()) for p in own])

    task = Distillation(losses={"features": (Features(blocks=((-1, -1),)), 1.0)}, labels=Classification())
    teacher = Teacher(build(SPACE.largest(), generator=torch.Generator().manual_seed(1 + engine.rank)))
    config = TrainConfig(epochs=1, monitor_every=0, warmup_epochs=0)
    hooks, loader = [Looking("nowhere", 0, engine)], Failing("nowhere", 0, engine)
    fit(
        supernet(),
        task,
        ByRank(engine.rank),
        loader,
        config=config,
        engine=engine,
        hooks=hooks,
        teacher=teacher,
    )
    return sums


def self_taught(engine: Engine) -> dict[str, list[float]]:
    """The centre of a self-distillation after a step, and what this process alone would have made of it."""
    config = EsViTConfig(out_dim=4, hidden_dim=8, bottleneck_dim=4, local_crops_number=0, region=False)
    network = build(SPACE.smallest(), generator=torch.Generator().manual_seed(0)).eval()
    task, teacher, gives = config.task(), config.teacher(network), Gives(network, lambda: (3, 8, 8))
    with seeded_globals(0):
        task.meet(gives, gives)
    teacher.join(task)
    images, _ = batch(engine.rank)
    teacher.answer([images, images], ("views.0.view", "views.1.view"))
    own = task.own["view"](network(images, want=("pooled",))["pooled"]).mean(0) * (1 - config.center_momentum)
    teacher.after(1, 2, network)
    return {"centre": teacher.centre().tolist(), "alone": own.tolist()}


def faults(engine: Engine, folder: Path) -> dict[str, list[object]]:
    """What each rank hears of a fault that one of them met, and after how many seconds."""

    def train(where: str, rank: int, folder: Path | None = None) -> None:
        failing = Failing(where, rank, engine)
        config = TrainConfig(epochs=1, monitor_every=0.5, log_every=1, checkpoint_minutes=0, warmup_epochs=0)
        task = NoNumber(engine.rank) if where == "loss" else Classification()
        monitor: Any = failing
        fit(supernet(), task, ByRank(engine.rank), failing, config=config, engine=engine, folder=folder,
            hooks=[failing], monitor=monitor)  # fmt: skip

    def no_checkpoints() -> None:
        if engine.is_main:
            (folder / "full").mkdir()
            (folder / "full" / "checkpoints").touch()  # no folder can be made of that name
        engine.wait()
        train("nowhere", 0, folder / "full")

    def no_metrics() -> None:
        if engine.is_main:
            (folder / "unwritable" / "metrics.jsonl").mkdir(parents=True)
        engine.wait()
        train("nowhere", 0, folder / "unwritable")

    def other_folder() -> None:
        train("nowhere", 0, folder / "seen")
        train("nowhere", 0, folder / ("seen" if engine.is_main else "unseen"))

    def first_fails() -> None:
        raise OSError("the disk is on fire")

    def in_a_stage() -> None:
        with engine.together():
            if engine.rank == 1:
                raise ZeroDivisionError("a mistake of ours")
            engine.wait()

    def in_a_search() -> None:
        scored: list[Arch] = []

        def score(arch: Arch) -> dict[str, float]:
            scored.append(arch)
            time.sleep(0.3)  # over a minute for all of them
            if engine.rank == 1 and len(scored) == 3:
                raise UserError("the third Arch of rank 1 cannot be scored")
            return {"accuracy": 0.5, "loss": 0.7}

        config = SearchConfig(num_trials=150)
        searches = Searches(
            Context(Run(device="cpu"), folder / "failing").work,
            config,
            SPACE,
            Budget.parse("macs<=1G"),
            {},
            lambda: 100,
            "mark",
            FinalsConfig(),
        )
        with searches.run("search", "random", score):
            pass

    cases: dict[str, Callable[[], object]] = {
        **{f"{where} {rank}": partial(train, where, rank)
           for where in ("loader", "hook", "monitor") for rank in (0, 1)},
        "loss": partial(train, "loss", 1),
        "checkpoint": no_checkpoints,
        "metrics": no_metrics,
        "other folder": other_folder,
        "from_first": partial(engine.from_first, first_fails),
        "once": partial(Context(Run(device="cpu"), folder).work.once, folder / "never", first_fails),
        "stage": in_a_stage,
        "search": in_a_search,
    }  # fmt: skip
    heard: dict[str, list[object]] = {}
    for name, case in cases.items():
        start = time.monotonic()
        try:
            case()
        except Exception as error:
            heard[name] = [type(error).__name__, str(error), time.monotonic() - start]
    return heard


def rank_main(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    engine = Engine(cpu=torch.cuda.is_available())  # without a GPU nobody says so
    found = {
        "rank": engine.rank,
        "world": engine.world,
        "is_main": engine.is_main,
        "device": str(engine.device),
        "sum": float(engine.accelerator.reduce(torch.tensor(float(rank + 1)), reduction="sum")),
        "gradients": gradients(engine),
        "training": training(engine, folder),
        "lifts": lifts(engine),
        "self_taught": self_taught(engine),
        "answers": answers(engine, folder / "answers"),
        "reductions": reductions(engine),
        "searching": searching(engine, folder),
        "once": once(folder),
        "told": told(engine),
        "faults": faults(engine, folder),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    engine.close()


if __name__ == "__main__":
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    gc.freeze()  # a collection in a fork would copy the pages of all that was imported
    start_processes(rank_main, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
