"""Agreement: how nearly a network answers as another one, of which it was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.data import require_labels
from vitnas.errors import UserError
from vitnas.model.modes import evaluating
from vitnas.model.outputs import read_outputs
from vitnas.slimming.images import Images, pairs_of
from vitnas.slimming.regression import Regression

WANT = ("tokens", "pooled", "logits")


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of a network with its teacher.

    Args:
        tokens: mean cosine of the final tokens, all of them; None where there are fewer.
        pooled: mean cosine of what the classifier gets.
        top1: share of the images that both put into the same class; None without classes.
        kl: mean divergence of its answers from the teacher's, in nats; None without classes.
        lifted: it is of another width, and was compared after a linear map to the teacher's, fitted on these images.
        n: images.
    """

    tokens: float | None
    pooled: float
    top1: float | None
    kl: float | None
    lifted: bool
    n: int

    @property
    def cosine(self) -> float:
        """Of the final tokens, or where some are gone of what is pooled."""
        return self.pooled if self.tokens is None else self.tokens


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a network does on images: agreement with the original, and with labels its accuracy."""

    agreement: Agreement
    accuracy: float | None = None

    @property
    def key(self) -> tuple[float, ...]:
        """What networks are compared by, the larger the better: accuracy, else the share of equal first choices (then
        the divergence), and of features alone the cosine."""
        found = self.agreement
        if found.top1 is None or found.kl is None:
            return (found.cosine,)
        return (found.top1 if self.accuracy is None else self.accuracy, -found.kl)

    def __str__(self) -> str:
        if self.accuracy is not None:
            return f"accuracy {self.accuracy:.2%}"
        if self.agreement.top1 is not None:
            return f"top-1 agreement {self.agreement.top1:.2%}"
        place = "pooled features" if self.agreement.tokens is None else "final tokens"
        return f"cosine of {place} {self.key[0]:.4f}"


def agreement(model: nn.Module, teacher: nn.Module, images: Images) -> Agreement:
    """How `model` agrees with `teacher` on `images`, both in evaluation mode.

    Args:
        model, teacher: Models, or networks of timm; with channels in the same order where they are equally wide.

    Raises:
        UserError: another number of classes.
    """
    return standings([model], teacher, images)[0].agreement


@torch.no_grad()
def standings(
    models: Sequence[nn.Module], teacher: nn.Module, images: Images, *, labels: bool = False
) -> list[Standing]:
    """How each of `models` does on `images`, which the teacher looks at once for all of them.

    Args:
        models, teacher: as of `agreement`, on one device.
        labels: say how often they are right, too.

    Raises:
        UserError: another number of classes, or images without labels where these are asked for.
    """
    for model in models:
        classes = [getattr(network, "num_classes", 0) for network in (model, teacher)]
        if classes[0] != classes[1]:
            raise UserError(
                f"the networks have {classes[0]} and {classes[1]} classes; answers are compared class by class. Give "
                "both the same classes."
            )
    classed = getattr(teacher, "num_classes", 0) > 0
    with evaluating(*models, teacher):
        sums = [_Sums(lift, classed) for lift in _lifts(models, teacher, images)]
        for images_BCHW, targets_B in pairs_of(images, teacher):
            if labels:
                require_labels(images_BCHW.new_empty(0, 0) if targets_B is None else targets_B, "accuracy")
            theirs = _answers(teacher, images_BCHW)
            for model, found in zip(models, sums, strict=True):
                ours = theirs if model is teacher else _answers(model, images_BCHW)
                found.add(ours, theirs, targets_B if labels else None)
    return [found.standing(labels=labels) for found in sums]


Answers = Mapping[str, Tensor]
Lift = Callable[[Tensor], Tensor]


class _Sums:
    """Of one network, over batches: cosines of tokens and of what is pooled, equal first classes, divergence, hits."""

    def __init__(self, lifts: Mapping[str, Lift], classed: bool) -> None:
        self.lifts, self.classed = lifts, classed
        self.sums, self.n, self.tokens = torch.zeros(5, dtype=torch.float64), 0, False

    def add(self, ours: Answers, theirs: Answers, targets_B: Tensor | None) -> None:
        for place, name in enumerate(("tokens", "pooled")):
            if ours[name].shape[:-1] == theirs[name].shape[:-1]:
                given = self.lifts[name](ours[name]) if self.lifts else ours[name]
                found = functional.cosine_similarity(given.double(), theirs[name].double(), dim=-1)
                self.sums[place] += found.mean(-1).sum().cpu()
                self.tokens |= name == "tokens"
        if self.classed:
            mine_BY, best_BY = (x["logits"].double().log_softmax(-1) for x in (ours, theirs))
            first_B = mine_BY.argmax(-1)
            self.sums[2] += (first_B == best_BY.argmax(-1)).sum().cpu()
            self.sums[3] += functional.kl_div(mine_BY, best_BY, reduction="sum", log_target=True).cpu()
            if targets_B is not None:
                self.sums[4] += (first_B == targets_B.to(first_B.device)).sum().cpu()
        self.n += len(ours["pooled"])

    def standing(self, *, labels: bool) -> Standing:
        tokens, pooled, top1, kl, hits = (self.sums / self.n).tolist()
        found = Agreement(
            tokens=tokens if self.tokens else None,
            pooled=pooled,
            top1=top1 if self.classed else None,
            kl=kl if self.classed else None,
            lifted=bool(self.lifts),
            n=self.n,
        )
        return Standing(agreement=found, accuracy=hits if labels else None)


def _answers(network: nn.Module, images_BCHW: Tensor) -> dict[str, Tensor]:
    """Its outputs; `pooled` with an axis of one token."""
    found = read_outputs(network, images_BCHW, WANT)
    return {**found, "pooled": found["pooled"].unsqueeze(1)}


def _lifts(models: Sequence[nn.Module], teacher: nn.Module, images: Images) -> list[dict[str, Lift]]:
    """Linear maps of what each network of another width gives to the teacher's, by output; none for the same."""
    fits = [dict[str, Regression]() for _ in models]
    narrow = list(range(len(models)))
    for images_BCHW, _ in pairs_of(images, teacher):
        theirs = _answers(teacher, images_BCHW)
        for number in list(narrow):
            model = models[number]
            ours = theirs if model is teacher else _answers(model, images_BCHW)
            for name in ("tokens", "pooled"):
                widths = ours[name].shape[-1], theirs[name].shape[-1]
                if widths[0] == widths[1]:
                    narrow.remove(number)
                    break
                if ours[name].shape[1] == theirs[name].shape[1]:
                    fit = fits[number].setdefault(name, Regression(*widths, images_BCHW.device))
                    fit.add(ours[name], theirs[name])
        if not narrow:
            break
    return [{name: partial(_lift, *fit.solve()) for name, fit in each.items()} for each in fits]


def _lift(slopes_AY: Tensor, constant_Y: Tensor, x_BNA: Tensor) -> Tensor:
    return x_BNA.double() @ slopes_AY + constant_Y
