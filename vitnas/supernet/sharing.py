"""Sharing: which entries of which shared tensors an Arch uses, told per named axis.

`Piece.take` is the one place where weights are cut. The Supernet's forward, its gradients, extraction and the
loading of published checkpoints all go through it, so that they agree by construction.

Three things combine freely. A `Coupling` per axis says which entries a width uses: the first ones (`Prefix`), those
from either end (`Bilateral`) or a run on a circle (`Cyclic`). `Private` gives a parameter a tensor of its own per
option, for example a class token per patch size. And a Space says which axes its Archs re-partition, so that they
count as one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from vitnas.arch import Arch
from vitnas.errors import UserError, check_word
from vitnas.layers.axes import Axes
from vitnas.space import Private as Private
from vitnas.space import Space, VitasSpace


class Place(NamedTuple):
    """Which of its weight sets an Arch runs on: `side` 0 is the one that extraction gives; `turn` follows the Arch."""

    side: int = 0
    turn: int = 0


FIRST = Place()
Runs = tuple[slice, ...]
"""Entries of an axis, as runs without overlap, in order."""


class Coupling(Protocol):
    """The rule of one axis. `sides` weight sets train together; starts repeat after `turns`."""

    sides: ClassVar[int] = 1

    @property
    def turns(self) -> int: ...

    def __call__(self, size: int, largest: int, place: Place) -> Runs:
        """Entries used by an axis of `size` out of `largest`."""
        ...


@dataclass(frozen=True)
class Prefix:
    """The first n entries (AutoFormer, ViT-ResNAS, FocusFormer; "left" or AutoSlim sharing in ViTAS)."""

    sides: ClassVar[int] = 1
    turns: ClassVar[int] = 1

    def __call__(self, size: int, largest: int, place: Place) -> Runs:
        return (slice(0, size),)


@dataclass(frozen=True)
class Bilateral:
    """The first n entries and, as a second weight set in the same step, the last n (BCNet; ViTAS v1).

    Over both sides every entry is used by equally many widths, where a prefix uses the first by all and the last by
    one.
    """

    sides: ClassVar[int] = 2
    turns: ClassVar[int] = 1

    def __call__(self, size: int, largest: int, place: Place) -> Runs:
        return (slice(largest - size, largest) if place.side else slice(0, size),)


@dataclass(frozen=True)
class Cyclic:
    """n entries from a start that follows the width, wrapping around (ViTAS, ECCV version).

    Widths are laid end to end on a circle of `largest` entries, again and again until a lap ends where the first began.
    Over those `turns` laps every entry is used by equally many (width, lap) pairs. Which lap an Arch takes is fixed by
    the Arch (see `Sharing.place`). The paper publishes no code; this is our reading of "evenly by turns".

    Args:
        widths: every width that the axis can have; the largest is the tensor's.
    """

    widths: tuple[int, ...]
    sides: ClassVar[int] = 1

    @property
    def turns(self) -> int:
        largest = max(self.widths)
        return largest // math.gcd(largest, sum(self.widths))

    def start(self, size: int, turn: int) -> int:
        """First entry of a width in a lap."""
        before = sum(self.widths[: self.widths.index(size)])
        return (turn % self.turns * sum(self.widths) + before) % max(self.widths)

    def __call__(self, size: int, largest: int, place: Place) -> Runs:
        if size not in self.widths or largest != max(self.widths):
            raise UserError(
                f"a cyclic axis has {size} of {largest} entries; it knows {', '.join(map(str, self.widths))}. "
                "Give it all widths of the space."
            )
        if size == largest:
            return (slice(0, largest),)
        start = self.start(size, place.turn)
        over = start + size - largest
        return (slice(0, over), slice(start, largest)) if over > 0 else (slice(start, start + size),)


PRIVATE_TOKENS = Private(
    ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"), by="patch_size"
)
"""ViTAS: patch embedding, class token and positions per patch size."""
PRIVATE_HEADS = Private(("attn.qkv.weight", "attn.qkv.bias"), by="num_heads", axis="qkv", entries=(0, 2))
"""ViTAS: q and k per head count; v is shared."""


class Home(NamedTuple):
    """A shared tensor that a parameter takes a part from: its name, and that part's axes and place in the parameter."""

    name: str
    axes: Axes
    at: tuple[slice, ...]


@dataclass(frozen=True)
class Sharing:
    """How a Supernet shares weights.

    Attributes:
        default: the rule of every axis that `per_axis` does not name.
        per_axis: rules by axis name (`dim`, `heads`, `hidden`, ...).
        flat: endings of parameter names whose axes are taken as one, in memory order, before the rule applies.
        private: parameters with a tensor per option.
    """

    default: Coupling = Prefix()
    per_axis: Mapping[str, Coupling] = field(default_factory=dict)
    flat: tuple[str, ...] = ()
    private: tuple[Private, ...] = ()

    @property
    def sides(self) -> int:
        """Weight sets of one Arch that train together."""
        return max(rule.sides for rule in self._rules())

    def place(self, arch: Arch, side: int = 0) -> Place:
        """Where `arch` lies: the lap of cyclic axes is drawn from its id, so that it is the same in any process."""
        turns = math.lcm(*(rule.turns for rule in self._rules()))
        return Place(side, int(arch.id[-8:], 16) % turns if turns > 1 else 0)

    def taken(self, name: str, axes: Axes) -> Axes:
        """The axes of a parameter as its rules see them."""
        if any(name.endswith(ending) for ending in self.flat):
            return (("flat", math.prod(size for _, size in axes)),)
        return axes

    def homes(self, name: str, axes: Axes, option: Callable[[str], object]) -> list[Home]:
        """The shared tensors of a parameter.

        Args:
            name: as the Supernet calls it (`blocks.3.attn.qkv.weight`).
            axes: of the parameter.
            option: value of a Block's or Arch's field, by its name.
        """
        axes = self.taken(name, axes)
        whole = tuple(slice(0, size) for _, size in axes)
        private = next((rule for rule in self.private if rule.covers(name, axes)), None)
        if private is None:
            return [Home(name, axes, whole)]
        own = f"private.{private.by}_{option(private.by)}.{name}"
        if not private.axis:
            return [Home(own, axes, whole)]
        place = [axis for axis, _ in axes].index(private.axis)
        homes = []
        first, end = private.entries
        assert first == 0, "shared entries on both sides of private ones would need two tensors"
        for home, start, stop in ((own, 0, end), (name, end, axes[place][1])):
            part = (*axes[:place], (private.axis, stop - start), *axes[place + 1 :])
            homes.append(Home(home, part, (*whole[:place], slice(start, stop), *whole[place + 1 :])))
        return homes

    def piece(
        self,
        name: str,
        homes: Sequence[Home],
        shared: Mapping[str, Axes],
        shape: tuple[int, ...],
        place: Place = FIRST,
    ) -> Piece:
        """Where the parameter `name` of a Model lies.

        Args:
            homes: from `homes`, for the parameter.
            shared: axes of the shared tensors, by name.
            shape: of the parameter.
        """
        parts = tuple(part for home in homes for part in self._parts(home, shared[home.name], place))
        sizes = tuple(max(part.at[i].stop for part in parts) for i in range(len(parts[0].at)))
        return Piece(name, sizes, shape, parts)

    def _parts(self, home: Home, largest: Axes, place: Place) -> list[Entries]:
        if [axis for axis, _ in home.axes] != [axis for axis, _ in largest]:
            raise LookupError(f"axes {home.axes} do not match {largest} of {home.name}")
        runs = [
            self.per_axis.get(axis, self.default)(size, limit, place)
            for (axis, size), (_, limit) in zip(home.axes, largest, strict=True)
        ]
        view = tuple(limit for _, limit in largest)
        if all(len(found) == 1 for found in runs):
            return [Entries(home.name, view, tuple(found[0] for found in runs), home.at)]
        targets = [_targets(found, at.start) for found, at in zip(runs, home.at, strict=True)]
        sources = itertools.product(*runs)
        return [
            Entries(home.name, view, index, at)
            for index, at in zip(sources, itertools.product(*targets), strict=True)
        ]

    def _rules(self) -> tuple[Coupling, ...]:
        return (self.default, *self.per_axis.values())


AUTOFORMER_OFFICIAL = Sharing(flat=("qkv.bias",))
"""As the authors' AutoFormer code: the qkv bias is cut as one run, so an entry's role depends on the head count.
Only needed to reproduce their numbers from their supernet checkpoints; see PAPERS.md."""


class Entries(NamedTuple):
    """`view` the shared tensor by axes and cut it by `source`: the entries `at` of the parameter."""

    shared: str
    view: tuple[int, ...]
    source: tuple[slice, ...]
    at: tuple[slice, ...]

    def cut(self, tensor: Tensor) -> Tensor:
        """The entries in use, by axes: always a view of `tensor`."""
        return tensor.view(self.view)[self.source]


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one parameter of a Model lies: `parts` of shared tensors, which fill its `sizes` (by axes) once.

    `shape` is the parameter's own.
    """

    name: str
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[Entries, ...]

    def take(self, table: Mapping[str, Tensor]) -> Tensor:
        """The entries in use, in the parameter's shape: a view where strides allow it, else a copy."""
        first = self.parts[0]
        if len(self.parts) == 1:
            return first.cut(table[first.shared]).reshape(self.shape)
        like = table[first.shared]
        whole = torch.empty(self.sizes, dtype=like.dtype, device=like.device)
        for part in self.parts:
            whole[part.at] = part.cut(table[part.shared])
        return whole.view(self.shape)


def _targets(runs: Runs, start: int) -> Runs:
    """Where runs land when they are put one behind the other from `start`."""
    found = []
    for run in runs:
        length = run.stop - run.start
        found.append(slice(start, start + length))
        start += length
    return tuple(found)


Coupled = Literal["prefix", "bilateral", "cyclic"]


def make_sharing(
    space: Space,
    coupling: Coupled = "prefix",
    *,
    private_tokens: bool = False,
    private_heads: bool = False,
) -> Sharing:
    """The Sharing of these words for `space`.

    Args:
        coupling: `prefix`, `bilateral` (two weight sets per Arch, trained together; any Space) or `cyclic`.
        private_tokens: patch embedding, class token and positions per patch size.
        private_heads: q and k per head count.

    Raises:
        UserError: an unknown coupling; anything but prefix and bilateral on a Space that is not ViTAS's.
    """
    check_word("coupling", coupling, get_args(Coupled))
    wanted = {
        "coupling cyclic": coupling == "cyclic",
        "private_tokens": private_tokens,
        "private_heads": private_heads,
    }
    asked = [name for name, is_on in wanted.items() if is_on]
    if asked and not isinstance(space, VitasSpace):
        raise UserError(
            f"{space.name} is no vitas space; {' and '.join(asked)} of sharing need its options. Use a space of kind "
            "vitas, or coupling prefix or bilateral without private tensors."
        )
    rules = ((PRIVATE_TOKENS, private_tokens), (PRIVATE_HEADS, private_heads))
    private = (*space.private, *(rule for rule, is_on in rules if is_on))
    if coupling == "cyclic" and isinstance(space, VitasSpace):
        return Sharing(per_axis=cyclic_axes(space), private=private)
    return Sharing(Bilateral(), private=private) if coupling == "bilateral" else Sharing(private=private)


def cyclic_axes(space: VitasSpace) -> dict[str, Cyclic]:
    """Cyclic rules for all axes whose widths `space` varies."""
    return {
        "dim": Cyclic(space.embed_dims),
        "inner": Cyclic(space.inner_dims),
        "hidden": Cyclic(space.mlp_hiddens),
    }
