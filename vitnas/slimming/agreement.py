"""Agreement: how nearly a network answers as another one, of which it was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

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


@torch.no_grad()
def agreement(model: nn.Module, teacher: nn.Module, images: Images) -> Agreement:
    """How `model` agrees with `teacher` on `images`, both in evaluation mode.

    Args:
        model, teacher: Models, or networks of timm; with channels in the same order where they are equally wide.

    Raises:
        UserError: another number of classes.
    """
    classes = [getattr(network, "num_classes", 0) for network in (model, teacher)]
    if classes[0] != classes[1]:
        raise UserError(
            f"the networks have {classes[0]} and {classes[1]} classes; answers are compared class by class. Give "
            "both the same classes."
        )
    has_classes = classes[0] > 0
    with evaluating(model, teacher):
        lifts = _lifts(model, teacher, images)
        sums, n, tokens = torch.zeros(4, dtype=torch.float64), 0, 0
        for images_BCHW, _ in pairs_of(images, model):
            ours, theirs = _answers(model, images_BCHW), _answers(teacher, images_BCHW)
            for place, name in enumerate(("tokens", "pooled")):
                if ours[name].shape[:-1] == theirs[name].shape[:-1]:
                    given = lifts[name](ours[name]) if lifts else ours[name]
                    found = functional.cosine_similarity(given.double(), theirs[name].double(), dim=-1)
                    sums[place] += found.mean(-1).sum().cpu()
                    tokens += name == "tokens"
            if has_classes:
                mine_BY, best_BY = (x["logits"].double().log_softmax(-1) for x in (ours, theirs))
                sums[2] += (mine_BY.argmax(-1) == best_BY.argmax(-1)).sum().cpu()
                sums[3] += functional.kl_div(mine_BY, best_BY, reduction="sum", log_target=True).cpu()
            n += len(images_BCHW)
    by_image = (sums / n).tolist()
    return Agreement(
        tokens=by_image[0] if tokens else None,
        pooled=by_image[1],
        top1=by_image[2] if has_classes else None,
        kl=by_image[3] if has_classes else None,
        lifted=bool(lifts),
        n=n,
    )


def _answers(network: nn.Module, images_BCHW: Tensor) -> dict[str, Tensor]:
    """Its outputs; `pooled` with an axis of one token."""
    found = read_outputs(network, images_BCHW, WANT)
    return {**found, "pooled": found["pooled"].unsqueeze(1)}


def _lifts(model: nn.Module, teacher: nn.Module, images: Images) -> dict[str, Callable[[Tensor], Tensor]]:
    """Linear maps of what a network of another width gives to what the teacher gives, by output; none for the same."""
    fits: dict[str, Regression] = {}
    for images_BCHW, _ in pairs_of(images, model):
        ours, theirs = _answers(model, images_BCHW), _answers(teacher, images_BCHW)
        for name in ("tokens", "pooled"):
            widths = ours[name].shape[-1], theirs[name].shape[-1]
            if widths[0] == widths[1]:
                return {}
            if ours[name].shape[1] == theirs[name].shape[1]:
                fits.setdefault(name, Regression(*widths, images_BCHW.device)).add(ours[name], theirs[name])
    return {name: partial(_lift, *fit.solve()) for name, fit in fits.items()}


def _lift(slopes_AY: Tensor, constant_Y: Tensor, x_BNA: Tensor) -> Tensor:
    return x_BNA.double() @ slopes_AY + constant_Y
