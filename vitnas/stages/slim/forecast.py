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
from vitnas.slimming import fold
from vitnas.slimming.images import HELD, LOOKED_AT, MOST_HELD
from vitnas.slimming.sensitivity import MENDED
from vitnas.stages.forecast import eight_bit_s, typed
from vitnas.stages.results import FILES
from vitnas.stages.run import Run
from vitnas.stages.slim.allocate import SHORTLIST, TIMED
from vitnas.supernet import Supernet
from vitnas.train.progress import duration

IMAGES, STEP_S = 16, 1.0  # images of a timed step, fewer where it would take longer
FOLDED = 4  # times as many: what an image adds to a fold is little beside what a block takes
TIMING_S = 2.0  # of one network's latency
MEMBER = 2 / 3  # of the original's time is what a network of the front takes, on average
LEAST_STEPS = 100  # a training of fewer steps is not worth its name
CALIBRATION = (256, 512, 1024, 1536)  # images to fold by, of which the most that there is time for are taken
LESS = {  # what makes a part shorter
    "order": "importance=magnitude",
    "sensitivity": "space.heads=[0.5,1.0] space.hidden=[0.5,1.0]",
    "fold": "fewer images=",
    "files": "export.formats=[]",
    "clocks": "export.latency=[]",
    "results": "fewer data.max_images=",
}
FOLDING = 0.5  # of the time, at most, goes to more images than the fewest where there is training, too


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
        images: that activations are taken from; None for as many as there is time for.
        holdout, test: that members are held against the original on.
        train: in an epoch.
        options, folded_options: of genes of blocks that are tried where they lie, and of others, for each of which the
            whole is folded.
        blocks: of the network.
        members, formats: of the front, and of what each is exported to.
        tables, clocks: latency targets of the budget, and all.
    """

    images: int | None
    holdout: int
    test: int
    train: int
    batch_size: int
    options: int
    folded_options: int
    blocks: int
    members: int
    formats: tuple[str, ...]
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
    model, few, given = copy.deepcopy(original), images_BCHW[:2], images_BCHW
    with evaluating(model), torch.no_grad():
        n = int(len(few) * STEP_S / timed(lambda: model(few)))  # as many as a step of some length takes
        images_BCHW = images_BCHW[: max(2, min(IMAGES, n))]
        forward, n = timed(lambda: model(images_BCHW)), len(images_BCHW)
    learn = timed(lambda: _learn(model, images_BCHW), 1)
    arch, most, fewer = part.space.middle(), min(len(given), FOLDED * n), max(1, n // 4)
    folds = [timed(partial(fold, part, arch, [given[:taken]]), 3) for taken in (fewer, most)]
    image = max(0.0, (folds[1] - folds[0]) / max(1, most - fewer))
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
    """What each effort takes, and the one that is taken: that which `run` asks for, else the largest that fits; and how
    many images activations are taken from.

    Raises:
        UserError: not even folding fits the time (saying what it takes).
    """
    assert run.slim is not None
    given, asked, images = run.slim.seconds, run.slim.effort, amounts.images or CALIBRATION[0]
    rows = _rows(run, steps, amounts, images)
    fitting = [row.effort for row in rows if row.fits]
    if asked is None and not fitting:
        raise UserError(
            f"time is {run.slim.time}; the least effort, fold, takes about {duration(rows[0].seconds)} here. Give more "
            "time, fewer images= or data.max_images=, or say effort=fold to have it take what it takes."
        )
    effort = asked or fitting[-1]
    if amounts.images is None:
        room = given if effort == "fold" else FOLDING * given
        for more in CALIBRATION:
            folding = _rows(run, steps, amounts, min(more, amounts.train))[0]
            images = more if folding.seconds <= room else images
        images = min(images, max(CALIBRATION[0], amounts.train))
        rows = _rows(run, steps, amounts, images)
    return Forecast(
        time_s=given,
        measured=vars(steps),
        efforts=rows,
        effort=effort,
        asked=asked is not None,
        images=images,
    )


def _rows(run: Run, steps: Steps, amounts: Amounts, images: int) -> tuple[EffortForecast, ...]:
    assert run.slim is not None
    base = _base(steps, amounts, min(images, amounts.train))
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


def _base(steps: Steps, amounts: Amounts, images: int) -> dict[str, float]:
    """Seconds of what every effort does."""

    def folded(number: float) -> float:
        return amounts.blocks * (steps.fold_block + number * steps.fold_image)

    proposals = amounts.members - 1 + SHORTLIST
    looked = min(images, LOOKED_AT)
    held = min(MOST_HELD, looked * HELD)
    whole = MENDED + amounts.folded_options  # each folded and held against the network
    return {
        "order": looked * steps.train,
        # What lies before an option is not gone through again: half of the network, on average.
        "sensitivity": (amounts.options / 2 + 2 * whole) * held * steps.forward
        + whole * folded(looked - held),
        "fold": proposals * folded(images)
        + (amounts.members + MEMBER * proposals) * amounts.holdout * steps.forward,
        "files": (amounts.members + 1)
        * (
            len(amounts.formats) * steps.export
            + eight_bit_s(amounts.formats, steps.forward, amounts.holdout, amounts.blocks)
        ),
        "clocks": (TIMED * amounts.tables + (amounts.members + 1) * amounts.clocks) * TIMING_S,
        "results": (1 + MEMBER * amounts.members) * amounts.test * steps.forward,
    }


def to_shorten(found: Forecast) -> str:
    """What to change so that it takes half as long, or so that its longest part is shorter."""
    taken = found.taken
    if sum(taken.parts[name] for name in taken.epochs) > taken.seconds / 2:
        return f"half as long: time={typed(taken.seconds / 2)}"
    longest = max(LESS, key=lambda name: taken.parts[name])
    return f"what takes longest, {longest}, is shorter with {LESS[longest]}"
