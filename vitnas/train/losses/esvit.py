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
from typing import Any, NamedTuple

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


class Mixing(NamedTuple):
    """How a crop shows mixed images: `share_B` of each is its own, the rest that of the image at `partner_B`."""

    partner_B: Tensor
    share_B: Tensor


class Taught(NamedTuple):
    """What rows of the student learn: of (T, K) probabilities the rows `index_R`, each with a weight (None: 1)."""

    probabilities_TK: Tensor
    index_R: Tensor
    weight_R: Tensor | None = None


def cross_entropy(logits_RK: Tensor, taught: Sequence[Taught], temperature: float) -> Tensor:
    """The sum over rows and over `taught` of the cross-entropy to what is taught, which gets no gradient.

    Args:
        logits_RK: of the student.
        temperature: the student's.
    """
    total: Tensor = _CrossEntropy.apply(logits_RK, taught, temperature)
    return total


class _CrossEntropy(torch.autograd.Function):
    """Makes the gradient in the forward pass, piece by piece, and keeps nothing else."""

    @staticmethod
    def forward(ctx: Any, logits_RK: Tensor, taught: Sequence[Taught], temperature: float) -> Tensor:
        gradient = torch.empty_like(logits_RK) if ctx.needs_input_grad[0] else None
        total = logits_RK.new_zeros((), dtype=torch.float32)
        rows = max(1, PIECE // logits_RK.shape[1])
        for start in range(0, len(logits_RK), rows):
            piece = slice(start, start + rows)
            log_rK = functional.log_softmax(logits_RK[piece].float() / temperature, dim=-1)
            target_rK = torch.zeros_like(log_rK)
            for probabilities_TK, index_R, weight_R in taught:
                said_rK = probabilities_TK[index_R[piece]]
                target_rK += said_rK if weight_R is None else said_rK * weight_R[piece, None]
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
        return gradient * grad.to(gradient.dtype), None, None


def view_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    temperature: float,
    mixing: Sequence[Mixing] = (),
) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's crop and another crop of the student.

    Args:
        students: (B, K) logits of each crop; the teacher's crops come first.
        teachers: (B, K) probabilities of each crop.
        mixing: of each of the student's crops, where it shows mixed images.
    """
    rows_B = torch.arange(len(students[0]), device=students[0].device)
    total = students[0].new_zeros((), dtype=torch.float32)
    for crop, logits_BK in enumerate(students):
        taught = []
        for other in _others(crop, teachers):
            if mixing:
                partner_B, share_B = mixing[crop]
                taught += [
                    Taught(teachers[other], rows_B, share_B),
                    Taught(teachers[other], partner_B, 1 - share_B),
                ]
            else:
                taught.append(Taught(teachers[other], rows_B))
        total = total + cross_entropy(logits_BK, taught, temperature)
    return total / (len(rows_B) * _pairs(students, teachers))


def region_loss(
    students: Sequence[Tensor],
    student_features: Sequence[Tensor],
    teachers: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    temperature: float,
    mixing: Sequence[Mixing] = (),
) -> Tensor:
    """The same between regions: each of the student's learns that of the teacher's crop whose features are most alike.

    Crops may differ in their number of regions.

    Args:
        students, teachers: (B, P, K) logits, and probabilities.
        student_features, teacher_features: (B, P, D), from before the heads.
        mixing: as in `view_loss`. The most similar region of each of the two images is learned, by its share; the
            authors' code does not look at mixing here.
    """
    total = students[0].new_zeros((), dtype=torch.float32)
    for crop, logits_BPK in enumerate(students):
        taught, regions = [], logits_BPK.shape[1]
        for other in _others(crop, teachers):
            flat, mine, theirs = (
                teachers[other].flatten(0, 1),
                student_features[crop],
                teacher_features[other],
            )
            if mixing:
                partner_B, share_B = mixing[crop]
                share_R = share_B.repeat_interleave(regions)
                taught += [
                    Taught(flat, alike(mine, theirs), share_R),
                    Taught(flat, alike(mine, theirs, partner_B), 1 - share_R),
                ]
            else:
                taught.append(Taught(flat, alike(mine, theirs)))
        size = logits_BPK.shape[0] * regions
        total = total + cross_entropy(logits_BPK.flatten(0, 1), taught, temperature) / size
    return total / _pairs(students, teachers)


@torch.no_grad()
def alike(mine_BPD: Tensor, theirs_BPD: Tensor, image_B: Tensor | None = None) -> Tensor:
    """(B P,) for each of my regions the number, counted through the batch, of the most similar one of the same image.

    By the channels that both have: a narrower Arch of a Supernet has the first ones.

    Args:
        image_B: numbers of the images to look at instead.
    """
    places_B = torch.arange(len(theirs_BPD), device=theirs_BPD.device)
    if image_B is not None:
        theirs_BPD, places_B = theirs_BPD[image_B], image_B
    width = min(mine_BPD.shape[-1], theirs_BPD.shape[-1])
    mine, theirs = (functional.normalize(x[..., :width].float(), dim=-1) for x in (mine_BPD, theirs_BPD))
    with torch.autocast(mine.device.type, enabled=False):
        best_BP = (mine @ theirs.transpose(1, 2)).argmax(-1)
    return (best_BP + places_B[:, None] * theirs.shape[1]).flatten()


def _others(crop: int, teachers: Sequence[Tensor]) -> list[int]:
    return [other for other in range(len(teachers)) if other != crop]


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
        mixup: the student's crops show two images, shares drawn by Beta(mixup, mixup); the teacher sees them apart.
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
        mixup: float = 0.0,
    ) -> None:
        self.crops, self.taught_crops, self.student_temp = crops, taught_crops, student_temp
        self.region_from, self.freeze_last_layer, self.weight_decay = (
            region_from,
            freeze_last_layer,
            weight_decay,
        )
        self.mixup = mixup
        self._head, self._prefix = head, 0
        self._begins = {"view": 0.0} | ({} if region_from is None else {"region": region_from})
        self._begin(0.0)

    def meet(self, student: Gives, teacher: Gives) -> Task:
        """Make the heads, and see that there are regions where these are learned."""
        heads = {"view": self._head(student.width("pooled"))}
        if self.region_from is not None:
            self._prefix = _prefix(student)
            heads["region"] = self._head(student.width("tokens"))
        self.own: nn.ModuleDict = nn.ModuleDict(heads)
        return self

    def _begin(self, epoch: float) -> None:
        """Take up what is learned in this epoch."""
        self.parts = [part for part, begin in self._begins.items() if epoch >= begin]
        kinds = ("pooled", "tokens")[: len(self.parts)]
        self.wants = tuple(f"views.{self._at(crop)}.{kind}" for crop in range(self.crops) for kind in kinds)
        said = ("view", "region", "patches") if "region" in self.parts else ("view",)
        asked = [f"views.{crop}.{kind}" for crop in range(self.taught_crops) for kind in said]
        self.wants_taught = (*asked, "center_norm")

    def _at(self, crop: int) -> int:
        """Where the student's crop is among the views: behind the teacher's own where it is another."""
        return crop + (self.taught_crops if self.mixup else 0)

    def mix(self, batch: Batch) -> Batch:
        """With `mixup`, the teacher's crops and then those of the student. Targets are the shares, a column per crop,
        and the partner's number."""
        if not self.mixup:
            return batch
        device, count = batch.images_BCHW.device, len(batch)
        partner_B = torch.arange(count, device=device).flip(0)
        shares_BV = torch.distributions.Beta(self.mixup, self.mixup).sample((count, self.crops)).to(device)
        mixed = [
            view.lerp(view.flip(0), 1 - share_B[:, None, None, None])
            for view, share_B in zip(batch.views, shares_BV.unbind(1), strict=True)
        ]
        views = (*batch.views[: self.taught_crops], *mixed)
        return Batch(views, torch.cat([shares_BV, partner_B[:, None].float()], dim=1))

    def _mixing(self, batch: Batch) -> list[Mixing]:
        if not self.mixup:
            return []
        *shares, partner = batch.targets.unbind(1)
        partner_B = partner.long()
        if int(partner_B.max()) != len(batch) - 1 or int(partner_B[-1]) != 0:
            raise UserError(
                "mixup pairs the images of a batch, and an Arch sees a part of one. Use a sampler that gives each Arch "
                "the whole batch, or mixup=0."
            )
        return [Mixing(partner_B, share_B) for share_B in shares]

    def before(self, moment: Moment) -> None:
        self._begin(moment.epoch)
        for part, head in self.own.items():  # not before: the optimizer takes what learns when it is made
            assert isinstance(head, ProjectionHead)
            head.learn_last(moment.epoch >= self._begins[part] + self.freeze_last_layer)
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
        pooled = [outputs[f"views.{self._at(crop)}.pooled"] for crop in range(self.crops)]
        mixing = self._mixing(batch)
        logits = self.own["view"](torch.cat(pooled)).chunk(self.crops)
        found = {"view": view_loss(logits, taught_views, self.student_temp, mixing)}
        loss = found["view"]
        if "region" in self.parts:
            found["region"] = self._region(outputs, taught, mixing)
            loss = (loss + found["region"]) / 2
        said = {**entropies(taught_views[0]), "center_norm": taught["center_norm"].mean()}
        return {"loss": loss, **found, **said}

    def patches(self, tokens_BND: Tensor) -> Tensor:
        """The regions among the tokens."""
        return tokens_BND[:, self._prefix :]

    def _region(self, outputs: Outputs, taught: Outputs, mixing: Sequence[Mixing]) -> Tensor:
        patches = [self.patches(outputs[f"views.{self._at(crop)}.tokens"]) for crop in range(self.crops)]
        sizes = [each.shape[:2] for each in patches]
        rows_RK = self.own["region"](torch.cat([each.flatten(0, 1) for each in patches]))
        parts = rows_RK.split([size.numel() for size in sizes])
        return region_loss(
            [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)],
            patches,
            [taught[f"views.{crop}.region"] for crop in range(self.taught_crops)],
            [taught[f"views.{crop}.patches"] for crop in range(self.taught_crops)],
            self.student_temp,
            mixing,
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
