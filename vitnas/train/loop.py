"""fit: the one training loop, for Supernets and for single Models.

Everything random (data order, augmentation, mixing, Archs, dropout) is a function of (seed, step, rank). A checkpoint
is therefore weights, optimizer state, what a Task trains itself, what an averaging teacher has become, and the step; a
run that was killed and resumed equals one that was not, bit for bit on a CPU.

Losses are not waited for. On an accelerator they are read every `READ_EVERY` steps, in one transfer; on a CPU, where
there is nothing to wait for, at every step before the weights are touched. Promised is: on a CPU the weights that a
non-finite loss leaves are those before its step; on an accelerator training stops at most `READ_EVERY` steps later;
and on both no checkpoint is written, and no network returned, whose weights are not all finite.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import Mixup
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.data import Augment, Images
from vitnas.data.augment import seed_from, seeded_globals
from vitnas.errors import UserError, first_line
from vitnas.model import Model
from vitnas.model.timm_cfg import take_images
from vitnas.sample import Draw, Hook, Moment, Sampler
from vitnas.stopping import deferred
from vitnas.supernet import Supernet
from vitnas.train.checkpoint import (
    check_identity,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from vitnas.train.config import TrainConfig
from vitnas.train.engine import Engine
from vitnas.train.feed import Batches, Feed, Views, endless
from vitnas.train.metrics import Hooked, Metrics, Monitored, MonitoredArch, Warned
from vitnas.train.monitor import Monitor, convergence_warning
from vitnas.train.optim import make_ema, make_mixup, make_optimizer, make_schedule, set_rates
from vitnas.train.progress import Progress, Silent
from vitnas.train.task import Batch, Task, read_views
from vitnas.train.teacher import Teacher, settled_task

READ_EVERY = 10


class NonFiniteLossError(UserError):
    """A loss, a gradient or a weight is no number. What is on disk is from before."""


@dataclass(frozen=True)
class Fitted:
    """What `fit` returns: the network to use (the average, if one was kept), steps done, and warnings.

    Args:
        images: how often an image was learned from, over all processes and Archs of a step.
        seconds: of work, also before the training was resumed.
    """

    network: nn.Module
    steps: int
    images: int
    seconds: float
    warning: str | None


def steps_between_readings(device: torch.device) -> int:
    """How often losses are looked at; each time the host waits for the device."""
    return 1 if device.type == "cpu" else READ_EVERY


def step_rng(seed: int, step: int, rank: int = 0) -> random.Random:
    """The stream of Archs of a step: the same in every process of this rank, and after a resume."""
    return random.Random(f"{seed}/{step}/{rank}")


def fit(
    network: nn.Module,
    task: Task,
    sampler: Sampler,
    loader: Batches | Iterable[tuple[Views, Tensor]],
    *,
    config: TrainConfig | None = None,
    teacher: Teacher | None = None,
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
        loader: `TrainBatches`, or any re-iterable of (images, class numbers), which resumes at an epoch's start. In
            place of images there may be several views of them, in a tuple or list.
        teacher: what the task's `wants_taught` is read from; without one, a Draw that distils learns from the step's
            first Draw.
        augment: its `mixup` and `cutmix` mix images and labels; `num_classes` is then needed.
        folder: run folder for metrics and checkpoints; None keeps nothing. A checkpoint found there is continued.
        stage: name of this training in the run folder.
        monitor: evaluates every `config.monitor_every` epochs.
        hooks: called before each step, after the sampler and the task where these are Hooks themselves.

    Raises:
        NonFiniteLossError: saying where; the docstring of this module says what weights are left.
        UserError: a checkpoint of another run, options that do not fit, a teacher that cannot teach this task.
    """
    config, progress = config or TrainConfig(), progress or Silent()
    engine = engine or Engine(precision=config.precision)
    if engine.precision != config.precision:
        raise UserError(
            f"config.precision is {config.precision!r}, engine's is {engine.precision!r}. Give both the same."
        )
    with nullcontext() if teacher is None else teacher.teaching(engine.device):
        with engine.together():
            training = _Training(
                network=network,
                task=task,
                sampler=sampler,
                batches=endless(loader),
                config=config,
                teacher=teacher,
                mixup=make_mixup(augment, num_classes, getattr(loader, "batch_size", 0) or 0),
                seed=seed,
                engine=engine,
                folder=folder,
                stage=stage,
                monitor=monitor,
                hooks=[hook for hook in (sampler, task, *hooks) if isinstance(hook, Hook)],
                progress=progress,
            )
            step = training.resume()
        with deferred():  # a checkpoint first
            training.run(step)
        warning = training.finish(num_classes)
    return Fitted(
        network=training.result,
        steps=training.steps,
        images=training.images * engine.world,
        seconds=training.seconds,
        warning=warning,
    )


@dataclass(eq=False, kw_only=True)
class _Training:
    """A training under way: what trains, by what, and how it is saved."""

    network: nn.Module
    task: Task
    sampler: Sampler
    batches: Batches
    config: TrainConfig
    teacher: Teacher | None
    mixup: Mixup | None
    seed: int
    engine: Engine
    folder: Path | None
    stage: str
    monitor: Monitor | None
    hooks: list[Hook]
    progress: Progress

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        config, network, engine = self.config, self.network, self.engine
        if config.drop_path is not None:
            if not isinstance(network, Model | Supernet):
                raise UserError(
                    f"drop_path is {config.drop_path}; training sets it in a Model or a Supernet, not in a "
                    f"{type(network).__name__}. Make the network with its own rate, and leave drop_path out."
                )
            network.set_drop_path(config.drop_path)
        network.to(engine.device).train()
        engine.broadcast(network)  # processes may have started with other weights
        own: Images | None = getattr(self.batches, "images", None)
        with seeded_globals(seed_from("task", self.seed)):  # for what the Task trains itself
            self.task = settled_task(
                self.task, network, self.teacher, getattr(own, "form", None), self.input_size
            )
        self.feed = Feed(
            batches=self.batches, task=self.task, mixup=self.mixup, seed=self.seed, engine=engine
        )
        if self.teacher is not None:
            engine.broadcast(self.teacher.network)
        trained = [network]
        if self.task.own is not None:
            trained.append(self.task.own.to(engine.device).train())
            engine.broadcast(self.task.own)
        self.steps_per_epoch = max(1, self.batches.steps_per_epoch // config.accumulate)
        self.steps = max(1, round(config.epochs * self.steps_per_epoch))
        self.optimizer = engine.prepare(make_optimizer(network, config, self.task.own))
        self.schedule = make_schedule(self.optimizer, config, self.steps, self.steps_per_epoch)
        if own is not None:
            take_images(network, own.form.cfg, own.class_names, several=own.several, scale=own.scale)
        self.ema = make_ema(network, config)
        self.parameters = [p for part in trained for p in part.parameters() if p.requires_grad]
        if self.teacher is not None:
            batches = self.steps * config.accumulate
            self.teacher.keep(self.task.wants_taught, self.feed, batches, self.progress.note)
        self.read_every = steps_between_readings(engine.device)
        self.log = Metrics(self.folder, self.stage, engine)
        self.checkpoint = (
            self.folder and self.folder / "checkpoints" / f"{self.stage.replace('/', '-')}.safetensors"
        )
        self.identity = {
            "stage": self.stage,
            "seed": self.seed,
            "steps": self.steps,
            "world": engine.world,
            "config": asdict(config),
        }
        self.saved, self.images = time.monotonic(), 0
        self.history: list[tuple[MonitoredArch, ...]] = []
        every = max(1, round(config.monitor_every * self.steps_per_epoch))
        watched = self.monitor is not None and config.monitor_every > 0
        self.monitored = {*range(every, self.steps + 1, every), self.steps} if watched else set()

    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        form = getattr(getattr(self.batches, "images", None), "form", None)
        if form is not None:
            return cast(tuple[int, int, int], form.input_size)
        images, _ = next(iter(self.batches.from_step(0)))
        channels, height, width = (images if isinstance(images, Tensor) else images[0]).shape[1:]
        return channels, height, width

    @property
    def seconds(self) -> float:
        """Of work, from the training's very beginning."""
        return time.monotonic() - self.began

    @property
    def result(self) -> nn.Module:
        """The network to use: the average, if one is kept."""
        return self.network if self.ema is None else self.ema.module

    def run(self, step: int) -> None:
        """All steps from `step` on. The last one is told of in `finish`.

        Telling of a step stands with the work of the next, so that the processes ask each other once for both.
        """
        first, stream = step, self.feed.from_step(step * self.config.accumulate)
        while step < self.steps:
            with self.engine.together():
                if step > first:
                    self.tell(step)
                    self.engine.stop_if_asked(partial(self.save, step))
                self.learn(step, stream)
            self.move(step)
            step += 1

    def learn(self, step: int, stream: Iterator[Batch]) -> None:
        """The gradients of a step."""
        set_rates(self.optimizer, self.schedule, self.config, step, self.steps_per_epoch)
        self.call_hooks(step)
        self.optimizer.zero_grad(set_to_none=True)
        with self.randomness(step):
            for micro in range(self.config.accumulate):
                batch = next(stream)
                number = step * self.config.accumulate + micro
                draws = self.sampler.draw(step_rng(self.seed, number, self.engine.rank))
                self.accumulate(step, batch, draws)
        if self.is_read(step):
            self.check_finite()

    def move(self, step: int) -> None:
        """Move the weights, and what follows them."""
        self.engine.average_gradients(self.parameters)
        norm = self.engine.clip(
            self.parameters, self.config.clip_grad, per_tensor=self.config.clip_per_tensor
        )
        if self.config.precision != "fp16":  # whose loss scaling skips steps without a finite gradient
            self.log.add_norm(step, norm)
            if self.is_read(step):  # the same in all processes, as all have the same gradient now
                self.check_finite()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.network, step=step + 1)
        if self.teacher is not None:
            self.teacher.after(step + 1, self.steps, self.network)

    def tell(self, step: int) -> None:
        """What is written and shown after a step, and the checkpoint."""
        epoch, lr = step / self.steps_per_epoch, max(group["lr"] for group in self.optimizer.param_groups)
        if step % self.config.log_every == 0 or step == self.steps:
            self.check_finite()
            self.log.check_folder()
            self.log.step(step, epoch, lr)
        self.progress.update(self.stage, step, self.steps, self.log.text)
        if step in self.monitored:
            self.history.append(self.watch(step, epoch))
        if time.monotonic() - self.saved >= 60 * self.config.checkpoint_minutes and step < self.steps:
            self.save(step)
            self.saved = time.monotonic()

    def finish(self, num_classes: int | None) -> str | None:
        """Tell of the last step; returns why the Supernet should not be trusted yet, or None.

        Raises:
            NonFiniteLossError: the last step left weights that are not finite.
        """
        with self.engine.together():
            self.tell(self.steps)
            self.check_weights(self.steps)
            warning = None
            if isinstance(self.network, Supernet):
                classes = num_classes or self.network.space.largest().num_classes
                warning = convergence_warning(self.history, classes)
            if warning:
                self.log.write(Warned, step=self.steps, text=warning)
            self.progress.done(self.stage, warning)
        self.engine.release()
        return warning

    def call_hooks(self, step: int) -> None:
        epoch = step / self.steps_per_epoch
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        moment = Moment(step, self.steps, epoch, self.seed, self.network, optimizer, self.engine.share)
        for hook in self.hooks:
            record = hook.before(moment)
            if record is not None:
                event = type(hook).__name__.lower()
                self.log.write(Hooked, event=event, step=step, epoch=epoch, said=dict(record))
        if self.teacher is not None:
            self.teacher.before(moment)

    def randomness(self, step: int) -> Any:
        """Seed dropout and stochastic depth for this step and rank; the host's generators are restored."""
        seed = seed_from("step", self.seed, step, self.engine.rank)
        if self.engine.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return seeded_globals(seed)

    def accumulate(self, step: int, batch: Batch, draws: list[Draw]) -> None:
        """Add the gradients of all draws of one batch."""
        task = self.task
        answers: dict[str, Tensor] = {}
        first: dict[str, Tensor] = {}
        if self.teacher is not None:
            with self.engine.autocast():
                answers = self.teacher.answer(batch.views, task.wants_taught, batch.at)
        distils = self.teacher is None and any(draw.distill for draw in draws)
        for draw in draws:
            rows = draw.rows(len(batch))
            part = batch.part(rows)
            taught = {name: output[rows] for name, output in answers.items()} or (
                first if draw.distill else {}
            )
            teaches = distils and not first and draw.part[1] == 1
            with self.engine.autocast():
                want = (*task.wants, *task.wants_taught) if teaches else task.wants
                outputs = read_views(self.network, part.views, want, arch=draw.arch)
                losses = task(outputs, part, taught)
            self.engine.backward(losses["loss"] * (draw.weight / self.config.accumulate))
            if teaches:
                names = {name.removesuffix("?") for name in task.wants_taught}
                first = {name: output.detach() for name, output in outputs.items() if name in names}
            self.log.add(step, draw.arch, losses, len(part))
            self.images += len(part)

    def is_read(self, step: int) -> bool:
        """Losses are looked at in this step, before the weights move."""
        return (step + 1) % self.read_every == 0

    def check_finite(self) -> None:
        """Raise NonFiniteLossError if a loss or a gradient since the last call was not finite."""
        bad = self.log.read()
        if bad is None:
            return
        step, what, value = bad
        where = f"at step {step} (epoch {step / self.steps_per_epoch:.1f})"
        left = (
            "The weights are those before this step."
            if self.read_every == 1
            else "What is on disk is from before this step."
        )
        if what == "gradient":
            raise NonFiniteLossError(
                f"the gradient's norm is {value} {where} although the loss is finite; training stops. {left} Lower lr "
                "or use fp32."
            )
        name = f"Arch {what.id}" if isinstance(what, Arch) else "the network"
        raise NonFiniteLossError(
            f"the loss of {name} is {value} {where}; training stops. {left} Lower lr or clip_grad, or use precision "
            "fp32 or bf16."
        )

    def check_weights(self, step: int) -> None:
        """Raise NonFiniteLossError unless all weights are finite."""
        named = dict(self.result.named_parameters())
        finite = torch.stack([parameter.isfinite().all() for parameter in named.values()]).tolist()
        if not all(finite):
            bad = next(name for name, good in zip(named, finite, strict=True) if not good)
            raise NonFiniteLossError(
                f"{bad} is not finite after step {step}; training stops. What is on disk is from before. Lower lr or "
                "clip_grad, or use precision fp32 or bf16."
            )

    def watch(self, step: int, epoch: float) -> tuple[MonitoredArch, ...]:
        assert self.monitor is not None
        archs = self.monitor(self.result)
        self.log.write(Monitored, step=step, epoch=epoch, archs=archs)
        for arch in archs[:3]:  # the random ones go to metrics.jsonl only
            self.engine.track({f"accuracy/{arch.role}": arch.accuracy}, step)
        what = "accuracy" if archs[0].error is None else "R²"
        self.progress.note(f"{what} {', '.join(map(str, archs[:3]))}")
        return archs

    def save(self, step: int) -> None:
        """Write the checkpoint, in the first process."""
        if self.checkpoint is None or not self.engine.is_main:
            return
        self.log.check_folder()
        self.check_finite()
        self.check_weights(step)
        tensors, meta = optimizer_tensors(self.optimizer)
        parts = {"network": self.network.state_dict(), "optimizer": tensors}
        if self.ema is not None:
            parts["ema"] = self.ema.module.state_dict()
        if self.teacher is not None:
            parts["teacher"] = self.teacher.tensors()
        if self.task.own is not None:
            parts["task"] = self.task.own.state_dict()
        parts |= {f"hook{i}": hook.tensors() for i, hook in enumerate(self.hooks)}
        scaler = self.engine.scaler_state()
        spent = {"images": self.images, "seconds": self.seconds}
        here = {"step": step, "done": self.feed.done(step * self.config.accumulate)}
        also = {"optimizer": meta, "scaler": scaler, "spent": spent, "sums": self.log.sums}
        save_checkpoint(self.checkpoint, parts, {**self.identity, **here, **also})

    def resume(self) -> int:
        """Continue from the checkpoint, if there is one; returns the step to do next.

        Raises:
            UserError: it is of another run, or the processes do not see the same one.
        """
        step = 0 if self.checkpoint is None or not self.checkpoint.exists() else self.load(self.checkpoint)
        if step != (first := self.engine.from_first(lambda: step)):
            raise UserError(
                f"the first process continues at step {first}, process {self.engine.rank} at step {step}; all must see "
                "the same run folder. Use one on a shared disk."
            )
        self.history = self.log.truncate(step / self.steps_per_epoch)
        return step

    def load(self, path: Path) -> int:
        """Take back what `save` wrote; returns its step."""
        parts, meta = load_checkpoint(path)
        is_same_world = meta.get("world") == self.engine.world or "done" not in meta
        free = () if is_same_world else ("world", "steps")
        check_identity(path, meta, {key: value for key, value in self.identity.items() if key not in free})
        try:
            self.network.load_state_dict(parts["network"])
            restore_optimizer(self.optimizer, parts["optimizer"], meta["optimizer"])
            if self.teacher is not None:
                self.teacher.restore(parts.get("teacher", {}))
            if self.task.own is not None:
                self.task.own.load_state_dict(parts.get("task", {}))
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} is of another network, optimizer or teacher ({first_line(error)}). Use another run "
                "folder, or delete the checkpoint to start this stage anew."
            ) from error
        if self.ema is not None:
            self.ema.module.load_state_dict(parts["ema"])
        for i, hook in enumerate(self.hooks):
            hook.restore(parts.get(f"hook{i}", {}))
        self.engine.restore_scaler(meta["scaler"])
        self.log.restore(meta.get("sums", {}) if is_same_world else {})
        spent = meta.get("spent", {"images": 0, "seconds": 0.0})  # older checkpoints do not say
        self.images, self.began = spent["images"], self.began - spent["seconds"]
        return int(meta["step"]) if is_same_world else self.go_on_from(meta["done"], meta["world"])

    def go_on_from(self, done: tuple[int, int], world: int) -> int:
        """The step to do next where `world` processes began and others go on, behind as many images of the epoch."""
        step = min(self.steps, -(-self.feed.number_behind(*done) // self.config.accumulate))
        self.progress.note(
            f"{self.stage}: {world} processes began, {self.engine.world} go on at epoch "
            f"{step / self.steps_per_epoch:.1f} with the images that are left of it; as a step has another number of "
            "images now, weights will be others than with one number throughout"
        )
        return step
