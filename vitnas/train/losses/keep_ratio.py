"""Labels and how many patches are kept: what a network with selections that draw learns by itself (DynamicViT).

Source: DynamicViT (arXiv 2106.02034, section 3.3). The paper's other two terms are a teacher's, the same network with
all patches: the losses `soft` and `tokens` of `teacher.losses`, with weights of 0.5 each.

Shapes: B images, S selections, P patches, Y classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vitnas.errors import UserError, check_word
from vitnas.train.losses.soft import label_loss
from vitnas.train.task import Batch, Outputs, Task, TaskConfig, TaskGiven

Per = Literal["image", "batch"]
PER: tuple[Per, ...] = ("image", "batch")


def ratio_loss(keep_BSP: Tensor, shares_BS: Tensor, per: Per = "image") -> Tensor:
    """The squared difference of the share of patches that a draw keeps from the one to be kept, mean over selections.

    Args:
        keep_BSP: 1 for those kept, with the gradient of the decision.
        per: `image` holds each image to the share, `batch` the mean over the images of a batch.
    """
    drawn_BS = keep_BSP.float().mean(2)
    if per == "batch":
        drawn_BS, shares_BS = drawn_BS.mean(0, keepdim=True), shares_BS[:1]
    return (drawn_BS - shares_BS.float()).square().mean()


@dataclass(frozen=True, kw_only=True)
class KeepRatio(Task):
    """Cross-entropy to the labels, plus `ratio_weight` times `ratio_loss`.

    A network without selections, or one whose selections draw nothing, learns the labels alone.

    Attributes:
        shares: share of all patches to keep behind each selection; by default what the network keeps in evaluation.
        per: see `ratio_loss`.
        label_smoothing: for class numbers; mixed targets bring their own.
        labels: learn them too; False leaves `ratio_weight` times `ratio_loss`, for beside a teacher.
    """

    ratio_weight: float = 2.0
    shares: tuple[float, ...] = ()
    per: Per = "image"
    label_smoothing: float = 0.0
    labels: bool = True
    wants = ("logits", "keep?", "shares?")

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        loss = outputs["logits"].new_zeros(())
        if self.labels:
            loss = found["ce"] = label_loss(outputs["logits"], batch, self.label_smoothing)
        if "keep" in outputs:
            found["ratio"] = self._ratio(outputs)
            loss = loss + self.ratio_weight * found["ratio"]
        return {"loss": loss, **found}

    def _ratio(self, outputs: Outputs) -> Tensor:
        shares_BS = outputs["shares"]
        if self.shares:
            if len(self.shares) != shares_BS.shape[1]:
                raise UserError(
                    f"shares is {list(self.shares)} and the network has {shares_BS.shape[1]} selections; each has one "
                    "share. Give as many, or leave shares out."
                )
            shares_BS = shares_BS.new_tensor(self.shares).expand_as(shares_BS)
        return ratio_loss(outputs["keep"], shares_BS, self.per)


@dataclass(frozen=True, kw_only=True)
class KeepRatioConfig(TaskConfig):
    """The labels, and `ratio_weight` times how far the share of patches that are drawn is from the one to be kept:
    `per` image, or per batch."""

    kind = "dynamicvit"
    needs_selections = True

    ratio_weight: float = 2.0
    per: Per = "image"

    def __post_init__(self) -> None:
        check_word("task.per", self.per, PER)
        if self.ratio_weight < 0:
            raise UserError(f"task.ratio_weight is {self.ratio_weight}; it cannot be negative. Use 2.")

    def build(self, given: TaskGiven) -> KeepRatio:
        return KeepRatio(
            ratio_weight=self.ratio_weight, per=self.per, label_smoothing=given.augment.label_smoothing
        )
