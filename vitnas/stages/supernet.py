"""train: the supernet of a run."""

from __future__ import annotations

from vitnas.records import SamplerSummary
from vitnas.sample import Focus
from vitnas.stages.context import Context, save_weights
from vitnas.stages.sampler import has_answers, load_sampler, make_sampler, save_sampler, summarise
from vitnas.stages.tasks import make_task
from vitnas.train import CombinedSides, Monitor, Rewiring, fit

STAGE = "supernet"


def train_supernet(context: Context) -> None:
    """Train the supernet, continuing from its checkpoint, into supernet.safetensors, unless that is there."""
    target = context.folder / "supernet.safetensors"
    if target.exists():
        if has_answers(context):
            _tell(context, load_sampler(context))  # a kill may have come between the weights and this
        return
    run, data = context.run, context.data
    supernet = context.new_supernet()
    if run.pretrained:
        from vitnas.supernet.pretrained import start_from_timm

        context.progress.note(start_from_timm(supernet, run.pretrained))
    sampler = make_sampler(context)
    task, teacher = make_task(
        run,
        augment=context.augment,
        num_classes=data.num_classes,
        grid=context.space.largest().grids[-1],
    )
    fitted = fit(
        supernet,
        CombinedSides(task) if supernet.sides > 1 else task,
        sampler,
        context.train_batches(STAGE),
        config=run.supernet,
        teacher=teacher,
        augment=context.augment,
        num_classes=data.num_classes,
        seed=run.seed,
        engine=context.engine,
        folder=context.folder,
        stage=STAGE,
        monitor=Monitor.of(context.space, context.holdout, seed=run.seed)
        if run.supernet.monitor_every
        else None,
        progress=context.progress,
        hooks=[Rewiring(epochs)] if (epochs := run.sampler.rewire_epochs) else [],
    )
    if isinstance(sampler, Focus):
        context.once(context.folder / "sampler.safetensors", lambda: save_sampler(sampler, context.folder))
    context.once(target, lambda: save_weights(fitted.network, target))
    if isinstance(sampler, Focus) and sampler.learns:
        _tell(context, sampler)


def _tell(context: Context, focus: Focus) -> None:
    """sampler.json, unless it is there."""
    summary = SamplerSummary.path(context.folder)
    context.once(summary, lambda: summarise(context, focus).save(summary))
