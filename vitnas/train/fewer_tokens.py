"""A trained vision transformer becomes its DynamicViT: it learns which patches it can do without, from itself.

Source: DynamicViT (Rao et al., arXiv 2106.02034, section 3.3), on any network that an Arch can say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitnas.data import Augment
from vitnas.model.selections import with_selections
from vitnas.sample import Fixed
from vitnas.train.config import TrainConfig
from vitnas.train.loop import Fitted, fit
from vitnas.train.losses import Distillation, KeepRatio, Soft, Tokens
from vitnas.train.task import Task
from vitnas.train.teacher import Teacher


def dynamicvit_config(epochs: float = 30, lr: float = 1e-3, **fields: Any) -> TrainConfig:
    """The paper's training: all but the predictors at a hundredth of the rate, and at none for a sixth of the epochs,
    in which the predictors warm up (5 of 30 there; batches of 1024 at lr 1e-3).

    Args:
        fields: others of TrainConfig. With `frozen_names="^(cls_token|pos_embed)$"` these never move, as in the
            authors' code.
    """
    given: dict[str, Any] = {
        "weight_decay": 0.05,
        "warmup_epochs": epochs / 6,
        "warmup_lr": 0.0,
        "min_lr": 1e-6,
        "slow_names": r"^(?!selections\.)",
        "slow_lr_scale": 0.01,
        "slow_frozen_epochs": epochs / 6,
        "monitor_every": 0,
    }
    return TrainConfig(epochs=epochs, lr=lr, **{**given, **fields})


def fewer_tokens(
    network: nn.Module,
    loader: Any,
    keep: Any = 0.7,
    places: Any = None,
    *,
    config: TrainConfig | None = None,
    weights: tuple[float, float, float] = (2.0, 0.5, 0.5),
    labels: bool = True,
    augment: Augment | None = None,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """Train a copy of `network` that keeps fewer patches; `network` teaches it and is left as it is.

    Args:
        network: a Model, or a timm ViT that an Arch can say.
        loader: as `fit` takes it.
        keep, places: as `with_selections` takes them.
        weights: of the share of patches kept, of the teacher's logits (not where it has no classes), and of its tokens.
        labels: learn from the labels too; they must then be of the network's classes.
        augment: its label smoothing, mixup and cutmix are used.
        options: others of `fit` (folder, progress, engine, ...).

    Returns:
        Its network is the DynamicViT, a Model.

    Raises:
        UserError: what cannot be kept where, or a network that no Arch can say.
    """
    student = with_selections(network, keep, places, generator=torch.Generator().manual_seed(seed))
    smoothing = 0.0 if augment is None else augment.label_smoothing
    ratio = KeepRatio(ratio_weight=weights[0], label_smoothing=smoothing, labels=labels)
    losses: dict[str, tuple[Task, float]] = {} if labels else {"ratio": (ratio, 1.0)}
    if student.num_classes:
        losses["soft"] = (Soft(), weights[1])
    losses["tokens"] = (Tokens(), weights[2])
    return fit(
        student,
        Distillation(losses=losses, labels=ratio if labels else None),
        Fixed(),
        loader,
        config=config or dynamicvit_config(),
        teacher=Teacher(network),
        augment=augment,
        num_classes=student.num_classes or None,
        seed=seed,
        **options,
    )
