"""A training step over all weight sets that an Arch has in a Supernet (left and right in ViTAS), with one loss.

Paper: ViTAS (arXiv 2106.13700), section 3, after BCNet (arXiv 2105.10446). The authors add the two sides' logits
before the softmax; `combine="mean"` takes their mean instead, so that training and evaluation see logits of one size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.train.task import Batch, Mixes, Task

COMBINES = ("sum", "mean")


@dataclass(frozen=True)
class AllSides:
    """`task` on the logits of all sides together. A network with one weight set per Arch trains as by `task` alone."""

    task: Task
    combine: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if self.combine not in COMBINES:
            raise UserError(
                f"combine is {self.combine!r}; it must be one of {', '.join(COMBINES)}. Use 'sum'."
            )

    def __call__(
        self, network: nn.Module, batch: Batch, arch: Arch | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        sides = 1 if arch is None else int(getattr(network, "sides", 1))
        return self.task(network if sides == 1 else _Together(network, sides, self.combine), batch, arch)


class _MixingAllSides(AllSides):
    """The same for a Task that mixes the images of a step before."""

    def mix(self, batch: Batch) -> Batch:
        assert isinstance(self.task, Mixes)
        return self.task.mix(batch)


def all_sides(task: Task, combine: Literal["sum", "mean"] = "sum") -> AllSides:
    """`task` on all sides together; it mixes images if `task` does."""
    kind = _MixingAllSides if isinstance(task, Mixes) else AllSides
    return kind(task, combine)


class _Together(nn.Module):
    """A Supernet that answers with its sides combined."""

    def __init__(self, network: nn.Module, sides: int, combine: str) -> None:
        super().__init__()
        self.network, self.sides = network, sides
        self.factor = 1 / sides if combine == "mean" else 1.0

    def forward(self, images_BCHW: Tensor, arch: Arch, **options: Any) -> Any:
        found = [self.network(images_BCHW, arch, side=side, **options) for side in range(self.sides)]
        if isinstance(found[0], dict):
            return {name: self._combine([heads[name] for heads in found]) for name in found[0]}
        return self._combine(found)

    def _combine(self, logits: list[Tensor]) -> Tensor:
        total = logits[0]
        for more in logits[1:]:
            total = total + more
        return total * self.factor if self.factor != 1 else total
