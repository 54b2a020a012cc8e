"""prepare: everything that can be wrong with a network, images or a budget is said before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

from vitnas.arch import Arch
from vitnas.budget import Cost
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.grids import size_text
from vitnas.records import Forecast, GeneRecord, Manifest, Original, SpaceRecord, Tables
from vitnas.runs import RunFile
from vitnas.searching import Feasibility, feasibility
from vitnas.slimming.sensitivity import MEASURED
from vitnas.space import AroundConfig
from vitnas.stages.forecast import peak_bytes
from vitnas.stages.full import full_cost
from vitnas.stages.prepare import check_export, check_fits, manifest
from vitnas.stages.slim.context import SlimContext
from vitnas.stages.slim.forecast import Amounts, forecast, time_steps
from vitnas.stages.slim.original import check_classes, space_around
from vitnas.supernet import Supernet
from vitnas.train.optim import make_optimizer, make_schedule

LEAST_IMAGES = 8
DRAWN = 20_000  # random Archs that say how much of the Space a budget leaves
FILES: tuple[type[RunFile], ...] = (Original, SpaceRecord, Feasibility, Forecast, Manifest)


def prepare_slim(context: SlimContext) -> Feasibility:
    """Check network, images and budget, and forecast the efforts; what was found is written down.

    Returns:
        The table of feasibility.json; a run that was prepared before is not prepared again.

    Raises:
        UserError: whatever is wrong, in one sentence; an impossible budget comes with the range.
    """
    folder = context.folder
    if (folder / "run.yaml").exists() and all(file.exists(folder) for file in FILES):
        return Feasibility.read(folder)
    engine = context.engine
    check_export(context.run.export)
    if not context.run.budget:
        raise UserError(
            "no budget is given; slimming goes down to one. Add budget='macs<=50%', params, memory or "
            "latency<=8ms@onnxruntime,batch=1."
        )
    arch, config = context.original.arch, context.run.supernet
    check_fits(engine, config, count(arch), arch.seen_size, 2)
    labels = check_classes(context.original, context.images.data)
    images = len(context.images.data.train)
    check_fits(engine, config, count(arch), arch.seen_size, min(context.run.data.batch_size, images))
    enough_images(context.slim.images, images, arch)
    cost = full_cost(context.work, context.original.arch, context.budget.latency_targets)
    notes = [labels, *_said(context, cost)]
    found = engine.from_first(lambda: _look(context, cost, notes))

    def write() -> None:
        for record in found:
            if not record.exists(folder):  # the effort that was taken stays
                record.write(folder)
        if not Manifest.exists(folder):
            manifest(context).write(folder)

    engine.from_first(write)
    return next(record for record in found if isinstance(record, Feasibility))


def forget_budget(folder: Path) -> None:
    """Let a run have another budget: what was said of the one before goes, what was measured of the network stays."""
    for file in (Original, Feasibility, Tables):
        file.path(folder).unlink(missing_ok=True)


def _look(context: SlimContext, cost: Cost, notes: Sequence[str]) -> tuple[RunFile, ...]:
    run, model, data = context.run, context.original, context.images.data
    budget, space = context.budget, context.space
    # One process, so that clocks are not disturbed by the others'.
    table = feasibility(space, budget, n=DRAWN, seed=run.seed, latency_meter=context.meters)
    supernet = context.new_supernet()
    for config in (run.supernet, run.retrain.train):  # what is unknown shows now, not in an hour
        make_schedule(make_optimizer(supernet, config), config, 100, 10)
    part = Supernet(space_around(first_block(model.arch), AroundConfig(), ("heads", "hidden"), "part")).eval()
    steps = time_steps(model, part, context.images.some(), exports=bool(run.export.formats))
    amounts = Amounts(
        images=context.slim.images,
        holdout=len(data.holdout),
        test=data.num_test,
        train=len(data.train),
        batch_size=run.data.batch_size,
        options=sum(min(MEASURED, len(gene.options) - 1) for gene in space.genes if gene.scope == "block"),
        folded_options=sum(len(gene.options) - 1 for gene in space.genes if gene.scope != "block"),
        blocks=model.arch.depth,
        members=context.slim.front,
        formats=run.export.formats,
        tables=len(context.meters),
        clocks=len(context.targets),
    )
    return (
        Original(
            name=str(run.pretrained),
            arch_id=model.arch.id,
            cost=cost,
            budget=budget.text,
            labels=context.images.has_labels,
            notes=tuple(filter(None, notes)),
        ),
        SpaceRecord(
            name=space.name,
            size=float(space.size()),
            genes=tuple(GeneRecord(gene.name, tuple(gene.options)) for gene in space.genes),
            space=space.to_json(),
        ),
        table,
        replace(
            forecast(run, steps, amounts),
            disk_bytes=4 * cost.params * (5 + (amounts.members + 1) * (1 + len(amounts.formats))),
            memory_bytes=peak_bytes(context.engine.device),
        ),
    )


def first_block(arch: Arch) -> Arch:
    """The Arch with its first block alone."""
    stage = arch.stages[0]
    return replace(arch, stages=(replace(stage, blocks=stage.blocks[:1]),), selector=None)


def enough_images(images: int | None, there: int, arch: Arch) -> None:
    """Refuse statistics of fewer tokens than they have numbers.

    Raises:
        UserError: too few images, saying how many are needed.
    """
    widest = max(block.mlp_hidden for block in arch.blocks)
    needed = max(LEAST_IMAGES, ceil(widest / arch.num_tokens))
    for name, number in (("images", images), ("the train split", there)):
        if number is not None and number < needed:
            has = f"{name} has {number}" if name != "images" else f"images is {number}"
            raise UserError(
                f"{has}; activations of up to {widest} hidden units are taken from at least {needed} images of "
                f"{arch.num_tokens} tokens. Give at least {needed} train images, and no fewer as images=."
            )


def _said(context: SlimContext, cost: Cost) -> list[str]:
    """What a person should know of the network."""
    arch, notes = context.original.arch, []
    if not context.budget.misses(cost):
        notes.append(
            f"MODEL meets {context.budget.text} as it is, so nothing need go; a smaller budget makes it smaller."
        )
    if len({(block.num_heads, block.mlp_hidden) for block in arch.blocks}) > 1:
        notes.append(
            "MODEL has blocks of different sizes, as a network that was slimmed before: it is slimmed further, and "
            "shares and agreement are of what it is now."
        )
    if context.slim.resample:
        notes.append(f"positions of MODEL are resampled to {size_text(arch.image_size)} pixels.")
    return notes
