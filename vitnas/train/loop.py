"""fit: the one training loop, for Supernets and for single Models.

Everything random (data order, augmentation, mixing, Archs, dropout) is a function of (seed, step, rank). A checkpoint
is therefore weights, optimizer state and the step, and a run that was killed and resumed equals one that was not, bit
for bit on a CPU.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.data import Augment
from vitnas.data.augment import seed_from, seeded_globals
from vitnas.errors import UserError
from vitnas.runs import append_jsonl, read_jsonl, write_atomic
from vitnas.sample import Draw, Hook, Moment, Sampler
from vitnas.train.checkpoint import (
    difference,
    is_harmless,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from vitnas.train.config import TrainConfig
from vitnas.train.engine import Engine
from vitnas.train.monitor import Monitor, convergence_warning
from vitnas.train.optim import make_ema, make_mixup, make_optimizer, make_schedule
from vitnas.train.progress import Progress, Silent
from vitnas.train.task import Batch, Mixes, Task


class Batches(Protocol):
    """Endless training batches that can start at any step (`vitnas.data.TrainBatches`)."""

    steps_per_epoch: int

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]: ...


class NonFiniteLossError(UserError):
    """The loss is no number; the weights are those before the step."""


@dataclass(frozen=True)
class Fitted:
    """What `fit` returns: the network to use (the average, if one was kept), steps done, seconds, and warnings."""

    network: nn.Module
    steps: int
    seconds: float
    warning: str | None


def step_rng(seed: int, step: int, rank: int = 0) -> random.Random:
    """The stream of Archs of a step: the same in every process of this rank, and after a resume."""
    return random.Random(f"{seed}/{step}/{rank}")


def fit(
    network: nn.Module,
    task: Task,
    sampler: Sampler,
    loader: Batches | Iterable[tuple[Tensor, Tensor]],
    *,
    config: TrainConfig | None = None,
    augment: Augment | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    engine: Engine | None = None,
    folder: Path | None = None,
    stage: str = "train",
    monitor: Monitor | None = None,
    hooks: Iterable[Hook] = (),
    progress: Progress | None = None,
) -> Fitted:
    """Train `network` in place.

    Args:
        network: a Supernet, or any network when `sampler` is `Fixed()`.
        task: losses of a batch.
        sampler: which Archs train at a step.
        loader: `TrainBatches`, or any re-iterable of (images, class numbers), which resumes at an epoch's start.
        augment: its `mixup` and `cutmix` mix images and labels; `num_classes` is then needed.
        folder: run folder for metrics and checkpoints; None keeps nothing. A checkpoint found there is continued.
        stage: name of this training in the run folder.
        monitor: evaluates a few Archs every `config.monitor_every` epochs.
        hooks: called before each step, after the sampler and the task where these are Hooks themselves.

    Raises:
        NonFiniteLossError: before the weights are touched, saying where.
        UserError: a checkpoint of another run, options that do not fit.
    """
    config, progress = config or TrainConfig(), progress or Silent()
    engine = engine or Engine(precision=config.precision)
    if engine.precision != config.precision:
        raise UserError(
            f"config.precision is {config.precision!r}, engine's is {engine.precision!r}. Give both the same."
        )
    batches = cast(Batches, loader) if hasattr(loader, "from_step") else _Plain(loader)
    network.to(engine.device).train()
    engine.broadcast(network)  # processes may have started with other weights
    steps_per_epoch = max(1, batches.steps_per_epoch // config.accumulate)
    steps = max(1, round(config.epochs * steps_per_epoch))
    optimizer = engine.prepare(make_optimizer(network, config))
    run = _Run(
        config=config,
        network=network,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, config, steps, steps_per_epoch),
        ema=make_ema(network, config),
        mix=make_mixup(augment, num_classes, getattr(batches, "batch_size", 0)),
        engine=engine,
        log=_Log(folder, stage, engine),
        checkpoint=folder and folder / "checkpoints" / f"{stage.replace('/', '-')}.safetensors",
        identity={
            "stage": stage,
            "seed": seed,
            "steps": steps,
            "world": engine.world,
            "config": asdict(config),
        },
        seed=seed,
        hooks=[hook for hook in (sampler, task, *hooks) if isinstance(hook, Hook)],
    )
    start = time.monotonic()
    step = run.resume()
    history = run.log.truncate(step)
    saved = time.monotonic()
    stream = batches.from_step(step * config.accumulate)
    parameters = [p for p in network.parameters() if p.requires_grad]
    monitor_steps = _monitor_steps(config, steps, steps_per_epoch) if monitor else set()

    while step < steps:
        if run.schedule is not None:
            run.schedule.step_update(step)
        run.call_hooks(step, steps, step / steps_per_epoch)
        optimizer.zero_grad(set_to_none=True)
        with run.randomness(step):
            for micro in range(config.accumulate):
                batch = run.mixed(*next(stream))
                batch = task.mix(batch) if isinstance(task, Mixes) else batch
                draws = sampler.draw(step_rng(seed, step * config.accumulate + micro, engine.rank))
                _accumulate(run, task, batch, draws)
        run.check_finite(step, steps_per_epoch)
        engine.average_gradients(parameters)
        run.check_gradient(engine.clip(parameters, config.clip_grad), step, steps_per_epoch)
        optimizer.step()
        step += 1
        if run.ema is not None:
            run.ema.update(network, step=step)
        run.log.step(step, step / steps_per_epoch, optimizer.param_groups[0]["lr"], config.log_every, steps)
        progress.update(stage, step, steps, run.log.text)
        if step in monitor_steps and monitor is not None:
            history.append(run.monitor(monitor, step, step / steps_per_epoch, progress))
        if time.monotonic() - saved >= 60 * config.checkpoint_minutes and step < steps:
            run.save(step)
            saved = time.monotonic()

    warning = convergence_warning(history, _classes(num_classes, network)) if monitor else None
    if warning:
        run.log.write({"event": "warning", "step": step, "text": warning})
    progress.done(stage, warning)
    engine.release()
    final = network if run.ema is None else run.ema.module
    return Fitted(network=final, steps=steps, seconds=time.monotonic() - start, warning=warning)


@dataclass
class _Run:
    """What the loop holds: the parts that train, and how they are saved."""

    config: TrainConfig
    network: nn.Module
    optimizer: Any
    schedule: Any
    ema: ModelEmaV3 | None
    mix: Mixup | None
    engine: Engine
    log: _Log
    checkpoint: Path | None
    identity: dict[str, Any]
    seed: int
    hooks: list[Hook]

    def call_hooks(self, step: int, steps: int, epoch: float) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        moment = Moment(step, steps, epoch, self.seed, self.network, optimizer, self.engine.share)
        for hook in self.hooks:
            told = hook.before(moment)
            if told is not None:
                self.log.write({"event": type(hook).__name__.lower(), "step": step, "epoch": epoch, **told})

    def randomness(self, step: int) -> Any:
        """Seed dropout, stochastic depth and mixing for this step and rank; other users' generators are restored."""
        seed = seed_from("step", self.seed, step, self.engine.rank)
        if self.engine.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return seeded_globals(seed)

    def mixed(self, images_BCHW: Tensor, targets_B: Tensor) -> Batch:
        images_BCHW = images_BCHW.to(self.engine.device, non_blocking=True)
        targets_B = targets_B.to(self.engine.device, non_blocking=True)
        if self.mix is not None:
            images_BCHW, targets_B = self.mix(images_BCHW, targets_B)
        return Batch(images_BCHW, targets_B)

    def check_finite(self, step: int, steps_per_epoch: int) -> None:
        bad = self.log.first_bad()
        if bad is not None:
            arch, value = bad
            name = "the network" if arch is None else f"Arch {arch.id}"
            raise NonFiniteLossError(
                f"the loss of {name} is {value} at step {step} (epoch {step / steps_per_epoch:.1f}); training stops. "
                "The weights are those before this step. Lower lr or clip_grad, or use precision fp32 or bf16."
            )

    def check_gradient(self, norm: Tensor, step: int, steps_per_epoch: int) -> None:
        """A finite loss can have a gradient that is not; fp16's loss scaling skips such steps by itself."""
        if self.config.precision != "fp16" and not bool(torch.isfinite(norm)):
            raise NonFiniteLossError(
                f"the gradient's norm is {float(norm)} at step {step} (epoch {step / steps_per_epoch:.1f}) although "
                "the loss is finite; training stops. The weights are those before this step. Lower lr or use fp32."
            )

    def monitor(self, monitor: Monitor, step: int, epoch: float, progress: Progress) -> list[dict[str, Any]]:
        records = monitor(self.network if self.ema is None else self.ema.module)
        self.log.write({"event": "monitor", "step": step, "epoch": epoch, "archs": records})
        for record in records[:3]:  # the random ones go to metrics.jsonl only
            self.engine.track({f"accuracy/{record['role']}": record["accuracy"]}, step)
        progress.note("accuracy " + ", ".join(f"{r['role']} {r['accuracy']:.1%}" for r in records[:3]))
        return records

    def save(self, step: int) -> None:
        if self.checkpoint is None:
            return
        if self.engine.is_main:
            tensors, meta = optimizer_tensors(self.optimizer)
            parts = {"network": self.network.state_dict(), "optimizer": tensors}
            if self.ema is not None:
                parts["ema"] = self.ema.module.state_dict()
            parts |= {f"hook{i}": hook.tensors() for i, hook in enumerate(self.hooks)}
            scaler = self.engine.scaler_state()
            save_checkpoint(
                self.checkpoint, parts, {**self.identity, "step": step, "optimizer": meta, "scaler": scaler}
            )

    def resume(self) -> int:
        """Continue from the checkpoint, if there is one; returns the step to do next."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0
        parts, meta = load_checkpoint(self.checkpoint)
        for key, value in self.identity.items():
            if meta.get(key) != value and not is_harmless(key, meta.get(key), value):
                raise UserError(
                    f"{self.checkpoint} is of a run with another {key} ({difference(meta.get(key), value)}). Use the "
                    "same values, another run folder, or delete the checkpoint to start this stage anew."
                )
        try:
            self.network.load_state_dict(parts["network"])
            restore_optimizer(self.optimizer, parts["optimizer"], meta["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.checkpoint} is of another network or optimizer ({str(error).splitlines()[0]}). Use another "
                "run folder, or delete the checkpoint to start this stage anew."
            ) from error
        if self.ema is not None:
            self.ema.module.load_state_dict(parts["ema"])
        for i, hook in enumerate(self.hooks):
            hook.restore(parts.get(f"hook{i}", {}))
        self.engine.restore_scaler(meta["scaler"])
        return int(meta["step"])


class _Log:
    """Running means of the losses, the speed, and metrics.jsonl (written by the first process only)."""

    def __init__(self, folder: Path | None, stage: str, engine: Engine) -> None:
        self._path = None if folder is None else folder / "metrics.jsonl"
        self._stage, self._engine = stage, engine
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}  # per name: not every draw of a step has every loss
        self._images = 0
        self._since = time.monotonic()
        self._pending: list[tuple[Arch | None, dict[str, Tensor]]] = []
        self.text = ""

    def add(self, arch: Arch | None, losses: dict[str, Tensor], images: int) -> None:
        self._pending.append((arch, {name: value.detach() for name, value in losses.items()}))
        self._images += images

    def first_bad(self) -> tuple[Arch | None, float] | None:
        """The first Arch of this step whose loss is not finite; reads the losses, which waits for the device."""
        bad = None
        for arch, losses in self._pending:
            for name, value in losses.items():
                number = float(value)
                self._sums[name] = self._sums.get(name, 0.0) + number
                self._counts[name] = self._counts.get(name, 0) + 1
                if name == "loss" and not math.isfinite(number) and bad is None:
                    bad = arch, number
        self._pending.clear()
        return bad

    def step(self, step: int, epoch: float, lr: float, every: int, steps: int) -> None:
        if step % every and step != steps:
            return
        now = time.monotonic()
        speed = self._images * self._engine.world / max(now - self._since, 1e-9)
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        record = {"step": step, "epoch": epoch, **means, "lr": lr, "images_per_s": speed}
        self.write(record)
        tracked = {**means, "lr": lr, "images_per_s": speed}
        self._engine.track({f"{self._stage}/{name}": value for name, value in tracked.items()}, step)
        self.text = f"loss {means['loss']:.3f}, {speed:,.0f} images/s"
        self._sums, self._counts, self._images, self._since = {}, {}, 0, now

    def write(self, record: dict[str, Any]) -> None:
        if self._path is not None and self._engine.is_main:
            append_jsonl(self._path, {"stage": self._stage, **record})

    def truncate(self, step: int) -> list[list[dict[str, Any]]]:
        """Drop this stage's lines after `step` (a killed run wrote them); returns the monitor records kept."""
        if self._path is None or not self._path.exists():
            return []
        try:
            records = list(read_jsonl(self._path))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._path} cannot be read ({error}); every line must be a JSON object. Delete the bad lines."
            ) from error
        kept = [r for r in records if r.get("stage") != self._stage or r.get("step", 0) <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        # Compared as a whole: a line cut short by a kill goes too, or else the next one would be glued to it.
        if self._engine.is_main and self._path.read_bytes() != text.encode():
            write_atomic(self._path, text)
        self._engine.wait()
        return [r["archs"] for r in kept if r.get("stage") == self._stage and r.get("event") == "monitor"]


class _Plain:
    """Any re-iterable loader, made endless. It starts at the beginning of an epoch whatever the step."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.steps_per_epoch = len(loader)

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self._loader


def _accumulate(run: _Run, task: Task, batch: Batch, draws: list[Draw]) -> None:
    """Gradients of all draws of one batch."""
    teacher_BY: Tensor | None = None
    size = len(batch.images_BCHW)
    for draw in draws:
        rows = draw.rows(size)
        part = batch.part(rows, teacher_BY if draw.distill else None)
        with run.engine.autocast():
            losses, logits_BY = task(run.network, part, draw.arch)
        run.engine.backward(losses["loss"] * (draw.weight / run.config.accumulate))
        if teacher_BY is None and draw.part[1] == 1:
            teacher_BY = logits_BY.detach()
        run.log.add(draw.arch, losses, len(part.images_BCHW))


def _monitor_steps(config: TrainConfig, steps: int, steps_per_epoch: int) -> set[int]:
    if not config.monitor_every:
        return set()
    every = max(1, round(config.monitor_every * steps_per_epoch))
    return {*range(every, steps + 1, every), steps}


def _classes(num_classes: int | None, network: nn.Module) -> int:
    if num_classes is not None:
        return num_classes
    space = getattr(network, "space", None)
    return int(space.largest().num_classes) if space is not None else 2
