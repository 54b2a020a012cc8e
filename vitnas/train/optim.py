"""Optimizer, schedule, mixing of images and averaged weights, all timm's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from vitnas.data import Augment
from vitnas.data.augment import seeded_globals
from vitnas.errors import UserError, check_word, nearest
from vitnas.train.checkpoint import take_over
from vitnas.train.config import TrainConfig
from vitnas.train.teacher import cosine

Rules = dict[str, dict[str, float]]  # of a group of parameters, by the regular expression for their names


def make_optimizer(
    network: nn.Module, config: TrainConfig, own: nn.Module | None = None
) -> torch.optim.Optimizer:
    """timm's optimizer of that name; biases, norms and what `no_weight_decay` names are not decayed.

    What `slow_names` and `frozen_names` name has groups of its own, with an `lr_scale` that timm's schedules know.

    Args:
        own: trained with the network at its full rate.

    Raises:
        UserError: an unknown optimizer, or one that cannot train here; names that no parameter has.
    """
    if config.optimizer.lower() not in (known := list_optimizers()):
        raise UserError(
            f"optimizer is {config.optimizer!r}; it must be one of timm's.{nearest(config.optimizer, known)}"
        )
    _try_out(config.optimizer)
    optimizer = _create(network, config)
    for group in [] if own is None else param_groups_weight_decay(own, config.weight_decay):
        optimizer.add_param_group(group)
    return optimizer


def _create(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    # The fused kernel takes a sixth of the time on nets of many small tensors; the others take no such argument.
    fused = {"fused": True} if config.optimizer.lower() in ("adamw", "adam") else {}
    rules: Rules = {
        config.frozen_names: {"lr_scale": 0.0},
        config.slow_names: {"lr_scale": config.slow_lr_scale, "frozen_epochs": config.slow_frozen_epochs},
    }
    rules.pop("", None)
    return create_optimizer_v2(
        network,
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        param_group_fn=partial(_groups, rules=rules, weight_decay=config.weight_decay) if rules else None,
        **fused,
    )


def _groups(network: nn.Module, rules: Rules, weight_decay: float) -> list[dict[str, Any]]:
    """timm's groups by weight decay, each parted by how fast its parameters learn."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    for pattern in rules:
        if not any(re.search(pattern, name) for name in names.values()):
            raise UserError(
                f"no parameter's name has {pattern!r} in it, which slow_names or frozen_names asks for; they are like "
                f"{next(iter(names.values()))}. Correct it."
            )

    def rule_of(parameter: nn.Parameter) -> str:
        return next((pattern for pattern in rules if re.search(pattern, names[parameter])), "")

    spared = getattr(network, "no_weight_decay", lambda: ())()
    parted = []
    for group in param_groups_weight_decay(network, weight_decay, no_weight_decay_list=spared):
        for pattern in ("", *rules):
            own = [parameter for parameter in group["params"] if rule_of(parameter) == pattern]
            if own:
                parted.append({**group, "params": own, **rules.get(pattern, {})})
    return parted


def set_rates(
    optimizer: torch.optim.Optimizer, schedule: Any, config: TrainConfig, step: int, steps_per_epoch: int
) -> None:
    """Give every group its learning rate for `step`, a function of the step alone."""
    if schedule is not None:
        schedule.step_update(step)
    for group in optimizer.param_groups:
        if schedule is None and "lr_scale" in group:
            group["lr"] = config.lr * group["lr_scale"]
        if step < group.get("frozen_epochs", 0) * steps_per_epoch:
            group["lr"] = 0.0


def _try_out(name: str) -> None:
    """Take three steps on a network of nothing, at once and with the state saved and loaded in between.

    Raises:
        UserError: a part is missing, it asks for more than a gradient, or its state cannot be saved (kron keeps a
            generator to itself).
    """
    config, ends = TrainConfig(optimizer=name), []
    try:
        for is_resumed in (False, True):
            with seeded_globals(0):
                network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
            optimizer = _create(network, config)
            for step in range(3):
                if is_resumed and step:
                    optimizer = take_over(optimizer, _create(network, config))
                for parameter in network.parameters():
                    parameter.grad = torch.cos(step + parameter.detach())
                optimizer.step()
            ends.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
        reason = "" if torch.equal(*ends) else "its state_dict leaves out what a resumed training needs"
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
    if reason:
        raise UserError(f"optimizer is {name!r}, which cannot train here ({reason}). Use adamw.")


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int, steps_per_epoch: int
) -> Any:
    """A schedule, timm's but for `dino`, driven by `step_update(step)`; it keeps no state that a resume would need.

    Args:
        steps: optimizer steps in all.
        steps_per_epoch: optimizer steps in a pass over the data.

    Raises:
        UserError: a schedule that is unknown or not a function of the step.
    """
    check_word("schedule", config.schedule, ("cosine", "poly", "tanh", "dino", "none"))
    if config.schedule == "none":
        return None
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps - 1)
    if config.schedule == "dino":
        return _Dino(optimizer, config, steps, warmup)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=steps,
        warmup_epochs=warmup,
        warmup_lr=min(config.warmup_lr, config.lr),
        min_lr=min(config.min_lr, config.lr),
        cooldown_epochs=0,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return schedule


@dataclass(frozen=True)
class _Dino:
    """DINO's: a warm-up whose last step has the full rate, then half a cosine over the steps that are left. timm's
    cosine is as long as the training, so that it has begun to fall when the warm-up ends."""

    optimizer: torch.optim.Optimizer
    config: TrainConfig
    steps: int
    warmup: int

    def step_update(self, step: int) -> None:
        config, warmup = self.config, self.warmup
        if step < warmup:
            lr = config.warmup_lr + (config.lr - config.warmup_lr) * step / max(1, warmup - 1)
        else:
            lr = cosine(config.lr, config.min_lr)(step - warmup, self.steps - warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def make_ema(network: nn.Module, config: TrainConfig) -> ModelEmaV3 | None:
    """The averaged copy of `network`, or None.

    The decay rises with the step number (timm's warm-up), as a short run would otherwise keep its random start.
    """
    return None if config.ema is None else ModelEmaV3(network, decay=config.ema, use_warmup=True)


def make_mixup(augment: Augment | None, num_classes: int | None, batch_size: int) -> Mixup | None:
    """timm's mixing of images and labels, where `augment` asks for it.

    Raises:
        UserError: no number of classes, or an odd batch (0 where it is not known).
    """
    if augment is None or not (augment.mixup or augment.cutmix):
        return None
    if num_classes is None:
        raise UserError("num_classes is not given; mixing labels needs it. Pass num_classes to fit.")
    if batch_size % 2:
        raise UserError(
            f"batch_size is {batch_size}; mixup and cutmix pair images, so it must be even. Use {batch_size - 1}."
        )
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=max(1, num_classes),  # of images without labels only the images are mixed
    )
