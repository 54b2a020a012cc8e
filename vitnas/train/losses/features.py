"""Learning a teacher's features through a projection that lifts the student's to the teacher's width.

A student that is narrower than its teacher cannot have the teacher's features; it can have some from which these
follow. So a linear layer per place, trained beside the student and dropped with the training, makes the student's
features as wide. Cosine and smooth-L1 by AM-RADIO (arXiv 2312.06709, section 3.3), both against features whitened per
token, as in Wei et al. (arXiv 2205.14141, section 3): single channels of a pretrained ViT are larger than all others
together.

Shapes: B images, N tokens, P patches, D channels of the student, T of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.errors import UserError, check_words
from vitnas.train.gives import Gives
from vitnas.train.losses.distillation import TaughtLoss
from vitnas.train.losses.pairing import (
    BlockPairs,
    Pairs,
    check_grids,
    kept_BP,
    matched,
    mean_of_kept,
    side_of,
)
from vitnas.train.task import Batch, Outputs, Task

TOKENS = [("tokens", "tokens", "tokens")]  # name of the lift, output of the student, of the teacher
Part = Literal["class", "patch"]
PARTS: tuple[Part, ...] = ("class", "patch")


@dataclass(frozen=True, kw_only=True)
class Features(TaughtLoss):
    """The teacher's features of the class token and the patches (`parts`), lifted: the last tokens behind the norm, or
    pairs of `blocks` ([[3,7],[-1,-1]]: of the student, of the teacher; -1 is the last).

    The loss of a token is `cosine` times (1 - cosine similarity) plus `smooth_l1` times the mean smooth-L1; the mean
    over tokens, parts and places is taken. Patches of another grid are resampled.
    """

    word = "features"

    blocks: Pairs = ()
    parts: tuple[Part, ...] = PARTS
    cosine: float = 0.9
    smooth_l1: float = 0.1

    def __post_init__(self) -> None:
        check_words("features.parts", self.parts, PARTS)
        if not self.parts or self.cosine < 0 or self.smooth_l1 < 0 or not self.cosine + self.smooth_l1:
            raise UserError(
                f"features.parts is {list(self.parts)}, cosine {self.cosine} and smooth_l1 {self.smooth_l1}; they are "
                "compared in at least one part by at least one of both. Use the defaults."
            )

    def meet(self, student: Gives, teacher: Gives) -> Task:
        return Lifted(self, student, teacher)


class Lifted(Task):
    """`Features` between two networks. `own` has a lift per place; an Arch of a Supernet uses the first columns.

    Raises:
        UserError: a block that is not there, or nothing that both networks have.
    """

    def __init__(self, config: Features, student: Gives, teacher: Gives) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        self.pairs = BlockPairs(config.blocks, student, teacher, "features.blocks") if config.blocks else None
        self.wants = ("keep?", *(("tokens",) if self.pairs is None else self.pairs.wants))
        self.wants_taught = ("tokens",) if self.pairs is None else self.pairs.wants_taught
        places = TOKENS if self.pairs is None else self.pairs.most
        self.own: nn.ModuleDict = nn.ModuleDict(
            {name: nn.Linear(student.width(mine), teacher.width(theirs)) for name, mine, theirs in places}
        )
        check_grids(teacher, self.wants_taught)
        for name in self.wants_taught:
            prefix, _ = teacher.split(name) or (0, None)
            if "patch" not in config.parts and not (prefix and student.prefix):
                raise UserError(
                    f"features.parts is {list(config.parts)}, but not both networks have a class token in {name}; "
                    "there is nothing to compare. Use features.parts=[patch]."
                )

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        keep_BP = kept_BP(outputs)
        losses = [
            self._compare(name, outputs[mine], taught[theirs], keep_BP)
            for name, mine, theirs in (TOKENS if self.pairs is None else self.pairs.of(outputs))
        ]
        return {"loss": torch.stack(losses).mean()}

    def _compare(self, name: str, mine_BND: Tensor, theirs_BNT: Tensor, keep_BP: Tensor | None) -> Tensor:
        lift = self.own[name]
        assert isinstance(lift, nn.Linear)
        lifted_BNT = functional.linear(mine_BND, lift.weight[:, : mine_BND.shape[-1]], lift.bias)
        mine = side_of(lifted_BNT, self.student, "network")
        theirs = side_of(theirs_BNT, self.teacher, "teacher")
        found = []
        with torch.autocast(mine_BND.device.type, enabled=False):
            if "patch" in self.config.parts:
                found.append(mean_of_kept(self._loss(*matched(mine, theirs, keep_BP)), keep_BP))
            if "class" in self.config.parts and mine.prefix_BKD.shape[1] and theirs.prefix_BKD.shape[1]:
                found.append(self._loss(mine.prefix_BKD[:, :1], theirs.prefix_BKD[:, :1]).mean())
        return torch.stack(found).mean()

    def _loss(self, lifted_BNT: Tensor, taught_BNT: Tensor) -> Tensor:
        """(B, N) of each token."""
        lifted_BNT = lifted_BNT.float()
        white_BNT = functional.layer_norm(taught_BNT.float(), taught_BNT.shape[-1:])
        cosine_BN = 1 - functional.cosine_similarity(lifted_BNT, white_BNT, dim=-1)
        smooth_BN = functional.smooth_l1_loss(lifted_BNT, white_BNT, reduction="none").mean(-1)
        return self.config.cosine * cosine_BN + self.config.smooth_l1 * smooth_BN
