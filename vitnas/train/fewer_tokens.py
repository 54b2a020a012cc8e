"""A trained vision transformer becomes one that keeps fewer patches, and learns from what it was.

By default its DynamicViT, which learns which patches it can do without (Rao et al., arXiv 2106.02034, section 3.3), on
any network that an Arch can say; with any other selector the same network as a teacher, of its answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.data import Augment
from vitnas.layers.choose import PredictorSelection
from vitnas.model import Model
from vitnas.model.selections import with_selections
from vitnas.sample import Fixed
from vitnas.train.config import TrainConfig
from vitnas.train.loop import Fitted, fit
from vitnas.train.losses import Classification, Distillation, KeepRatio, Soft, Tokens
from vitnas.train.task import Batch, Outputs, Task
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


def fewer_tokens_config(selector: str, epochs: float = 30, lr: float | None = None) -> TrainConfig:
    """`dynamicvit_config` for the predictor. Where nothing has to learn who is kept, all weights at one rate, by
    default a tenth of the predictor's, warmed up for a tenth of the epochs."""
    if selector == PredictorSelection.word:
        return dynamicvit_config(epochs, lr or 1e-3)
    return TrainConfig(epochs=epochs, lr=lr or 1e-4, warmup_epochs=epochs / 10, monitor_every=0)


def fewer_tokens(
    network: nn.Module,
    loader: Any,
    keep: Any = 0.7,
    places: Any = None,
    *,
    selector: str = PredictorSelection.word,
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
        keep, places, selector: as `with_selections` takes them.
        config, weights, labels, augment, options: see `learn_from_whole`.

    Returns:
        Its network is the one that keeps fewer, a Model; by default the DynamicViT.

    Raises:
        UserError: what cannot be kept where, or a network that no Arch can say.
    """
    generator = torch.Generator().manual_seed(seed)
    student = with_selections(network, keep, places, selector=selector, generator=generator)
    return learn_from_whole(
        student,
        network,
        loader,
        config=config,
        weights=weights,
        labels=labels,
        augment=augment,
        seed=seed,
        **options,
    )


def learn_from_whole(
    student: Model,
    network: nn.Module,
    loader: Any,
    *,
    config: TrainConfig | None = None,
    weights: tuple[float, float, float] = (2.0, 0.5, 0.5),
    labels: bool = True,
    augment: Augment | None = None,
    seed: int = 0,
    **options: Any,
) -> Fitted:
    """Train `student`, which keeps fewer patches than `network`, in place; `network` teaches it.

    Args:
        config: by default `fewer_tokens_config`.
        weights: of the share of patches kept, of the teacher's logits (of its pooled features where it has no classes),
            and of its tokens. The first and the last are for the predictor alone.
        labels: learn from the labels too; they must then be of the network's classes.
        augment: its label smoothing, mixup and cutmix are used.
        options: others of `fit` (folder, progress, engine, ...).
    """
    smoothing = 0.0 if augment is None else augment.label_smoothing
    draws = student.arch.selector == PredictorSelection.word
    ratio = KeepRatio(ratio_weight=weights[0], label_smoothing=smoothing, labels=labels)
    losses: dict[str, tuple[Task, float]] = {"ratio": (ratio, 1.0)} if draws and not labels else {}
    if student.num_classes:
        losses["soft"] = (Soft(), weights[1])
    elif not draws:
        losses["pooled"] = (Pooled(), weights[1])
    if draws:
        losses["tokens"] = (Tokens(), weights[2])
    of_labels = ratio if draws else Classification(label_smoothing=smoothing)
    return fit(
        student,
        Distillation(losses=losses, labels=of_labels if labels else None),
        Fixed(),
        loader,
        config=config or fewer_tokens_config(student.arch.selector or ""),
        teacher=Teacher(network),
        augment=augment,
        num_classes=student.num_classes or None,
        seed=seed,
        **options,
    )


class Pooled(Task):
    """The teacher's pooled features, by mean squared difference; both networks are equally wide."""

    wants = wants_taught = ("pooled",)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        return {"loss": functional.mse_loss(outputs["pooled"].float(), taught["pooled"].float())}
