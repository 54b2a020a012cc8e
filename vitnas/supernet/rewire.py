"""Rewiring: sort heads and hidden units by importance, so that narrow Archs get the best ones.

Source: ViT-ResNAS (arXiv 2109.00642, section 3.3). Importance of a unit is the sum of the absolute values of all
weights and biases that belong to it. A permutation along a named axis, applied to every tensor of a block that has this
axis, leaves what the widest Arch computes as it is. Unlike the authors', the optimizer's moments move with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.layers.axes import Axes, named_tensors
from vitnas.supernet.supernet import Supernet

AXES = ("heads", "hidden")


@torch.no_grad()
def rewire(
    supernet: Supernet,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    share: Callable[[Tensor], None] | None = None,
) -> int:
    """Sort the heads and hidden units of every block, the most important first.

    Args:
        optimizer: whose moments are permuted alike.
        share: gives every process the first one's order.

    Returns:
        How many units changed their place.

    Raises:
        UserError: the optimizer keeps a state that cannot be permuted.
    """
    parameters, moved = dict(supernet.named_parameters()), 0
    for axis, names in _groups(supernet):
        order = _order(supernet, parameters, axis, names)
        if share is not None:
            share(order)
        changed = int((order != torch.arange(len(order), device=order.device)).sum())
        if not changed:
            continue
        moved += changed
        reorder(supernet, axis, names, order, optimizer)
    return moved


@torch.no_grad()
def reorder(
    supernet: Supernet,
    axis: str,
    names: Iterable[str],
    order: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Put the entries of `axis` of the shared tensors `names` in `order`, and the optimizer's moments alike.

    Where these are all tensors that meet on that axis, what the widest Arch computes stays as it is, up to rounding.
    """
    shared = named_tensors(supernet)
    for name in names:
        tensor = shared[name]
        moments = _moments(optimizer, tensor, name) if isinstance(tensor, nn.Parameter) else []
        for each in (tensor.data, *moments):
            _permute(each, supernet.axes[name], axis, order.to(each.device))


def _groups(supernet: Supernet) -> Iterator[tuple[str, list[str]]]:
    """Tensors that share an axis: (axis, names) for every block and axis."""
    for index in range(supernet.space.largest().depth):
        for axis in AXES:
            names = [
                name
                for name, axes in supernet.axes.items()
                if name.startswith(f"blocks.{index}.") and axis in dict(axes)
            ]
            if names:
                yield axis, names


def _order(supernet: Supernet, parameters: Mapping[str, nn.Parameter], axis: str, names: list[str]) -> Tensor:
    """Unit numbers, the most important first; equal ones keep their order."""
    scores: Tensor | None = None
    for name in names:
        axes = supernet.axes[name]
        place = [word for word, _ in axes].index(axis)
        by_axes = parameters[name].data.view([size for _, size in axes]).abs().cpu().double()
        score = by_axes.movedim(place, 0).reshape(by_axes.shape[place], -1).sum(1)
        scores = score if scores is None else scores + score
    assert scores is not None
    return torch.argsort(scores, descending=True, stable=True).to(parameters[names[0]].device)


def _moments(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter, name: str) -> list[Tensor]:
    """The optimizer's tensors that go with each entry of `parameter`."""
    if optimizer is None:
        return []
    found = []
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue  # a step count
        if value.shape != parameter.shape:
            raise UserError(
                f"the optimizer keeps {key} of shape {tuple(value.shape)} for {name}, {tuple(parameter.shape)}; "
                "rewiring needs one value per weight. Use adamw, or no rewiring."
            )
        found.append(value)
    return found


def _permute(tensor: Tensor, axes: Axes, axis: str, order: Tensor) -> None:
    by_axes = tensor.view([size for _, size in axes])
    place = [word for word, _ in axes].index(axis)
    by_axes.copy_(by_axes.index_select(place, order))
