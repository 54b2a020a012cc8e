"""One loss on all weight sets that an Arch has in a Supernet together (left and right in ViTAS).

Paper: ViTAS (arXiv 2106.13700), section 3, after BCNet (arXiv 2105.10446). The authors add the two sides' logits
before the softmax; `combine="mean"` takes their mean instead, so that training and evaluation see logits of one size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.train.gives import Gives
from vitnas.train.task import Batch, Outputs, Task

COMBINES = ("sum", "mean")


@dataclass(frozen=True)
class CombinedSides(Task):
    """`task` on the outputs of all sides together. A network with one weight set per Arch trains as by `task` alone."""

    task: Task
    combine: Literal["sum", "mean"] = "sum"
    wants: tuple[str, ...] = field(init=False)
    wants_taught: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.combine not in COMBINES:
            raise UserError(
                f"combine is {self.combine!r}; it must be one of {', '.join(COMBINES)}. Use 'sum'."
            )
        for name in ("wants", "wants_taught"):
            names = tuple(f"sides.{self.combine}.{each}" for each in getattr(self.task, name))
            object.__setattr__(self, name, names)

    @property
    def own(self) -> nn.Module | None:  # type: ignore[override]
        return self.task.own

    def meet(self, student: Gives, teacher: Gives) -> CombinedSides:
        return replace(self, task=self.task.meet(student, teacher))

    def mix(self, batch: Batch) -> Batch:
        return self.task.mix(batch)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        return self.task(self._bare(outputs), batch, self._bare(taught))

    def _bare(self, outputs: Outputs) -> Outputs:
        return {name.removeprefix(f"sides.{self.combine}."): output for name, output in outputs.items()}
