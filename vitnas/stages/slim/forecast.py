"""What each effort will take here, from a few steps that are really done, and the largest that fits the time given."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.errors import UserError
from vitnas.exporting.quick import export_quickly
from vitnas.model import Model
from vitnas.model.modes import evaluating
from vitnas.records import Effort, EffortForecast, Forecast
from vitnas.reporting.slimming import duration
from vitnas.slimming import fold
from vitnas.stages.results import FILES
from vitnas.stages.run import Run
from vitnas.stages.slim.allocate import SHORTLIST, TIMED
from vitnas.supernet import Supernet

IMAGES, STEP_S = 16, 1.0  # images of a timed step, fewer where it would take longer
MEASURED_ON = 64  # images at most that an option's damage is measured on
TIMING_S = 2.0  # of one network's latency
LEAST_STEPS = 100  # a training of fewer steps is not worth its name


@dataclass(frozen=True)
class Steps:
    """Seconds of single steps on this machine.

    Args:
        forward, train: of one image through the network, and of learning from one with the network as teacher.
        fold_block, fold_image: of folding one block, whatever the number of images, and of each image in that.
        export: of one file, verified.
    """

    forward: float
    train: float
    fold_block: float
    fold_image: float
    export: float


@dataclass(frozen=True)
class Amounts:
    """How often a run does such a step.

    Args:
        images: that activations are taken from.
        holdout: that members are held against the original on.
        train: in an epoch.
        options, folded_options: of genes of blocks, each of which is tried once where it lies, and of others, for each
            of which the whole is folded.
        blocks: of the network.
        members, files: of the front, and exported of each.
        tables, clocks: latency targets of the budget, and all.
    """

    images: int
    holdout: int
    train: int
    batch_size: int
    options: int
    folded_options: int
    blocks: int
    members: int
    files: int
    tables: int
    clocks: int


def timed(do: Callable[[], object], repeats: int = 2) -> float:
    """Seconds of the fastest call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        do()
        best = min(best, time.perf_counter() - start)
    return best


def time_steps(original: Model, part: Supernet, images_BCHW: Tensor, *, exports: bool) -> Steps:
    """Time a few steps.

    Args:
        part: a Supernet around a network of the original's first block alone.
        images_BCHW: at least two.
    """
    model, few = copy.deepcopy(original), images_BCHW[:2]
    with evaluating(model), torch.no_grad():
        n = int(len(few) * STEP_S / timed(lambda: model(few)))  # as many as a step of some length takes
        images_BCHW = images_BCHW[: max(2, min(IMAGES, n))]
        forward, n = timed(lambda: model(images_BCHW)), len(images_BCHW)
    learn = timed(lambda: _learn(model, images_BCHW), 1)
    arch, fewer = part.space.middle(), max(1, n // 4)
    folds = [timed(partial(fold, part, arch, [images_BCHW[:taken]])) for taken in (fewer, n)]
    image = max(0.0, (folds[1] - folds[0]) / max(1, n - fewer))
    file = 0.0
    if exports:
        with tempfile.TemporaryDirectory() as folder:
            file = timed(lambda: export_quickly(model.eval(), Path(folder) / FILES["onnx"], images_BCHW), 1)
    return Steps(forward / n, learn / n, max(0.0, folds[0] - fewer * image), image, file)


def _learn(model: nn.Module, images_BCHW: Tensor) -> None:
    """A step of distillation towards itself, which changes nothing."""
    with torch.no_grad():
        taught = model(images_BCHW)
    model.train()
    functional.mse_loss(model(images_BCHW), taught).backward()
    model.zero_grad(set_to_none=True)


def forecast(run: Run, steps: Steps, amounts: Amounts) -> Forecast:
    """What each effort takes, and the one that is taken: that which `run` asks for, else the largest that fits.

    Raises:
        UserError: not even folding fits the time (saying what it takes).
    """
    assert run.slim is not None
    given, rows = run.slim.seconds, _rows(run, steps, amounts)
    asked = run.slim.effort
    fitting = [row.effort for row in rows if row.fits]
    if asked is None and not fitting:
        raise UserError(
            f"time is {run.slim.time}; the least effort, fold, takes about {duration(rows[0].seconds)} here. Give more "
            "time, fewer images=, or say effort=fold to have it take what it takes."
        )
    return Forecast(
        time_s=given, measured=vars(steps), efforts=rows, effort=asked or fitting[-1], asked=asked is not None
    )


def _rows(run: Run, steps: Steps, amounts: Amounts) -> tuple[EffortForecast, ...]:
    assert run.slim is not None
    compared = 2 * amounts.holdout * steps.forward
    folded = amounts.blocks * (steps.fold_block + amounts.images * steps.fold_image)
    held = min(MEASURED_ON, amounts.images / 4)
    base = {
        "order": amounts.images * steps.train,
        # What lies before an option is not gone through again: half of the network, on average.
        "sensitivity": amounts.options * held * steps.forward / 2 + (1 + amounts.folded_options) * folded,
        "fold": (amounts.members - 1 + SHORTLIST) * (folded + compared),
        "files": (amounts.members + 1) * amounts.files * steps.export,
        "clocks": (TIMED * amounts.tables + (amounts.members + 1) * amounts.clocks) * TIMING_S,
    }
    rows: list[EffortForecast] = []
    epoch_s = amounts.train * steps.train
    least = LEAST_STEPS * amounts.batch_size / amounts.train
    trainings: dict[Effort, dict[str, float]] = {
        "fold": {},
        "recover": {"recover": 1.0},
        "search": {"recover": 0.5, "train": 0.5},
    }
    for effort, trained in trainings.items():
        left = run.slim.seconds - sum(base.values())
        parts, epochs = dict(base), {}
        for name, share in trained.items():
            config, cost = (run.retrain.train, epoch_s) if name == "recover" else (run.supernet, 4 * epoch_s)
            room = max(0.0, left * share / cost)
            epochs[name] = min(config.epochs, max(room, min(least, config.epochs)))
            parts[name] = epochs[name] * cost
        seconds = sum(parts.values())
        rows.append(EffortForecast(effort, seconds, parts, epochs, seconds <= run.slim.seconds))
    return tuple(rows)
