"""Folding: cut an Arch out of a Supernet and make up for what is gone, in closed form, without labels or training.

The network is gone through branch by branch, on the streams of the largest network (what should be) and of the cut one
as folded so far (what is):

    readers     see the cut stream, and are fitted to give what the largest's give, so far as they are kept
    the writer  is fitted so that the cut stream behind the branch meets the largest's there, or where blocks behind it
                are left out, the largest's behind these

Both are ridge regressions towards the weights that are there: what needs no change gets none. So what goes anywhere is
made up for by everything behind it, and errors do not pile up blindly. Source of the idea: least squares on unlabelled
activations, as in CORP and in post-training quantisation; written from the equations.

Memory: the sums of one layer, and the images' tokens at one place of both networks (`streams.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.errors import check_word
from vitnas.extraction import extract
from vitnas.layers.axes import named_axes, outputs_of
from vitnas.mixers.mixer import HeadMixer
from vitnas.model import Model
from vitnas.model.features import stage_starts
from vitnas.slimming.branches import Branch, branches, inputs_of
from vitnas.slimming.images import Images, pairs_of
from vitnas.slimming.regression import Regression
from vitnas.slimming.streams import RAM_BYTES, Streams
from vitnas.supernet import Supernet

Compensation = Literal["ridge", "mean", "none"]


@torch.no_grad()
def fold(
    supernet: Supernet,
    arch: Arch,
    images: Images,
    *,
    compensation: Compensation = "ridge",
    strength: float | None = None,
    answers: float = 0.25,
    ram_bytes: int = RAM_BYTES,
) -> Model:
    """The Model of `arch`, folded: made to answer as `supernet` does at its largest.

    Args:
        supernet: of `ordered`.
        images: unlabelled; some hundred. With few of them the ridge is stronger.
        compensation: `ridge`; `mean` for constants alone; `none` for a bare extraction.
        strength: of the ridge (see `Regression.solve`); None for the best by two halves of the images.
        answers: the share that class and distillation token have in all fits, where these are what is read.
        ram_bytes: for the images' tokens, which lie in a file where they are more.

    Raises:
        UserError: an Arch that is not in the Space; no images, or activations that are not finite.
    """
    check_word("compensation", compensation, get_args(Compensation))
    whole, slim = (extract(supernet, each).eval() for each in (supernet.space.largest(), arch))
    slots = supernet.space.slots(arch)
    for index, slot in enumerate(slots):
        _keep_scale(whole.blocks[slot], slim.blocks[index])
    if compensation != "none":
        slopes = compensation == "ridge"
        _Fold(
            whole,
            slim,
            slots,
            images,
            strength,
            slopes=slopes,
            ram_bytes=ram_bytes,
            answers=answers,
        ).run()
    return slim


def _keep_scale(theirs: Any, ours: Any) -> None:
    """Narrower heads divide their products by the root of their own width: queries make up for it."""
    if (ratio := scale_ratio(theirs.attn, ours.attn)) != 1:
        ours.attn.qkv.weight.unflatten(0, (3, -1))[0].mul_(ratio)
        for bias in (ours.attn.qkv.bias, getattr(ours.attn, "q_bias", None)):
            if bias is not None:
                bias[: ours.attn.num_heads * ours.attn.head_dim].mul_(ratio)


def scale_ratio(theirs: nn.Module, ours: nn.Module) -> float:
    """By how much queries of `ours` must be larger for the same products."""
    if not isinstance(theirs, HeadMixer) or not isinstance(ours, HeadMixer):
        return 1.0
    return theirs.scale / ours.scale


def _sizes(branch: Branch) -> list[torch.Size]:
    return [parameter.shape for parameter in branch.inner.parameters()]


def _weights(arch: Arch, answers: float) -> Tensor | None:
    """How much each token counts where class and distillation token together have that share; None for all alike."""
    read, tokens = arch.class_token + arch.distill_token, arch.num_final_tokens
    if arch.global_pool != "token" or len(arch.stages) > 1 or not read or answers * tokens <= read:
        return None
    weights_N = torch.ones(tokens)
    weights_N[:read] = answers / (1 - answers) * (tokens - read) / read
    return weights_N


class _Fold:
    """`same` says that nothing was cut so far, so that there is nothing to fit."""

    def __init__(
        self,
        whole: Model,
        slim: Model,
        slots: Sequence[int],
        images: Images,
        strength: float | None,
        *,
        slopes: bool,
        ram_bytes: int,
        answers: float,
    ) -> None:
        self.weights_N = _weights(whole.arch, answers)
        self.whole, self.slim, self.strength, self.slopes = whole, slim, strength, slopes
        self.same = whole.arch.stages[0].embed_dim == slim.arch.stages[0].embed_dim
        self.axes = named_axes(whole), named_axes(slim)
        self.branches = branches(whole)
        self.kept = {(branch.slot, branch.axis): branch for branch in branches(slim, slots)}
        self.entries = dict(zip(stage_starts(whole.arch)[1:], slim.reductions, strict=True))
        self.wanted, self.there = (
            Streams((model.embed(images_BCHW) for images_BCHW, _ in pairs_of(images, model)), ram_bytes // 2)
            for model in (whole, slim)
        )

    def run(self) -> None:
        open_branch: Branch | None = None
        for branch in self.branches:
            kept = self.kept.get((branch.slot, branch.axis))
            if branch.entry is not None or kept is not None:
                self._close(open_branch)
                open_branch = kept
            self.same = self.same and kept is not None and _sizes(kept) == _sizes(branch)
            self.wanted.move(branch.enter)
            if branch.entry is not None:
                self.there.move(self.entries[branch.slot])
            if kept is not None:
                self._fit_readers(branch, kept)
            self.wanted.move(branch)
        self._close(open_branch)
        self._fit_heads()

    def _fit_readers(self, branch: Branch, kept: Branch) -> None:
        """Make what reads the cut stream give what the largest's gives."""
        if self.same or not self.slopes:
            return
        for (ours_name, ours), (theirs_name, theirs) in zip(
            kept.readers.items(), branch.readers.items(), strict=True
        ):
            pairs = zip(self.axes, (theirs_name, ours_name), (theirs, ours), strict=True)
            sizes, few = (
                [size for _, size in outputs_of(axes[f"{name}.weight"], linear.in_features)]
                for axes, name, linear in pairs
            )
            first, ratio = tuple(slice(0, size) for size in few), scale_ratio(branch.inner, kept.inner)
            fit = Regression(ours.in_features, ours.out_features, ours.weight.device)
            for there_BND, wanted_BND in zip(self.there, self.wanted, strict=True):
                seen_BND = kept.seen(there_BND)
                given = theirs(branch.seen(wanted_BND)).unflatten(-1, sizes)[(..., *first)]
                if ratio != 1:
                    given = given * torch.tensor([ratio, 1.0, 1.0]).to(given)[:, None, None]
                fit.add(seen_BND, given.flatten(-len(sizes)) - ours(seen_BND), self.weights_N)
            _add(ours, *fit.solve(self.strength, intercept=ours.bias is not None))

    def _close(self, kept: Branch | None) -> None:
        """Make the cut stream behind a branch what the largest's is now, and go on with it."""
        if kept is None:
            return
        if (writer := kept.writer) is not None and not self.same:
            width = writer.out_features
            fit = Regression(writer.in_features if self.slopes else 0, width, writer.weight.device)
            for there_BND, wanted_BND in zip(self.there, self.wanted, strict=True):
                with inputs_of(writer) as seen:
                    missing_BND = wanted_BND[..., :width] - kept(there_BND)
                fit.add(seen[0][..., : writer.in_features if self.slopes else 0], missing_BND, self.weights_N)
            _add(writer, *(unscaled(kept, found) for found in fit.solve(self.strength)))
        self.there.move(kept)

    def _fit_heads(self) -> None:
        """The classifiers of a narrower network read other features."""
        if self.slim.arch.embed_dim == self.whole.arch.embed_dim or not self.slopes:
            return
        for name in ("head", "head_dist"):
            ours, theirs = getattr(self.slim, name), getattr(self.whole, name)
            if not isinstance(ours, nn.Linear):
                continue
            fit = Regression(ours.in_features, ours.out_features, ours.weight.device)
            for there_BND, wanted_BND in zip(self.there, self.wanted, strict=True):
                with inputs_of(theirs) as best:
                    self.whole.forward_head(self.whole.norm(wanted_BND))
                with inputs_of(ours) as seen:
                    self.slim.forward_head(self.slim.norm(there_BND))
                fit.add(seen[0][:, None], (theirs(best[0]) - ours(seen[0]))[:, None])
            _add(ours, *fit.solve(self.strength))


def _add(linear: nn.Linear, slopes_AY: Tensor, constant_Y: Tensor) -> None:
    if slopes_AY.shape[0]:
        linear.weight.add_(slopes_AY.T.to(linear.weight.dtype))
    if linear.bias is not None:
        linear.bias.add_(constant_Y.to(linear.bias.dtype))


def unscaled(branch: Branch, change_Y: Tensor) -> Tensor:
    """What its writer must give more so that the stream gets `change_Y`: layer scale comes between. A channel that it
    closes can take nothing."""
    gamma_D = getattr(branch.scale, "gamma", None)
    if gamma_D is None:
        return change_Y
    return change_Y * torch.where(gamma_D == 0, 0, 1 / gamma_D.double())
