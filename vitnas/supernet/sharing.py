"""Sharing: which entries of a shared tensor an Arch uses, told per named axis.

`take` is the one place where weights are cut. The Supernet's forward, its gradients, extraction and the loading of
published checkpoints all go through it, so that they agree by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from vitnas.layers.axes import Axes


class Coupling(Protocol):
    """The rule of one axis: which entries a width uses."""

    def __call__(self, size: int, largest: int) -> slice:
        """Entries used by an axis of `size` out of `largest`."""
        ...


@dataclass(frozen=True)
class Prefix:
    """The first n entries (AutoFormer, ViT-ResNAS, FocusFormer; "left" or AutoSlim sharing in ViTAS)."""

    def __call__(self, size: int, largest: int) -> slice:
        return slice(0, size)


@dataclass(frozen=True)
class Sharing:
    """How a Supernet shares weights.

    Attributes:
        default: the rule of every axis that `per_axis` does not name.
        per_axis: rules by axis name (`dim`, `heads`, `hidden`, ...).
        flat: endings of parameter names whose axes are taken as one, in memory order, before the rule applies.
    """

    default: Coupling = Prefix()
    per_axis: Mapping[str, Coupling] = field(default_factory=dict)
    flat: tuple[str, ...] = ()

    def piece(self, name: str, shared: str, axes: Axes, largest: Axes, shape: tuple[int, ...]) -> Piece:
        """Where the parameter `name` of a Model, with `axes`, lies in the shared tensor, whose axes are `largest`."""
        if any(name.endswith(ending) for ending in self.flat):
            axes, largest = _flatten(axes), _flatten(largest)
        if [axis for axis, _ in axes] != [axis for axis, _ in largest]:
            raise LookupError(f"axes {axes} of {name} do not match {largest} of {shared}")
        index = tuple(
            self.per_axis.get(axis, self.default)(size, limit)
            for (axis, size), (_, limit) in zip(axes, largest, strict=True)
        )
        return Piece(name, shared, tuple(limit for _, limit in largest), index, shape)


AUTOFORMER_OFFICIAL = Sharing(flat=("qkv.bias",))
"""As the authors' AutoFormer code: the qkv bias is cut as one run, so an entry's role depends on the head count.
Only needed to reproduce their numbers from their supernet checkpoints; see PAPERS.md."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one parameter of a Model lies: `view` the shared tensor by axes, cut by `index`, give it `shape`."""

    name: str
    shared: str
    view: tuple[int, ...]
    index: tuple[slice, ...]
    shape: tuple[int, ...]

    def renamed(self, name: str) -> Piece:
        """The same entries for a parameter of another name."""
        return Piece(name, self.shared, self.view, self.index, self.shape)

    def cut(self, tensor: Tensor) -> Tensor:
        """The entries in use, by axes: always a view of `tensor`."""
        return tensor.view(self.view)[self.index]

    def take(self, tensor: Tensor) -> Tensor:
        """The entries in use, in the parameter's shape: a view where strides allow it, else a copy."""
        return self.cut(tensor).reshape(self.shape)


def _flatten(axes: Axes) -> Axes:
    size = 1
    for _, length in axes:
        size *= length
    return (("flat", size),)
