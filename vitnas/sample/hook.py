"""Hook: what happens beside the steps of a training, such as a Sampler that learns or widths that open.

`fit` calls it; it lives here because Samplers are what needs it most, and they know nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a training is, before one of its steps.

    Attributes:
        step, steps: optimizer steps done, and of the whole training.
        epoch: passes over the data done.
        seed: of the training; randomness must follow from it, the step and the hook's own state.
        network: in training mode; what a hook changes there (its mode, its generators) it puts back.
        optimizer: its moments may be changed in place.
        share: gives every process the first one's values of a tensor, in place; a no-op in a single process.
    """

    step: int
    steps: int
    epoch: float
    seed: int
    network: nn.Module
    optimizer: torch.optim.Optimizer
    share: Callable[[Tensor], None]


@runtime_checkable
class Hook(Protocol):
    """A Sampler or Task with these methods is one by itself.

    Everything that a resumed training needs is in `tensors`, or follows from the Moment; so `before` of a step must not
    depend on how often it was called. All processes call it, and must end with the same state.
    """

    def before(self, moment: Moment) -> Mapping[str, Any] | None:
        """Called before every step. What it returns becomes a line of metrics.jsonl."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """State for the checkpoint; {} where there is none."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        ...
