"""prepare: open everything that can be wrong, say what can be met, write down where and how the run is made."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from vitnas.budget import Cost
from vitnas.counting import count
from vitnas.data import require_labels
from vitnas.data.augment import seeded_globals
from vitnas.data.folds import fold
from vitnas.errors import UserError
from vitnas.exporting.executorch import require_executorch
from vitnas.grids import ImageSize, sides_of, size_text
from vitnas.measure.environment import environment, git_commit
from vitnas.measure.runtimes import require_device
from vitnas.measure.target import parse_target
from vitnas.records import GeneRecord, Manifest, SpaceRecord
from vitnas.runs import RunFile
from vitnas.searching import SEARCHERS, Feasibility, feasibility
from vitnas.space import SpaceConfig
from vitnas.stages.context import Context
from vitnas.stages.forecast import is_short, outlook
from vitnas.stages.run import ExportConfig
from vitnas.stages.supernet import start_from_pretrained
from vitnas.stages.training import make_task
from vitnas.train.config import TrainConfig
from vitnas.train.engine import Engine
from vitnas.train.optim import make_optimizer, make_schedule
from vitnas.train.teacher import settled_task

LARGE_SIDE = 1024  # pixels


def prepare(context: Context) -> Feasibility:
    """Check the data, the Space and the Budget before any expensive work; write manifest, space and feasibility.

    Returns:
        The table of feasibility.json; a run that was prepared before is not prepared again.

    Raises:
        UserError: whatever is wrong, in one sentence; an impossible budget comes with the feasible range.
    """
    run, folder = context.run, context.folder
    files: list[type[RunFile]] = [Manifest, SpaceRecord, Feasibility]
    if run.sampler.settles and not run.sampler.is_settled:
        files.append(run.sampler.settles)
    if (folder / "run.yaml").exists() and all(file.exists(folder) for file in files):
        return Feasibility.read(folder)
    check_export(run.export)
    if not run.pretrained:
        check_sides(context, run.space)
    data = context.data
    require_labels(data.train.targets, "`vitnas run`")  # its search scores accuracy
    if run.search.trains and context.engine.world > 1:
        raise UserError(
            f"search.searcher is {run.search.searcher!r} in {context.engine.world} processes; each of its trainings is "
            "of one. Start one process, and `vitnas search FOLDER` beside it to search together."
        )
    if run.search.folds > 1:
        fold(data, run.search.folds - 1)  # says whether there are so many
    space, budget = context.space, context.budget
    check_memory(context)
    supernet = context.new_supernet()
    for name, config in (("supernet", run.supernet), ("retrain.train", run.retrain.train)):
        if config.warmup_epochs >= config.epochs:
            context.work.progress.note(
                f"{name}.warmup_epochs is {config.warmup_epochs:g} of {config.epochs:g} epochs: all of it is warm-up"
            )
        # what is unknown shows now, not in an hour
        make_schedule(make_optimizer(supernet, config), config, 100, 10)
    if run.pretrained:
        start_from_pretrained(supernet, run.pretrained)
    form = data.train.form
    task, teacher = make_task(run.task, context.teacher, data, space.largest().grids[-1], folder)
    with seeded_globals(run.seed):
        settled_task(task, supernet, teacher, form, lambda: form.input_size)
    if run.search.storage is not None:
        with context.searches.open():
            pass
    # One process, so that clocks are not disturbed by the others'.
    table: Feasibility = context.engine.from_first(
        lambda: feasibility(space, budget, seed=run.seed, latency_meter=context.meters)
    )
    context.sampler.settle(budget, context.meters)
    context.sampler.check(budget if SEARCHERS[run.search.searcher].asks_sampler else None)
    if run.time is not None or not is_short(context):
        outlook(context, table)

    def write() -> None:
        SpaceRecord(
            name=space.name,
            size=float(space.size()),
            genes=tuple(GeneRecord(gene.name, tuple(gene.options)) for gene in space.genes),
            space=space.to_json(),
        ).write(folder)
        table.write(folder)
        if not Manifest.exists(folder):
            manifest(context).write(folder)

    context.engine.from_first(write)
    return table


def check_export(config: ExportConfig) -> None:
    """Raise UserError where this machine lacks what writes or times one of the files."""
    if "executorch" in config.formats:
        require_executorch()
    for target in config.latency:
        require_device(parse_target(target))


def check_memory(context: Context) -> None:
    """Refuse what this machine cannot hold, by the largest Arch and the images there are.

    Raises:
        UserError: see `check_fits`.
    """
    batch = min(context.run.data.batch_size, len(context.data.train))
    arch = context.space.largest()
    check_fits(context.engine, context.run.supernet, count(arch), arch.seen_size, batch)


def check_sides(context: Context, config: SpaceConfig) -> None:
    """The same by two images, before any is read, where `data.image_size` asks for such as take minutes to read.

    Raises:
        UserError: see `check_fits`.
    """
    size = context.run.data.image_size
    if size is not None and max(sides_of(size)) > LARGE_SIDE:
        space = config.build(image_size=size, in_chans=context.run.data.in_chans or 1, num_classes=1)
        check_fits(context.engine, context.run.supernet, count(space.largest()), size, 2)


def check_fits(engine: Engine, config: TrainConfig, cost: Cost, size: ImageSize, batch: int) -> None:
    """Refuse what this machine cannot hold, by the least that a training needs: weights and their gradients, and what
    one look at a batch of so many images of `size` keeps at its peak. (Training keeps several times that; what misses
    by less ends with the allocator's error.)

    Raises:
        UserError: it is more than the whole memory.
    """
    device = engine.device
    width = 4 if config.precision == "fp32" else 2
    least = 2 * 4 * cost.params + batch * cost.memory_bytes * width // 4
    if device.type not in ("cpu", "cuda"):
        return
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total
    if least > there:
        raise UserError(
            f"training {cost.params:,} weights with batches of {batch} images of {size_text(size)} pixels "
            f"needs {least / 2**30:,.0f} GiB at the least, and {device.type} has {there / 2**30:,.0f} GiB. Lower "
            "data.batch_size (supernet.accumulate makes up for it), the images' size or the widths and depths."
        )


def manifest(context: Context) -> Manifest:
    """Versions, host, seed, data, command."""
    return Manifest(
        command=shlex.join(["vitnas", *sys.argv[1:]]),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=context.run.seed,
        processes=context.engine.world,
        device=str(context.engine.device),
        git=git_commit(Path.cwd()),
        data=context.data.fingerprint(),
        environment=environment(),
    )
