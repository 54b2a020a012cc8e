"""The shared tensors of a Supernet: which there are, how large, and what they start with.

They are found by asking a few Archs of the Space (`Space.representatives`) where their parameters live: a tensor is
as large on each axis as any of them needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from vitnas.arch import Arch, Block
from vitnas.errors import UserError
from vitnas.layers.axes import Axes, merge_axes, named_axes, named_tensors
from vitnas.model import Model, build
from vitnas.space import Space
from vitnas.supernet.sharing import Home, Sharing

PRIVATE = "private."


def shared_axes(space: Space, sharing: Sharing) -> dict[str, Axes]:
    """Axes of every shared tensor, by name."""
    found: dict[str, Axes] = {}
    for arch in space.representatives():
        for _, _, homes in _homes(space, sharing, arch, build(arch, device="meta")):
            for home in homes:
                known = found.get(home.name, home.axes)
                pairs = zip(known, home.axes, strict=True)
                found[home.name] = tuple((axis, max(a, b)) for (axis, a), (_, b) in pairs)
    if sharing.private:
        _check_options(space, sharing, found)
    return found


def _check_options(space: Space, sharing: Sharing, axes: dict[str, Axes]) -> None:
    for arch in space.corners():
        for _, _, homes in _homes(space, sharing, arch, build(arch, device="meta")):
            if lost := [home.name for home in homes if home.name not in axes]:
                raise UserError(
                    f"{space.name} does not list its options for {lost[0]!r}, which private sharing keeps a tensor for "
                    "each of; a Space of kind vitas does. Leave `private` out, or use such a Space."
                )


def fill(
    space: Space, sharing: Sharing, axes: dict[str, Axes], generator: torch.Generator | None
) -> tuple[dict[str, nn.Parameter], dict[str, tuple[Tensor, bool]]]:
    """The shared parameters, initialised as the Model's are, each from the first representative that has all of it; and
    the shared buffers, with whether they are saved."""
    found: dict[str, nn.Parameter] = {}
    buffers: dict[str, tuple[Tensor, bool]] = {}
    for arch in space.representatives():
        model = build(arch, generator=generator)
        saved, slots = model.state_dict(), space.slots(arch)
        persistent = {id(buffer): name in saved for name, buffer in model.named_buffers()}
        with_axes = set(named_axes(model))
        for name, buffer in model.named_buffers():
            if name not in with_axes:
                buffers.setdefault(shared_name(name, slots)[0], (buffer, name in saved))
        for parameter, own, homes in _homes(space, sharing, arch, model):
            for home in homes:
                if home.name in found or home.axes != axes[home.name]:
                    continue
                if isinstance(parameter, nn.Parameter):
                    found[home.name] = _part(parameter, own, home)
                else:
                    buffers.setdefault(home.name, (parameter, persistent[id(parameter)]))
    for arch in space.representatives():  # no representative has all of what is left
        for parameter, own, homes in _homes(space, sharing, arch, build(arch, device="meta")):
            for home in homes:
                if home.name not in found and home.name not in buffers:
                    empty = torch.empty(_shape(parameter, own, axes[home.name]))
                    found[home.name] = nn.Parameter(
                        nn.init.trunc_normal_(empty, std=0.02, generator=generator)
                    )
    return {name: found[name] for name in axes if name not in buffers}, buffers


def base_name(name: str) -> str:
    """The Model's name of a shared tensor, private or not (`pos_embed` of `private.patch_size_16.pos_embed`)."""
    return name.split(".", 2)[2] if name.startswith(PRIVATE) else name


def option_of(arch: Arch, block: Block | None, field: str) -> object:
    """The value by which private tensors are chosen: of the block's field, else of the Arch's."""
    return getattr(block if block is not None and hasattr(block, field) else arch, field)


def _homes(
    space: Space, sharing: Sharing, arch: Arch, model: Model
) -> Iterator[tuple[Tensor, Axes, list[Home]]]:
    """Each parameter of `model`, and each buffer that has axes, with these and its homes."""
    slots = space.slots(arch)
    tensors = named_tensors(model)
    for name, axes in named_axes(model).items():
        shared, index = shared_name(name, slots)
        block = None if index is None else arch.blocks[index]
        own = sharing.taken(shared, merge_axes(axes, space.merged))
        yield tensors[name], own, sharing.homes(shared, own, partial(option_of, arch, block))


def shared_name(name: str, slots: list[int]) -> tuple[str, int | None]:
    """A tensor's name in the Supernet, and the number of its block if it is in one or in the selection before it."""
    if not name.startswith(("blocks.", "selections.")):
        return name, None
    part, index, rest = name.split(".", 2)
    return f"{part}.{slots[int(index)]}.{rest}", int(index)


def _part(parameter: Tensor, own: Axes, home: Home) -> nn.Parameter:
    """The part of an initialised parameter that lives in `home`."""
    if math.prod(size for _, size in home.axes) == parameter.numel():
        assert isinstance(parameter, nn.Parameter)
        return parameter
    values: Tensor = parameter.detach().view([size for _, size in own])[home.at]
    return nn.Parameter(values.reshape(_shape(parameter, own, home.axes)).clone())


def _shape(parameter: Tensor, own: Axes, axes: Axes) -> tuple[int, ...]:
    """The parameter's shape if its axes, `own`, had the sizes of `axes`."""
    pairs = [(mine, theirs) for (_, mine), (_, theirs) in zip(own, axes, strict=True)]
    shape: list[int] = []
    for place, length in enumerate(parameter.shape):
        mine, theirs = pairs.pop(0)
        left = parameter.dim() - place - 1
        while mine < length or (pairs and pairs[0][0] == 1 and len(pairs) > left):
            more, most = pairs.pop(0)
            mine, theirs = mine * more, theirs * most
        shape.append(theirs)
    return tuple(shape)
