"""What a slim run trains: its supernet (effort=search), and the chosen network (effort=recover and search)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vitnas.extraction import extract
from vitnas.model import Model
from vitnas.records import Forecast, Member, Result
from vitnas.slimming import Recovery, recover, train_elastic
from vitnas.stages.slim.context import SlimContext
from vitnas.stages.work import load_weights, save_weights
from vitnas.train import TrainConfig


def learn_elastic(context: SlimContext, start: Path, target: Path) -> None:
    """Train the ordered supernet of `start` by the sandwich rule, with the network as teacher, into `target`."""
    supernet = context.new_supernet()
    load_weights(supernet, start, "vitnas slim")
    teacher = extract(
        supernet, supernet.space.largest()
    ).eval()  # the network, its channels in the supernet's order
    config = planned(context, "train", context.run.supernet)
    batches = context.images.train_batches("supernet")
    labels = context.images.has_labels
    fitted = train_elastic(
        supernet, teacher, batches, config=config, labels=labels, **_options(context, "supernet")
    )
    context.work.once(target, lambda: save_weights(fitted.network, target))


def recovered(context: SlimContext, member: Member, model: Model) -> Result:
    """Let `model`, a member of the front, learn from the network; recovery.json says what that did.

    Returns:
        The result of the better of both, which `model` then is.
    """
    config = planned(context, "recover", context.run.retrain.train)
    labels, batches = context.images.has_labels, context.images.train_batches("recover")
    found = recover(
        model,
        context.original,
        batches,
        context.inherited.holdout,
        config=config,
        labels=labels,
        **_options(context, "retrain/chosen"),
    )
    context.work.progress.note(str(found))
    context.work.once(Recovery.path(context.folder), lambda: found.write(context.folder))
    better = found.after if found.is_better else found.before
    result = replace(
        as_result(member),
        agreement=better.agreement,
        holdout_accuracy=better.accuracy,
        holdout_accuracy_before=found.before.accuracy,
    )
    if not found.is_better:  # it is the member itself
        return result
    return replace(result, epochs=config.epochs, seconds=found.seconds, train=asdict(config))


def as_result(member: Member) -> Result:
    """The result of a member of the front as it is."""
    return Result(
        role="chosen",
        arch_id=member.arch_id,
        macs=member.cost.macs,
        params=member.cost.params,
        memory_bytes=member.cost.memory_bytes,
        holdout_accuracy=member.accuracy,
        n_holdout=member.agreement.n,
        epochs=0.0,
        seconds=0.0,
        start=member.folder,
        train={},
        agreement=member.agreement,
    )


def planned(context: SlimContext, name: str, config: TrainConfig) -> TrainConfig:
    """`config` for as many epochs as the forecast left room for, so that a run that goes on is the same run."""
    epochs = Forecast.read(context.folder).taken.epochs[name]
    return replace(config, epochs=epochs, warmup_epochs=min(config.warmup_epochs, epochs / 10))


def _options(context: SlimContext, stage: str) -> dict[str, Any]:
    work = context.work
    return {
        "folder": work.folder,
        "stage": stage,
        "engine": work.engine,
        "seed": work.seed,
        "progress": work.progress,
    }
