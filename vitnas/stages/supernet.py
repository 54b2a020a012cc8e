"""train: the supernet of a run."""

from __future__ import annotations

from vitnas.sample import Sandwich
from vitnas.stages.context import Context, save_weights
from vitnas.stages.tasks import make_task
from vitnas.train import Monitor, Rewiring, fit

STAGE = "supernet"


def train_supernet(context: Context) -> None:
    """Train the supernet, continuing from its checkpoint, into supernet.safetensors, unless that is there."""
    target = context.folder / "supernet.safetensors"
    if target.exists():
        return
    run, data = context.run, context.data
    supernet = context.new_supernet()
    if run.pretrained:
        from vitnas.supernet.pretrained import start_from_timm

        context.progress.note(start_from_timm(supernet, run.pretrained))
    sampler = context.sampler()
    task = make_task(
        run,
        augment=context.augment,
        num_classes=data.num_classes,
        grid_size=context.space.largest().grid_sizes[-1],
        distill_weight=0.5 if _distils(sampler) else 0.0,
    )
    fitted = fit(
        supernet,
        task,
        sampler,
        context.train_batches(STAGE),
        config=run.supernet,
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
        hooks=[Rewiring(run.sampler.warmup_epochs)] if run.sampler.rewire else [],
    )
    context.once(target, lambda: save_weights(fitted.network, target))


def _distils(sampler: object) -> bool:
    return isinstance(sampler, Sandwich) and sampler.distill
