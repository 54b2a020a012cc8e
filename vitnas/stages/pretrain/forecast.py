"""How long a pretraining takes here, from steps that are really done, and how it is set for the steps there are."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from torch import nn

from vitnas.budget import Cost
from vitnas.counting import count
from vitnas.data import TrainBatches
from vitnas.data.augment import seed_from
from vitnas.errors import UserError
from vitnas.grids import sides_of
from vitnas.model.timm_keys import arch_in
from vitnas.probing import PretrainForecast, features
from vitnas.stages.forecast import Clock, few_steps, peak_bytes
from vitnas.stages.prepare import check_fits, check_memory, check_sides
from vitnas.stages.pretrain.context import PretrainContext
from vitnas.stages.pretrain.watch import ASKED, BATCH, CHECKED, KNOWN
from vitnas.train import EsViTConfig, TrainConfig, fit
from vitnas.train.collapse import CHECKS, TWENTIETH
from vitnas.train.progress import duration

LEAST_IMAGES = 32
STEPS_IN_EPOCH = 8  # at least; a larger batch is lowered
LEAST_STEPS = 100  # a pretraining of fewer is not worth its name
WARM = 1 / 30  # of all epochs, as EsViT's 10 of 300; of the teacher's temperature 1 / 10, as its 30 of 300


def batch_size(context: PretrainContext) -> int:
    """data.batch_size, or so much less that an epoch has a few steps.

    Raises:
        UserError: too few images.
    """
    images, asked = len(context.images.data.train), context.run.data.batch_size
    if images < LEAST_IMAGES:
        raise UserError(
            f"the train split has {images} images; pretraining tells images apart and needs at least {LEAST_IMAGES}. "
            "Add images."
        )
    most = images // (STEPS_IN_EPOCH * context.engine.world)
    return asked if asked <= most else max(2, 1 << (most.bit_length() - 1))


def look_ahead(context: PretrainContext) -> PretrainForecast:
    """Do a few steps, and say what all of them take.

    Raises:
        UserError: the time is too short for any pretraining.
    """
    run, config = context.run, context.pretrain
    if context.named is not None:
        _check_named(context, context.named, 2)
    elif run.data.image_size is not None:
        check_sides(context, context.space_config(run.data.image_size))
    data = context.images.data
    size, images = batch_size(context), len(data.train)
    if context.named is None:
        check_memory(context)
    else:
        _check_named(context, context.named, min(size, images))
    step_s, forward_s = _timed(context, size)
    per_epoch = max(1, images // context.engine.world // size // run.supernet.accumulate)
    seen = min(KNOWN, images) + min(ASKED, len(data.holdout)) if context.images.has_labels else 0
    looks = config.looks + 2
    look_s = forward_s * (seen * looks + CHECKED * (CHECKS * TWENTIETH + looks))
    room = (config.seconds - look_s) / (step_s * per_epoch)
    epochs = config.epochs or min(run.supernet.epochs, max(1.0, math.floor(room)))
    steps = max(1, round(epochs * per_epoch))
    least = step_s * max(LEAST_STEPS, per_epoch) + look_s
    if config.epochs is None and (room < 1 or steps < LEAST_STEPS):
        raise UserError(
            f"time is {config.time}; the least that is worth it, {max(LEAST_STEPS, per_epoch)} steps, takes about "
            f"{duration(least)} here. Give more time, fewer images (data.max_images), or say epochs= to have it take "
            "what it takes."
        )
    notes = list(context.images.notes)
    if size < run.data.batch_size:
        notes.append(
            f"batches are of {size} images, not of data.batch_size={run.data.batch_size}: an epoch of {images} images "
            f"has {STEPS_IN_EPOCH} steps or more."
        )
    if not context.images.has_labels:
        notes.append(
            "the images have no labels: nearest neighbours are left out, features are watched by their rank."
        )
    return PretrainForecast(
        time_s=config.seconds,
        step_s=step_s,
        look_s=look_s,
        images=images,
        batch_size=size,
        steps_per_epoch=per_epoch,
        epochs=epochs,
        steps=steps,
        asked=config.epochs is not None,
        notes=tuple(notes),
        # A checkpoint has the student's weights, two moments of each, and the teacher.
        disk_bytes=4 * 5 * sum(p.numel() for p in context.student().parameters()),
        memory_bytes=peak_bytes(context.engine.device),
    )


def _check_named(context: PretrainContext, network: Any, batch: int) -> None:
    """Refuse a network that this machine cannot hold; of one that is no Arch only weights and images are counted.

    Raises:
        UserError: see `check_fits`.
    """
    config = context.images.config
    size = config.image_size or 224
    try:
        cost = count(replace(arch_in(network), image_size=size))
    except UserError:
        params = sum(weight.numel() for weight in network.parameters())
        cost = Cost(0, params, 4 * (config.in_chans or 3) * math.prod(sides_of(size)))
    check_fits(context.engine, context.run.supernet, cost, size, batch)


def _timed(context: PretrainContext, size: int) -> tuple[float, float]:
    """Seconds of a training step, and of one image through the network."""
    student, run, clock = context.student(), context.run, Clock()
    esvit = context.pretrain.esvit
    loader = views(context, esvit, student, size)
    teacher = esvit.teacher(student)
    fit(
        student,
        esvit.task(run.supernet.weight_decay),
        context.draws,
        loader,
        config=few_steps(run.supernet, loader),
        teacher=teacher,
        seed=run.seed,
        engine=context.engine,
        progress=clock,
    )
    held = context.images.data.holdout
    few = context.images.batches(held.subset(range(min(BATCH, len(held)))))
    start = time.perf_counter()
    features(teacher.network, few, arch=teacher.arch)
    forward = (time.perf_counter() - start) / min(BATCH, len(held))
    return clock.step_s, forward


def views(context: PretrainContext, esvit: EsViTConfig, student: nn.Module, size: int) -> TrainBatches:
    """Batches of crops of the train split."""
    engine, images = context.engine, context.images
    return esvit.views(
        images.data.train,
        student,
        batch_size=size,
        seed=seed_from(context.run.seed, "pretrain"),
        rank=engine.rank,
        world=engine.world,
        workers=images.config.workers,
    )


def settled(context: PretrainContext, found: PretrainForecast) -> tuple[TrainConfig, EsViTConfig]:
    """How it trains, and by what, for as many steps as there are: a run that goes on is the same run.

    The average follows within a twentieth of the steps, so that it is not what the network was long ago.
    """
    train, esvit = context.run.supernet, context.pretrain.esvit
    warm = found.epochs * WARM
    return (
        replace(train, epochs=found.epochs, warmup_epochs=min(train.warmup_epochs, warm), monitor_every=0),
        replace(
            esvit,
            momentum_teacher=min(esvit.momentum_teacher, max(0.0, 1 - TWENTIETH / found.steps)),
            warmup_teacher_temp_epochs=min(esvit.warmup_teacher_temp_epochs, math.ceil(3 * warm)),
            freeze_last_layer=min(esvit.freeze_last_layer, warm),
        ),
    )
