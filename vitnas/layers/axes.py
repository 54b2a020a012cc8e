"""Named axes: what each dimension of a parameter means.

A module that owns parameters says so in a method `axes()`, which maps each parameter's name (relative to the module)
to its axes in memory order. Axes may be finer than the tensor's own dimensions: the rows of a fused qkv projection
are `qkv x heads x head_dim`. Weight sharing is then a choice per axis name (see `supernet/sharing.py`), and nothing
else about a layer needs to be known to share its weights.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

Axes = tuple[tuple[str, int], ...]
"""(name, size) per axis, in memory order; the product of the sizes is the parameter's number of elements."""


@runtime_checkable
class HasAxes(Protocol):
    def axes(self) -> dict[str, Axes]:
        """Axes of the parameters that this module answers for, by name relative to it."""
        ...


def named_axes(model: nn.Module) -> dict[str, Axes]:
    """Axes of every parameter of `model`, by full name.

    Raises:
        LookupError: a parameter has no axes, or its axes do not multiply to its size (a mistake in a module).
    """
    found: dict[str, Axes] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, HasAxes):
            found |= {f"{prefix}.{name}".lstrip("."): axes for name, axes in module.axes().items()}
    for name, parameter in model.named_parameters():
        if name not in found:
            raise LookupError(f"parameter {name} has no named axes; its module must list it in axes()")
        size = 1
        for _, length in found[name]:
            size *= length
        if size != parameter.numel():
            raise LookupError(f"axes {found[name]} of {name} do not fit its shape {tuple(parameter.shape)}")
    return found
