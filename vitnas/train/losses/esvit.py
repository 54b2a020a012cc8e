"""Self-distillation of views and regions: EsViT's losses (arXiv 2106.09785, section 3). DINO's is the view loss alone.

A student sees several crops of an image, an averaged teacher only the first two, whole ones. From each crop the student
says what the teacher says of every other crop: of the image (view), and of that region of it whose features are most
alike (region). What the teacher says is centred and sharpened (`train/esvit.py`).

Memory. The plain way gathers, for every pair of crops, one teacher row of K numbers per student region and keeps it
for the backward pass. Here all teacher crops of a student crop are one target, rows are gone through in pieces, and
what is kept is the gradient, which is as large as the logits (`cross_entropy`).

Shapes: B images, V crops, P regions of a crop, D channels, K prototypes, R rows, T rows of the teacher, Q of its crops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vitnas.errors import UserError
from vitnas.sample.hook import Moment
from vitnas.train.gives import Gives
from vitnas.train.projection_heads import ProjectionHead
from vitnas.train.task import Batch, Outputs, Task
from vitnas.train.teacher import Momentum

PIECE = 1 << 22  # logits that are gone through at once: 16 MB


def cross_entropy(
    logits_RK: Tensor, taught: Sequence[Tensor], index: Sequence[Tensor], temperature: float
) -> Tensor:
    """The sum over rows and over `taught` of the cross-entropy between a teacher's row and the student's.

    Args:
        logits_RK: of the student.
        taught: (T, K) probabilities each, without gradient.
        index: (R,) each: which row of it a row of the student learns.
        temperature: the student's.
    """
    total: Tensor = _CrossEntropy.apply(logits_RK, temperature, len(taught), *taught, *index)
    return total


class _CrossEntropy(torch.autograd.Function):
    """Makes the gradient in the forward pass, piece by piece, and keeps nothing else."""

    @staticmethod
    def forward(ctx: Any, logits_RK: Tensor, temperature: float, count: int, *given: Tensor) -> Tensor:
        taught, index = given[:count], given[count:]
        gradient = torch.empty_like(logits_RK) if ctx.needs_input_grad[0] else None
        total = logits_RK.new_zeros((), dtype=torch.float32)
        rows = max(1, PIECE // logits_RK.shape[1])
        for start in range(0, len(logits_RK), rows):
            piece = slice(start, start + rows)
            log_rK = functional.log_softmax(logits_RK[piece].float() / temperature, dim=-1)
            target_rK = torch.zeros_like(log_rK)
            for probabilities_TK, rows_R in zip(taught, index, strict=True):
                target_rK += probabilities_TK[rows_R[piece]]
            total -= torch.dot(target_rK.flatten(), log_rK.flatten())
            if gradient is not None:
                whole_r1 = target_rK.sum(-1, keepdim=True)
                gradient[piece] = log_rK.exp_().mul_(whole_r1).sub_(target_rK).div_(temperature)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad.to(gradient.dtype), *[None] * (len(ctx.needs_input_grad) - 1))


def view_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], temperature: float, mixing: Sequence[Tensor] = ()
) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's crop and another crop of the student.

    Args:
        students: (B, K) logits of each crop; the teacher's crops come first.
        teachers: (B, K) probabilities of each crop.
        mixing: of each student's crop, where it shows mixed images: (B, B) shares, what row i's image has in that at
            column j.
    """
    rows_B = torch.arange(len(students[0]), device=students[0].device)
    total = students[0].new_zeros((), dtype=torch.float32)
    for crop, logits_BK in enumerate(students):
        taught = [probabilities for other, probabilities in enumerate(teachers) if other != crop]
        if mixing:
            taught = [mixing[crop].float().t() @ probabilities for probabilities in taught]
        total = total + cross_entropy(logits_BK, taught, [rows_B] * len(taught), temperature)
    return total / (len(rows_B) * _pairs(students, teachers))


def region_loss(
    students: Sequence[Tensor],
    student_features: Sequence[Tensor],
    teachers: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    temperature: float,
    mixing: Sequence[Tensor] = (),
) -> Tensor:
    """The same between regions: each of the student's learns that of the teacher's crop whose features are most alike.

    Crops may differ in their number of regions.

    Args:
        students, teachers: (B, P, K) logits, and probabilities.
        student_features, teacher_features: (B, P, D), from before the heads.
        mixing: as in `view_loss`. The region is found in each of the images that are mixed, and its share is what is
            learned of it; the authors' code does not look at it here.
    """
    total = students[0].new_zeros((), dtype=torch.float32)
    flat = [probabilities_BPK.flatten(0, 1) for probabilities_BPK in teachers]
    for crop, logits_BPK in enumerate(students):
        others = [number for number in range(len(teachers)) if number != crop]
        size = logits_BPK.shape[0] * logits_BPK.shape[1]
        if mixing:
            found = _mixed(
                logits_BPK, student_features[crop], teachers, teacher_features, others, mixing[crop]
            )
            rows_R = torch.arange(size, device=logits_BPK.device)
            loss = cross_entropy(logits_BPK.flatten(0, 1), [found], [rows_R], temperature)
        else:
            index = [alike(student_features[crop], teacher_features[other]) for other in others]
            loss = cross_entropy(
                logits_BPK.flatten(0, 1), [flat[other] for other in others], index, temperature
            )
        total = total + loss / size
    return total / _pairs(students, teachers)


@torch.no_grad()
def alike(mine_BPD: Tensor, theirs_BPD: Tensor) -> Tensor:
    """(B P,) for each of my regions the number, counted through the batch, of the most similar one of the same image.

    By the channels that both have: a narrower Arch of a Supernet has the first ones.
    """
    width = min(mine_BPD.shape[-1], theirs_BPD.shape[-1])
    mine, theirs = (functional.normalize(x[..., :width].float(), dim=-1) for x in (mine_BPD, theirs_BPD))
    with torch.autocast(mine.device.type, enabled=False):
        best_BP = (mine @ theirs.transpose(1, 2)).argmax(-1)
    first_B = torch.arange(len(theirs), device=theirs.device) * theirs.shape[1]
    return (best_BP + first_B[:, None]).flatten()


def _mixed(
    logits_BPK: Tensor,
    features_BPD: Tensor,
    teachers: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    others: Sequence[int],
    shares_BB: Tensor,
) -> Tensor:
    """(B P, K) what the regions of mixed images learn, from all of the teacher's crops."""
    target_BPK = torch.zeros_like(logits_BPK, dtype=torch.float32)
    for image, into in shares_BB.nonzero().tolist():
        for other in others:
            best_P = alike(features_BPD[into][None], teacher_features[other][image][None])
            target_BPK[into] += shares_BB[image, into] * teachers[other][image][best_P]
    return target_BPK.flatten(0, 1).detach()


def _pairs(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> int:
    return sum(crop != other for crop in range(len(students)) for other in range(len(teachers)))


def entropies(probabilities_BK: Tensor) -> dict[str, Tensor]:
    """How sure the teacher is of an image, and how varied over the batch, in nats.

    A teacher that says the same of all images has collapsed: onto one prototype (`winner_entropy` near 0), or onto none
    (`teacher_entropy` near ln K).
    """
    return {
        "teacher_entropy": torch.special.entr(probabilities_BK).sum(-1).mean(),
        "winner_entropy": torch.special.entr(probabilities_BK.mean(0)).sum(),
    }


class EsViT(Task):
    """The view loss, or from epoch `region_from` on half of it and half the region loss.

    What it wants taught is a `SelfTeacher`'s (`train/esvit.py`): `views.0.view` and `views.0.region`, probabilities
    (B, K) and (B, P, K), `views.0.patches`, the features that these were made from, and `center_norm`, (B,) all alike.

    Args:
        crops: of a batch, those of the teacher first.
        taught_crops: how many the teacher sees.
        region_from: epoch at which regions begin; None for none.
        freeze_last_layer: epochs in which a head's last layer stays as it began, counted from where its loss begins.
        weight_decay: of (step, steps); None leaves it to the optimizer.
        head: makes a head for features of a width.
    """

    def __init__(
        self,
        *,
        crops: int,
        taught_crops: int,
        head: Callable[[int], ProjectionHead],
        student_temp: float,
        region_from: float | None = None,
        freeze_last_layer: float = 0.0,
        weight_decay: Momentum | None = None,
    ) -> None:
        self.crops, self.taught_crops, self.student_temp = crops, taught_crops, student_temp
        self.region_from, self.freeze_last_layer, self.weight_decay = (
            region_from,
            freeze_last_layer,
            weight_decay,
        )
        self._head = head
        self._prefix = 0
        self._begin(0.0)

    def meet(self, student: Gives, teacher: Gives) -> Task:
        """Make the heads, and see that there are regions where these are learned."""
        heads = {"view": self._head(student.width("pooled"))}
        if self.region_from is not None:
            self._prefix = _prefix(student)
            heads["region"] = self._head(student.width("tokens"))
        self.own: nn.ModuleDict = nn.ModuleDict(heads)
        self._begin(0.0)
        return self

    def _begin(self, epoch: float) -> None:
        """Take up what is learned in this epoch."""
        begins = {"view": 0.0} | ({} if self.region_from is None else {"region": self.region_from})
        self.parts = [part for part, begin in begins.items() if epoch >= begin]
        kinds = ("pooled", "tokens")[: len(self.parts)]
        self.wants = tuple(f"views.{crop}.{kind}" for crop in range(self.crops) for kind in kinds)
        said = ("view", "region", "patches") if "region" in self.parts else ("view",)
        asked = [f"views.{crop}.{kind}" for crop in range(self.taught_crops) for kind in said]
        self.wants_taught = (*asked, "center_norm")
        for part, head in {} if self.own is None else self.own.items():
            assert isinstance(head, ProjectionHead)
            head.learn_last(epoch >= begins[part] + self.freeze_last_layer)

    def before(self, moment: Moment) -> None:
        self._begin(moment.epoch)
        if self.weight_decay is not None:
            for group in moment.optimizer.param_groups:
                if group["weight_decay"]:
                    group["weight_decay"] = self.weight_decay(moment.step, moment.steps)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: all follows from the epoch."""
        return {}

    def restore(self, tensors: Any) -> None:
        """Nothing."""

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        taught_views = [taught[f"views.{crop}.view"] for crop in range(self.taught_crops)]
        pooled = [outputs[f"views.{crop}.pooled"] for crop in range(self.crops)]
        logits = self.own["view"](torch.cat(pooled)).chunk(self.crops)
        found = {"view": view_loss(logits, taught_views, self.student_temp)}
        loss = found["view"]
        if "region" in self.parts:
            found["region"] = self._region(outputs, taught)
            loss = (loss + found["region"]) / 2
        said = {**entropies(taught_views[0]), "center_norm": taught["center_norm"].mean()}
        return {"loss": loss, **found, **said}

    def patches(self, tokens_BND: Tensor) -> Tensor:
        """The regions among the tokens."""
        return tokens_BND[:, self._prefix :]

    def _region(self, outputs: Outputs, taught: Outputs) -> Tensor:
        patches = [self.patches(outputs[f"views.{crop}.tokens"]) for crop in range(self.crops)]
        sizes = [each.shape[:2] for each in patches]
        rows_RK = self.own["region"](torch.cat([each.flatten(0, 1) for each in patches]))
        parts = rows_RK.split([size.numel() for size in sizes])
        return region_loss(
            [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)],
            patches,
            [taught[f"views.{crop}.region"] for crop in range(self.taught_crops)],
            [taught[f"views.{crop}.patches"] for crop in range(self.taught_crops)],
            self.student_temp,
        )


def _prefix(student: Gives) -> int:
    """Tokens in front of the regions.

    Raises:
        UserError: the network has no grid of regions, or one of a single region.
    """
    height, width = student.image_size
    if not student.has("tokens"):
        raise UserError(
            "the region loss needs the features of an image's regions, and this network gives none (it has no "
            "forward_features). Use another network, or region=false."
        )
    found = student.split("tokens")
    if found is None:
        raise UserError(
            f"the region loss needs a grid of regions, and this network's last tokens are none for images of {height} "
            f"x {width} pixels (patches were dropped or merged). Use a network that keeps them all, or region=false."
        )
    if found[1] == (1, 1):
        raise UserError(
            f"the region loss matches the regions of an image, and this network has one for an image of {height} x "
            f"{width} pixels. Use larger images, smaller patches or fewer stages, or region=false."
        )
    return found[0]
