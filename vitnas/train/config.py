"""TrainConfig: everything about a training run that is not the data, the network or the Archs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vitnas.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    `lr` is what the optimizer gets; it is not scaled by the batch size. `warmup_epochs` and `epochs` count passes
    over the data. `ema` is the decay per optimizer step of an average of the weights, which is then what is
    evaluated and kept; None for none. `clip_grad` is the largest norm of all gradients together, or with
    `clip_per_tensor` of each parameter's. `accumulate` batches make one optimizer step. `drop_path` is the rate of
    stochastic depth at the last block, rising linearly from 0; None leaves what the network was made with.
    `monitor_every` epochs a few Archs, or the Model that trains, are evaluated on the holdout split; 0 for never.

    Parameters in whose name the regular expression `slow_names` is found learn at `slow_lr_scale` times the others'
    rate, and at a rate of 0 in the first `slow_frozen_epochs`; those of `frozen_names` at 0 throughout. `^(?!head)` is
    all but the head.
    """

    epochs: float = 30
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup_epochs: float = 1
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    clip_grad: float | None = 5.0
    clip_per_tensor: bool = False
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = None
    drop_path: float | None = None
    slow_names: str = ""
    slow_lr_scale: float = 0.01
    slow_frozen_epochs: float = 0
    frozen_names: str = ""
    monitor_every: float = 5
    checkpoint_minutes: float = 3
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "accumulate", "log_every"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0. Raise it.")
        for name in (
            "weight_decay",
            "warmup_epochs",
            "warmup_lr",
            "min_lr",
            "slow_lr_scale",
            "slow_frozen_epochs",
            "monitor_every",
            "checkpoint_minutes",
        ):
            if getattr(self, name) < 0:
                raise UserError(
                    f"{name} is {getattr(self, name)}; it cannot be negative. Use 0 to turn it off."
                )
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise UserError(f"clip_grad is {self.clip_grad}; it must be above 0. Use null for no clipping.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema is {self.ema}; it is a decay between 0 and 1. Use 0.999, or null for none.")
        if self.drop_path is not None and not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path is {self.drop_path}; it must be from 0 to below 1. Use 0.1.")
        for name in ("slow_names", "frozen_names"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}, no regular expression ({error}); it is searched in the names "
                    "of parameters. Use for example '^blocks'."
                ) from error
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise UserError(
                f"precision is {self.precision!r}; it must be fp32, bf16 or fp16. Use fp32 on a CPU."
            )
