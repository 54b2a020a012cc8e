"""The shared tensors of a Supernet: which there are, how large, and what they start with.

They are found by asking a few Archs of the Space (`Space.representatives`) where their parameters live: a tensor is
as large on each axis as any of them needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor, nn

from vitnas.arch import Arch, Block
from vitnas.errors import UserError
from vitnas.layers.axes import Axes, merge_axes, named_axes, named_tensors
from vitnas.model import build
from vitnas.space import Space
from vitnas.supernet.sharing import Home, Sharing

PRIVATE = "private."
Homes: TypeAlias = list[tuple[str, Axes, list[Home]]]
"""Of a Model's parameters, and of its buffers that have axes: the name, the axes, where it lives."""


def shared_axes(space: Space, sharing: Sharing) -> tuple[dict[str, Axes], list[Homes]]:
    """Axes of every shared tensor, by name, and the homes of each representative."""
    found: dict[str, Axes] = {}
    lives = [_homes(space, sharing, arch) for arch in space.representatives()]
    for _, _, homes in chain.from_iterable(lives):
        for home in homes:
            known = found.get(home.name, home.axes)
            pairs = zip(known, home.axes, strict=True)
            found[home.name] = tuple((axis, max(a, b)) for (axis, a), (_, b) in pairs)
    if sharing.private:
        _check_options(space, sharing, found)
    return found, lives


def _check_options(space: Space, sharing: Sharing, axes: dict[str, Axes]) -> None:
    for arch in space.corners():
        for _, _, homes in _homes(space, sharing, arch):
            if lost := [home.name for home in homes if home.name not in axes]:
                raise UserError(
                    f"{space.name} does not list its options for {lost[0]!r}, which private sharing keeps a tensor for "
                    "each of; a Space of kind vitas does. Leave `private` out, or use such a Space."
                )


def fill(
    space: Space, axes: dict[str, Axes], lives: Sequence[Homes], generator: torch.Generator | None
) -> tuple[dict[str, nn.Parameter], dict[str, tuple[Tensor, bool]]]:
    """The shared parameters, initialised as the Model's are, each from the first representative that has all of it; and
    the shared buffers, with whether they are saved."""
    found: dict[str, nn.Parameter] = {}
    buffers: dict[str, tuple[Tensor, bool]] = {}
    partial_only: dict[str, tuple[int, ...]] = {}
    for arch, own_homes in zip(space.representatives(), lives, strict=True):
        model = build(arch, generator=generator)
        saved, slots = model.state_dict(), space.slots(arch)
        persistent = {id(buffer): name in saved for name, buffer in model.named_buffers()}
        tensors, with_axes = named_tensors(model), {name for name, _, _ in own_homes}
        for name, buffer in model.named_buffers():
            if name not in with_axes:
                buffers.setdefault(shared_name(name, slots)[0], (buffer, name in saved))
        for name, own, homes in own_homes:
            parameter = tensors[name]
            for home in homes:
                if home.axes != axes[home.name]:
                    partial_only.setdefault(home.name, _shape(parameter, own, axes[home.name]))
                    continue
                if home.name in found:
                    continue
                if isinstance(parameter, nn.Parameter):
                    found[home.name] = _part(parameter, own, home)
                else:
                    buffers.setdefault(home.name, (parameter, persistent[id(parameter)]))
    for name, shape in partial_only.items():
        if name not in found and name not in buffers:  # no representative has all of it
            empty = torch.empty(shape)
            found[name] = nn.Parameter(nn.init.trunc_normal_(empty, std=0.02, generator=generator))
    return {name: found[name] for name in axes if name not in buffers}, buffers


def base_name(name: str) -> str:
    """The Model's name of a shared tensor, private or not (`pos_embed` of `private.patch_size_16.pos_embed`)."""
    return name.split(".", 2)[2] if name.startswith(PRIVATE) else name


def option_of(arch: Arch, block: Block | None, field: str) -> object:
    """The value by which private tensors are chosen: of the block's field, else of the Arch's."""
    return getattr(block if block is not None and hasattr(block, field) else arch, field)


def _homes(space: Space, sharing: Sharing, arch: Arch) -> Homes:
    """Where the parameters of an Arch's Model live."""
    slots, found = space.slots(arch), Homes()
    for name, axes in named_axes(build(arch, device="meta")).items():
        shared, index = shared_name(name, slots)
        block = None if index is None else arch.blocks[index]
        own = sharing.taken(shared, merge_axes(axes, space.merged))
        found.append((name, own, sharing.homes(shared, own, partial(option_of, arch, block))))
    return found


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
