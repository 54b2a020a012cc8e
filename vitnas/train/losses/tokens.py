"""Learning a teacher's last tokens, entry by entry: for a student of the same width, such as the same network pruned.

Source: DynamicViT (arXiv 2106.02034, section 3.3): the mean squared difference over the patches that the student keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitnas.errors import UserError
from vitnas.train.gives import Gives
from vitnas.train.losses.distillation import TaughtLoss
from vitnas.train.losses.pairing import check_grids, kept_BP, matched, mean_of_kept, side_of
from vitnas.train.task import Batch, Outputs, Task


@dataclass(frozen=True, kw_only=True)
class Tokens(TaughtLoss):
    """The teacher's last patch tokens behind the norm, by mean squared difference; both networks are equally wide."""

    word = "tokens"

    wants = ("tokens", "keep?")
    wants_taught = ("tokens",)

    def meet(self, student: Gives, teacher: Gives) -> Task:
        mine, theirs = student.width("tokens"), teacher.width("tokens")
        if mine != theirs or student.varies:
            mine_text = f"{mine}" if student.space is None else f"up to {mine}"
            raise UserError(
                f"the network's tokens have {mine_text} channels, the teacher's {theirs}; the loss 'tokens' compares "
                "them one by one. Use the loss features, which lifts them."
            )
        check_grids(teacher, Tokens.wants_taught)
        return MetTokens(student, teacher)


class MetTokens(Task):
    """`Tokens` between two networks."""

    wants = Tokens.wants
    wants_taught = Tokens.wants_taught

    def __init__(self, student: Gives, teacher: Gives) -> None:
        self.student, self.teacher = student, teacher

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        keep_BP = kept_BP(outputs)
        mine = side_of(outputs["tokens"], self.student, "network")
        theirs = side_of(taught["tokens"], self.teacher, "teacher")
        with torch.autocast(mine.patches_BPD.device.type, enabled=False):
            mine_BPD, theirs_BPD = matched(mine, theirs, keep_BP)
            loss_BP = (mine_BPD.float() - theirs_BPD.float()).square().mean(-1)
            return {"loss": mean_of_kept(loss_BP, keep_BP)}
