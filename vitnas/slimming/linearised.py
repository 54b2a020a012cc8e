"""All weights of a branch at once: least squares of what it adds, with the branch taken as linear in its weights.

The writer alone is a ridge regression (`folding.py`). What it cannot say, other inputs of it might: with J the
derivative of the branch's outputs by all its weights and R what is missing, the change that minimises |R - J d|^2 is
found by conjugate gradients (Gauss and Newton's step; a few iterations, which is what keeps it from fitting noise),
told in the coordinates in which each layer's inputs are white. A step is taken as far as images that it was not fitted
to say, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitnas.slimming.branches import Branch
from vitnas.slimming.regression import Regression
from vitnas.slimming.streams import Streams

Weights = dict[str, Tensor]
Pairs = list[tuple[Tensor, Tensor]]
LENGTHS = (1.0, 0.5, 0.25)  # of a step
HELD = 4  # every fourth batch is not fitted to
SMALL = 1e-3  # a difference's step, as a share of the weights
RIDGE = 1e-3  # of the mean variance of a layer's inputs


@dataclass(frozen=True, eq=False)
class _Goal:
    """A branch, and how much each token counts."""

    branch: Branch
    counts: Tensor | float


@torch.no_grad()
def refine(
    branch: Branch, there: Streams, wanted: Streams, iterations: int, weights_N: Tensor | None = None
) -> None:
    """Change the weights of `branch` so that it brings `there` nearer to `wanted`, as far as there are channels.

    Args:
        weights_N: how much each token counts.
    """
    pairs = list(zip(there, wanted, strict=True))
    if iterations < 1 or len(pairs) < 2:
        return
    counts = 1.0 if weights_N is None else weights_N.to(pairs[0][0])[:, None]
    goal = _Goal(branch, counts)
    held, fitted = pairs[::HELD], [pair for place, pair in enumerate(pairs) if place % HELD]
    linears = {name: each for name, each in branch.inner.named_modules() if isinstance(each, nn.Linear)}
    weights = {
        f"{name}.{part}": tensor.detach()
        for name, linear in linears.items()
        for part, tensor in linear.named_parameters()
    }
    change = _solve(goal, fitted, weights, _whitening(goal, linears, fitted), iterations)
    best, least = 0.0, _error(goal, held, weights)
    for length in LENGTHS:
        error = _error(goal, held, {name: w + length * change[name] for name, w in weights.items()})
        if error < least:
            best, least = length, error
    for name, tensor in weights.items():
        tensor.add_(best * change[name])


def _solve(goal: _Goal, pairs: Pairs, weights: Weights, whitening: Weights, iterations: int) -> Weights:
    left = _sum(_towards(goal, x_BND, y_BND, weights) for x_BND, y_BND in pairs)
    step = ahead = _white(left, whitening)
    change = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    size = _dot(left, ahead)
    for _ in range(iterations):
        turned = _sum(_curvature(goal, x_BND, weights, step) for x_BND, _ in pairs)
        length = size / max(_dot(step, turned), 1e-30)
        for name in change:
            change[name] += length * step[name]
            left[name] -= length * turned[name]
        ahead = _white(left, whitening)
        before, size = size, _dot(left, ahead)
        step = {name: ahead[name] + size / max(before, 1e-30) * step[name] for name in step}
    return change


def _added(goal: _Goal, x_BND: Tensor, weights: Weights) -> Tensor:
    added_BND: Tensor = goal.branch.scale(
        functional_call(goal.branch.inner, weights, (goal.branch.seen(x_BND),))
    )
    return added_BND


def _missing(goal: _Goal, x_BND: Tensor, y_BND: Tensor, weights: Weights) -> Tensor:
    return y_BND[..., : x_BND.shape[-1]] - goal.branch.base(x_BND) - _added(goal, x_BND, weights)


def _error(goal: _Goal, pairs: Pairs, weights: Weights) -> float:
    return sum(
        float((goal.counts * _missing(goal, x_BND, y_BND, weights).square()).sum()) for x_BND, y_BND in pairs
    )


def _towards(goal: _Goal, x_BND: Tensor, y_BND: Tensor, weights: Weights) -> Weights:
    """J' R of one batch."""
    return _pulled(
        goal,
        x_BND,
        weights,
        lambda added_BND: y_BND[..., : x_BND.shape[-1]] - goal.branch.base(x_BND) - added_BND,
    )


def _curvature(goal: _Goal, x_BND: Tensor, weights: Weights, step: Weights) -> Weights:
    """J' J step of one batch; J step is a difference, which serves fused attention as well."""
    size = SMALL * (_dot(weights, weights) / max(_dot(step, step), 1e-30)) ** 0.5
    ahead_BND = _added(goal, x_BND, {name: tensor + size * step[name] for name, tensor in weights.items()})
    return _pulled(goal, x_BND, weights, lambda added_BND: (ahead_BND - added_BND) / size)


def _pulled(goal: _Goal, x_BND: Tensor, weights: Weights, pull: Callable[[Tensor], Tensor]) -> Weights:
    """J' times what `pull` makes of the branch's outputs."""
    leaves = {name: tensor.requires_grad_() for name, tensor in ((n, t.detach()) for n, t in weights.items())}
    with torch.enable_grad():
        added_BND = _added(goal, x_BND, leaves)
    found = torch.autograd.grad(added_BND, list(leaves.values()), goal.counts * pull(added_BND.detach()))
    return dict(zip(leaves, found, strict=True))


def _whitening(goal: _Goal, linears: Mapping[str, nn.Linear], pairs: Pairs) -> Weights:
    """By a weight's name the inverse of its inputs' covariance."""
    fits = {name: Regression(linear.in_features, 0, linear.weight.device) for name, linear in linears.items()}

    def see(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            fits[name].add(inputs[0], inputs[0][..., :0])

        return linears[name].register_forward_pre_hook(hook)

    handles = [see(name) for name in linears]
    for x_BND, _ in pairs:
        goal.branch(x_BND)
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    found = {}
    for name, fit in fits.items():
        cov_AA = fit.covariance()[0]
        ridge = (RIDGE * cov_AA.diagonal().mean()).clamp(min=1e-30)
        eye_AA = torch.eye(len(cov_AA), dtype=cov_AA.dtype, device=cov_AA.device)
        found[f"{name}.weight"] = torch.linalg.inv(cov_AA + ridge * eye_AA).to(linears[name].weight)
    return found


def _white(gradient: Weights, whitening: Weights) -> Weights:
    return {
        name: tensor @ whitening[name] if name in whitening else tensor for name, tensor in gradient.items()
    }


def _dot(left: Weights, right: Weights) -> float:
    return sum(float((left[name].double() * right[name].double()).sum()) for name in left)


def _sum(parts: Iterator[Weights]) -> Weights:
    total = {name: tensor.clone() for name, tensor in next(parts).items()}
    for part in parts:
        for name, tensor in part.items():
            total[name] += tensor
    return total
