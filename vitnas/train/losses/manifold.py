"""Manifold distillation: patches of a batch shall lie to each other as the teacher's do.

Paper: Hao et al., "Learning Efficient Vision Transformers via Fine-Grained Manifold Distillation" (arXiv 2107.01378),
section 3.2. The relations of all patches of a batch, a matrix of (B P)^2, are too many; three parts of it are
compared: of the patches of each image, of each place over the batch, and of K patches drawn at random. Only these
matrices are compared, so the widths of the networks may differ. Deviations are in PAPERS.md.

Shapes: B images, P patches, K patches drawn, D channels of the student, T of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vitnas.errors import UserError
from vitnas.train.gives import Gives
from vitnas.train.losses.distillation import TaughtLoss
from vitnas.train.losses.pairing import BlockPairs, Pairs, check_grids, kept_BP, matched, side_of
from vitnas.train.task import Batch, Outputs, Task


@dataclass(frozen=True, kw_only=True)
class Manifold(TaughtLoss):
    """How the teacher's patches lie to each other (arXiv 2107.01378), in pairs of `blocks`, by default the first four
    and the last four of both networks.

    The mean over pairs of: `patch` times the difference within images, `sample` times that over the batch at each
    place, `random` times that of `num_random` patches drawn anew per pair. Patches of another grid are resampled; those
    that the student drops are left out.
    """

    word = "manifold"

    blocks: Pairs = ()
    sample: float = 0.1
    patch: float = 4.0
    random: float = 0.2
    num_random: int = 192

    def __post_init__(self) -> None:
        weights = (self.sample, self.patch, self.random)
        if min(weights) < 0 or not any(weights) or self.num_random < 1:
            raise UserError(
                f"manifold.sample, patch and random are {weights} and num_random is {self.num_random}; weights "
                "cannot be negative nor all 0, and at least one patch is drawn. Use the defaults."
            )

    def meet(self, student: Gives, teacher: Gives) -> Task:
        return MetManifold(self, student, teacher)


class MetManifold(Task):
    """`Manifold` between two networks.

    Raises:
        UserError: a block that is not there, or a teacher whose patches are no grid.
    """

    def __init__(self, config: Manifold, student: Gives, teacher: Gives) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        self.pairs = BlockPairs(config.blocks, student, teacher, "manifold.blocks")
        self.wants = ("keep?", *self.pairs.wants)
        self.wants_taught = self.pairs.wants_taught
        check_grids(teacher, self.wants_taught)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        keep_BP = kept_BP(outputs)
        config, found = self.config, []
        for _, name, other in self.pairs.of(outputs):
            mine = side_of(outputs[name], self.student, "network")
            theirs = side_of(taught[other], self.teacher, "teacher")
            with torch.autocast(mine.patches_BPD.device.type, enabled=False):
                mine_BPD, theirs_BPT = (unit(x) for x in matched(mine, theirs, keep_BP))
                if keep_BP is not None:
                    mine_BPD, theirs_BPT = mine_BPD * keep_BP[..., None], theirs_BPT * keep_BP[..., None]
                terms = within_images(mine_BPD, theirs_BPT), over_images(mine_BPD, theirs_BPT)
                chosen_K = drawn(mine_BPD.shape[0] * mine_BPD.shape[1])[: config.num_random]
                chosen_K = chosen_K.to(mine_BPD.device, non_blocking=True)
                found.append(torch.stack([*terms, of_chosen(mine_BPD, theirs_BPT, chosen_K)]))
        patch, sample, random = torch.stack(found).mean(0).unbind()
        parts = {
            "patch": config.patch * patch,
            "sample": config.sample * sample,
            "random": config.random * random,
        }
        return {"loss": parts["patch"] + parts["sample"] + parts["random"], **parts}


def unit(x_BPD: Tensor) -> Tensor:
    """Float32, of length 1 over the channels."""
    return functional.normalize(x_BPD.float(), dim=-1)


def within_images(student_BPD: Tensor, teacher_BPT: Tensor) -> Tensor:
    """Mean squared difference of the relations of the patches of each image; both of length 1."""
    return (gram(teacher_BPT) - gram(student_BPD)).square().mean()


def over_images(student_BPD: Tensor, teacher_BPT: Tensor) -> Tensor:
    """The same of the patches at one place, over the batch."""
    return within_images(student_BPD.transpose(0, 1), teacher_BPT.transpose(0, 1))


def of_chosen(student_BPD: Tensor, teacher_BPT: Tensor, chosen_K: Tensor) -> Tensor:
    """The same of some of all B P patches."""
    return within_images(student_BPD.flatten(0, 1)[chosen_K], teacher_BPT.flatten(0, 1)[chosen_K])


def gram(x_XND: Tensor) -> Tensor:
    """(X, N, N) cosines of N vectors of length 1."""
    return x_XND @ x_XND.transpose(-1, -2)


def drawn(num: int) -> Tensor:
    """A permutation, by the global generator of the host, which the loop seeds for the step."""
    return torch.randperm(num)
