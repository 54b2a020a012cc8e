"""What a run will take here, from steps that are really done: told before it begins, and kept to the time given."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import mean

import torch
from torch import nn

from vitnas.arch import Arch
from vitnas.budget import Budget, Limit
from vitnas.counting import count
from vitnas.data import TrainBatches
from vitnas.errors import UserError
from vitnas.exporting.precision import CALIBRATED, TRIED
from vitnas.measure.memory import peak_process_bytes
from vitnas.model import build
from vitnas.reporting.tables import Table, room
from vitnas.sample import Fixed, NearBudget, Sampler
from vitnas.sample.near import use_of
from vitnas.searching import Feasibility
from vitnas.searching.latency import measure_ms
from vitnas.stages.context import Context
from vitnas.stages.finals import epochs_in_all, lengths
from vitnas.stages.hand_scaled import patch_sizes
from vitnas.stages.models import roles_of
from vitnas.stages.outlook import LEAST_RANKED, Outlook, distrusting, shortened
from vitnas.stages.results import timed_on
from vitnas.stages.run import Run
from vitnas.stages.training import make_task
from vitnas.stages.work import quick_meter
from vitnas.train import CombinedSides, Silent, TrainConfig, evaluate, fit
from vitnas.train.progress import duration

TIMED = 4  # steps, of which the first is not counted
LOOKED_AT = 128  # images
FILE_S, TIMING_S = 8.0, 2.0  # an exported file with its check, a network's latency on one target
FRONT = 10  # Archs that a front has, about
MONITORED = 6
LIKELY, NEAR = 3, 0.7  # Archs whose training is timed, and the least share of the budget that they use
RARE = 0.05  # Archs that meet a limit of latency are taken to be no rarer: a search finds more of them than chance
SHAPES = 3  # hand-scaled ViTs per patch size of which one is taken
SHORT_MACS = 1e11  # some ten seconds of a core
LEAST_EPOCHS = 2.0  # a supernet of fewer ranks nothing


class Clock(Silent):
    """Notes when steps are done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def update(self, stage: str, step: int, steps: int, text: str = "") -> None:
        self.times.append(time.perf_counter())

    @property
    def step_s(self) -> float:
        """Seconds of the fastest step but the first; others may be at work."""
        return min(later - earlier for earlier, later in itertools.pairwise(self.times))


def few_steps(config: TrainConfig, loader: TrainBatches) -> TrainConfig:
    """A training of as many steps as are timed."""
    per_epoch = max(1, loader.steps_per_epoch // config.accumulate)
    return replace(config, epochs=TIMED / per_epoch, warmup_epochs=0, monitor_every=0)


def is_short(context: Context) -> bool:
    """Whether a run's trainings are so small that to look ahead would be a good part of it."""
    run, images = context.asked, len(context.data.train)
    trained = run.supernet.epochs + run.retrain.train.epochs * len(roles_of(run.retrain, context.teacher))
    return 3 * trained * images * count(context.space.largest()).macs < SHORT_MACS


def outlook(context: Context, feasible: Feasibility) -> Outlook:
    """outlook.json of a run's folder, and the run as long as it leaves it; all processes ask."""
    ahead = look_ahead(context, feasible)
    found: Outlook = context.engine.from_first(lambda: ahead)  # so that all shorten it alike
    context.engine.from_first(lambda: found.write(context.folder))
    context.settle()
    return found


def look_ahead(context: Context, feasible: Feasibility) -> Outlook:
    """Do a few steps, and say what all of them take; with `time`, how much of it is done.

    Args:
        feasible: how many Archs miss a limit of latency, which are timed all the same.

    Raises:
        UserError: the time is too short for any training.
    """
    run, data = context.asked, context.data
    supernet = context.new_supernet()
    params = sum(p.numel() for p in supernet.parameters())
    step_s = _step(context, supernet, context.sampler.make(), run.supernet)
    few = context.images.batches(data.holdout.subset(range(min(LOOKED_AT, len(data.holdout)))))
    archs, began = likely(context, feasible), time.perf_counter()
    looked = sum(evaluate(supernet, few, arch).n for arch in archs)
    image_s = (time.perf_counter() - began) / max(1, looked)
    models = [build(arch, generator=context.work.generator("forecast")) for arch in archs]
    model_step_s = mean(_step(context, model, Fixed(), run.retrain.train) for model in models)
    clock_s = _clock(context, feasible)
    costs = partial(
        _costs, context, step_s=step_s, model_step_s=model_step_s, image_s=image_s, clock_s=clock_s
    )
    share = 1.0
    if run.time is not None:
        whole, half = (sum(costs(shortened(run, part))[1].values()) for part in (1.0, 0.5))
        varies = 2 * (whole - half)
        share = min(1.0, max(0.0, (run.seconds - (whole - varies)) / max(varies, 1e-9)))
        least = min(1.0, LEAST_EPOCHS / min(run.supernet.epochs, run.retrain.train.epochs))
        if share < least:
            raise UserError(
                f"time is {run.time}; the least that is worth it, {LEAST_EPOCHS:g} epochs, takes about "
                f"{duration(sum(costs(shortened(run, least))[1].values()))} here. Give more time, fewer images "
                "(data.max_images), or leave baselines out (retrain.baselines=[] retrain.rank_archs=0)."
            )
    distrusts, stages = costs(shortened(run, share))
    roles = len(roles_of(run.retrain, context.teacher))
    bytes_of_model = 4 * max(sum(p.numel() for p in model.parameters()) for model in models)
    return Outlook(
        stages=stages,
        share=share,
        step_s=step_s,
        model_step_s=model_step_s,
        image_s=image_s,
        memory_bytes=peak_bytes(context.engine.device),
        # A checkpoint has the weights, two moments of each, and an average.
        disk_bytes=4 * params * 5 + bytes_of_model * (FRONT + roles + len(run.export.formats)),
        time_s=run.seconds if run.time is not None else None,
        distrusts=distrusts,
        clock_s=clock_s,
    )


def likely(context: Context, feasible: Feasibility) -> list[Arch]:
    """Archs such as a search returns, which cost about what the budget allows and take their time in many ways: of a
    limit of latency about as many MACs as the costliest of those that were timed and meet it. The middle one of the
    Space where nothing is bounded."""
    upper = {each.quantity: each.high for each in context.budget.counted.limits if each.high is not None}
    upper["macs"] = max(1.0, min(upper.get("macs", math.inf), feasible.most_macs))
    limits = (Limit(quantity, None, high) for quantity, high in upper.items() if high < math.inf)
    use = use_of(context.space, Budget.of(tuple(limits)))
    if use is None:
        return [context.space.middle()]
    near = NearBudget(context.space, use, low=NEAR, high=1.0)
    return [near.sample(random.Random(number)) for number in range(LIKELY)]


def _clock(context: Context, feasible: Feasibility) -> float:
    """Seconds of timing an Arch on all targets of the budget, by how many are timed for one that meets it."""
    if not context.meters:
        return 0.0
    arch, began = context.space.middle(), time.perf_counter()
    for target in context.meters:
        measure_ms(quick_meter(target), arch)
    took = time.perf_counter() - began
    met = min(row.share_feasible for row in feasible.rows if row.quantity.startswith("latency"))
    return took / max(met, RARE)


def _step(context: Context, network: nn.Module, sampler: Sampler, config: TrainConfig) -> float:
    """Seconds of an optimizer step of training `network`."""
    run, data = context.asked, context.data
    task, teacher = make_task(
        run.task, context.teacher, data, context.space.largest().grids[-1], context.folder
    )
    loader = context.images.train_batches("forecast")
    clock = Clock()
    fit(
        network,
        CombinedSides(task) if getattr(network, "sides", 1) > 1 else task,
        sampler,
        loader,
        config=few_steps(config, loader),
        teacher=teacher,
        augment=data.augment,
        num_classes=data.num_classes,
        seed=run.seed,
        engine=context.engine,
        progress=clock,
    )
    return clock.step_s


def _costs(
    context: Context, run: Run, *, step_s: float, model_step_s: float, image_s: float, clock_s: float
) -> tuple[bool, dict[str, float]]:
    """Whether the longer way is that of a run whose supernet does not rank, where that is open, and its seconds by
    stage."""
    plan = partial(
        _planned, context, step_s=step_s, model_step_s=model_step_s, image_s=image_s, clock_s=clock_s
    )
    planned = plan(run)
    if not run.ranks or run.retrain.rank_archs < LEAST_RANKED or run.search.least_tau == -1:
        return False, planned
    other = plan(distrusting(run)) | {"train": planned["train"]}
    return max((False, planned), (True, other), key=lambda way: sum(way[1].values()))


def _planned(
    context: Context, run: Run, *, step_s: float, model_step_s: float, image_s: float, clock_s: float
) -> dict[str, float]:
    """Seconds by stage, whether the supernet ranks or not."""
    data, world = context.data, context.engine.world
    per_epoch = max(1, len(data.train) // world // run.data.batch_size)
    held, models = len(data.holdout), len(roles_of(run.retrain, context.teacher))
    train, last = run.supernet, run.retrain.train
    watched = train.epochs / train.monitor_every * MONITORED * held * image_s if train.monitor_every else 0.0
    epoch_s = per_epoch * model_step_s
    trials, trains = run.search.num_trials, run.search.trains
    folds = run.search.folds
    timing, searching = trials * clock_s, trials * folds * held * image_s / world
    finals = epochs_in_all(run.finals, last, run.entrants) * epoch_s
    if trains:  # each Arch for the first rung; the finals are what is behind it
        searching = trials * lengths(run.finals, last, trials)[0] * epoch_s
        finals -= searching
    searching += timing
    baseline = searching + finals if "random_search" in run.retrain.baselines else 0.0
    trained, ranking = models * last.epochs, run.retrain.rank_archs * run.retrain.rank_epochs * epoch_s
    if "hand_scaled" in run.retrain.baselines:
        trained += epochs_in_all(run.finals, last, SHAPES * max(1, len(patch_sizes(context.space))))
    return {
        "train": 0.0 if trains else folds * train.epochs * per_epoch * step_s + watched + ranking,
        "search": searching,
        "finals": finals,
        "retrain": trained * epoch_s + baseline,
        "export": FILE_S * len(run.export.formats)
        + eight_bit_s(run.export.formats, image_s, held, context.space.middle().depth),
        "bench": TIMING_S * models * len(timed_on(run)),
        "evaluate": models * data.num_test * image_s,
    }


def eight_bit_s(formats: Sequence[str], image_s: float, held: int, depth: int) -> float:
    """Seconds that an 8-bit file takes more than one of float32: ranges, each layer alone (four in a block) where all
    together lose too much, and what judges it.

    Args:
        held: held-out images.
    """
    half = min(CALIBRATED, held // 2)
    return image_s * (2 * half + 4 * depth * min(TRIED, half) + held) if "onnx_int8" in formats else 0.0


def peak_bytes(device: torch.device) -> int:
    """Bytes that were in use at most: of the accelerator, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_process_bytes()


def table(run: Run, found: Outlook) -> Table:
    """Stages with their time, then all of it."""
    done, where = (distrusting(run), ", if it does not") if found.distrusts and run.ranks else (run, "")
    how = {
        "train": f"{run.supernet.epochs:.3g} epochs, {_each(found.step_s)} a step"
        + (f"; {run.retrain.rank_archs} Archs to see whether it ranks" if run.ranks else ""),
        "search": f"{done.search.num_trials} Archs"
        + (", trained briefly" if done.search.trains else f", {_each(found.image_s)} an image")
        + (f", {_each(found.clock_s)} to time each and those that are too slow" if found.clock_s else "")
        + where,
        "finals": ("the better ones train on" if done.search.trains else f"{done.entrants} Archs") + where,
        "retrain": f"{run.retrain.train.epochs:.3g} epochs each, {_each(found.model_step_s)} a step",
    }
    rows = [
        (stage, duration(seconds), how.get(stage, "")) for stage, seconds in found.stages.items() if seconds
    ]
    given = (
        ""
        if found.time_s is None
        else f"of {duration(found.time_s)}; {found.share:.0%} of all that was asked"
    )
    taken = room(found.disk_bytes, found.memory_bytes)
    rows += [("all", duration(found.seconds), given), ("", "", taken)]
    return Table(("Stage", "Takes about", "Here"), tuple(rows), numeric=(1,))


def _each(seconds: float) -> str:
    """What one of many takes, to three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def to_halve(run: Run, found: Outlook) -> str:
    """What to change so that it takes half as long."""
    half = shortened(run, 0.5)
    fields = {
        "supernet.epochs": (run.supernet.epochs, half.supernet.epochs),
        "search.num_trials": (run.search.num_trials, half.search.num_trials),
        "retrain.train.epochs": (run.retrain.train.epochs, half.retrain.train.epochs),
    }
    if run.search.trains:
        del fields["supernet.epochs"]
    if run.finals.epochs and half.finals.epochs:
        fields["finals.epochs"] = (run.finals.epochs, half.finals.epochs)
    if run.ranks:
        fields["retrain.rank_epochs"] = (run.retrain.rank_epochs, half.retrain.rank_epochs)
    words = " ".join(
        f"{name}={less if isinstance(less, int) else format(less, '.3g')}"
        for name, (now, less) in fields.items()
        if less != now
    )
    return f"half as long: {words}, or time={typed(found.seconds / 2)}"


def typed(seconds: float) -> str:
    """A duration as `time` takes it."""
    return f"{max(1, round(seconds))}s" if seconds < 100 else f"{round(seconds / 60)}m"
