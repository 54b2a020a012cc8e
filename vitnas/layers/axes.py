"""Named axes: what each dimension of a parameter means.

A module that owns parameters says so in a method `axes()`, which maps each parameter's name (relative to the module)
to its axes in memory order. Axes may be finer than the tensor's own dimensions: the rows of a fused qkv projection
are `qkv x heads x head_dim`. Weight sharing is then a choice per axis name (see `supernet/sharing.py`), and nothing
else about a layer needs to be known to share its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

Axes = tuple[tuple[str, int], ...]
"""(name, size) per axis, in memory order; the product of the sizes is the parameter's number of elements."""


def named_axes(model: nn.Module, *, without: str | None = None) -> dict[str, Axes]:
    """Axes of every parameter of `model`, by full name, and of those buffers that its modules list.

    Args:
        without: name of a child to leave out.

    Raises:
        LookupError: a parameter has no axes, or its axes do not multiply to its size (a mistake in a module).
    """
    found: dict[str, Axes] = {}
    parameters: dict[str, nn.Parameter] = {}
    for prefix, module in _walk(model, "", without):
        told = getattr(type(module), "axes", None)
        if told is not None:
            found |= {prefix + name: axes for name, axes in told(module).items()}
        parameters |= {prefix + name: p for name, p in module.named_parameters(recurse=False)}
    for name, parameter in parameters.items():
        if name not in found:
            raise LookupError(f"parameter {name} has no named axes; its module must list it in axes()")
        size = 1
        for _, length in found[name]:
            size *= length
        if size != parameter.numel():
            raise LookupError(f"axes {found[name]} of {name} do not fit its shape {tuple(parameter.shape)}")
    return found


def inputs_of(axes: Axes, inputs: int) -> Axes:
    """Those axes of a linear layer's weight that its `inputs` run over, the last ones.

    >>> inputs_of((("dim", 8), ("heads", 1), ("head_dim", 4)), 4)
    (('heads', 1), ('head_dim', 4))
    """
    size, place = 1, len(axes)
    while size < inputs:
        place -= 1
        size *= axes[place][1]
    if [name for name, _ in axes[place - 1 : place + 1]] == [
        "heads",
        "head_dim",
    ]:  # a single head adds no factor
        place -= 1
    return axes[place:]


def outputs_of(axes: Axes, inputs: int) -> Axes:
    """Those axes that its outputs run over, the first ones.

    >>> outputs_of((("qkv", 3), ("heads", 2), ("head_dim", 4), ("dim", 8)), 8)
    (('qkv', 3), ('heads', 2), ('head_dim', 4))
    """
    return axes[: len(axes) - len(inputs_of(axes, inputs))]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `module`, saved ones and others, by full name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _walk(module: nn.Module, prefix: str, without: str | None) -> Iterator[tuple[str, nn.Module]]:
    """`module` and all inside it, with what their parameters' names begin with."""
    yield prefix, module
    for name, child in module.named_children():
        if prefix + name != without:
            yield from _walk(child, f"{prefix}{name}.", without)


def merge_axes(axes: Axes, merged: Mapping[str, tuple[str, ...]]) -> Axes:
    """`axes` with runs of neighbours taken as one.

    Args:
        merged: for the name of the one, the names of the neighbours.

    >>> merge_axes((("heads", 3), ("head_dim", 16), ("dim", 8)), {"inner": ("heads", "head_dim")})
    (('inner', 48), ('dim', 8))
    """
    for one, parts in merged.items():
        names = tuple(name for name, _ in axes)
        for start in range(len(names) - len(parts) + 1):
            if names[start : start + len(parts)] == parts:
                size = 1
                for _, length in axes[start : start + len(parts)]:
                    size *= length
                axes = (*axes[:start], (one, size), *axes[start + len(parts) :])
                break
    return axes
