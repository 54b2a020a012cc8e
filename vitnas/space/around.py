"""The Space around a given network: fewer heads and hidden units per block, a narrower embedding, blocks left out.

Every field that is no gene is the given Arch's, so the largest Arch is the given one, and a Supernet that starts from
its weights is that network at its largest. Options are shares of what is there, snapped to multiples, or numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import timm
import torch
from torch import nn

from vitnas.arch import SCHEMA, Arch, Block, Stage, round_to
from vitnas.errors import UserError
from vitnas.grids import ImageSize
from vitnas.layers.rotary import rotary_of
from vitnas.mixers import MIXERS
from vitnas.model import Model, arch_of_timm
from vitnas.model.trained import find_trained
from vitnas.space.config import SpaceConfig, from_preset
from vitnas.space.gene import Gene
from vitnas.space.space import Space

Options = tuple[float, ...]
HALF = (0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class AroundSpace(Space):
    """Genes: `embed_dim`, then per block `exists.i` (if it may go), `num_heads.i`, `head_dim.i` and `mlp_hidden.i`; in
    a net of several stages `embed_dim.s`, `num_heads.s.i` and so on. What has one option only is no gene.

    Args:
        arch: the given Arch, the largest. Slots that its blocks remember are forgotten.
        heads, hidden, embed_dims, head_dims: options, rising, as shares up to 1.0 of what is there or as whole
            numbers; what is there is always one. Heads become narrower only where the entries of queries and keys have
            no meaning of their own (`narrows_heads`).
        blocks: which blocks may be left out, counted from 0 through all stages.
        multiple: hidden units and widths are multiples of it, besides those that are there.
    """

    kind: ClassVar[str] = "around"

    name: str = "around"
    image_size: ImageSize = 1  # the given one's
    arch: Arch
    heads: Options = (1.0,)
    hidden: Options = (1.0,)
    embed_dims: Options = (1.0,)
    head_dims: Options = (1.0,)
    blocks: tuple[int, ...] = ()
    multiple: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size() == 1:
            raise UserError("nothing may vary; a space has more than one Arch. Give heads, hidden or blocks.")
        last = [n - 1 for n in self.num_options]
        for index, gene in enumerate(self.genes):
            # An Arch checks its own widths.
            for option in range(len(gene.options) if gene.scope == "stage" else 0):
                self.decode([*last[:index], option, *last[index + 1 :]])

    def _check(self) -> None:
        given: Any = self.arch
        if isinstance(given, Mapping):  # as it comes from JSON
            given = Arch.from_json({"schema": SCHEMA, **given})
        if given.selector is not None:
            raise UserError(
                f"{given.id} keeps fewer patches already, chosen by {given.selector!r}; a space stands around a "
                "network that keeps all. Use the network before, or one with selector=None."
            )
        own: dict[str, Any] = {
            "arch": given.with_blocks(replace(block, slot=None) for block in given.blocks),
            "blocks": tuple(sorted(set(self.blocks))),
        }
        own |= {name: getattr(given, name) for name in ("image_size", "in_chans", "num_classes")}
        own |= {name: tuple(getattr(self, name)) for name in ("heads", "hidden", "embed_dims", "head_dims")}
        for name, value in own.items():
            object.__setattr__(self, name, value)
        if self.multiple < 1:
            raise UserError(f"multiple is {self.multiple}; it must be at least 1. Use 8.")
        if self.blocks and not 0 <= self.blocks[0] <= self.blocks[-1] < given.depth:
            raise UserError(
                f"blocks are {', '.join(map(str, self.blocks))}; the network has blocks 0 to {given.depth - 1}. Name "
                "some of those."
            )
        blocks = self.arch.blocks
        _fit("heads", self.heads, [block.num_heads for block in blocks if MIXERS[block.mixer].has_heads], 1)
        _fit("hidden", self.hidden, [block.mlp_hidden for block in blocks], self.multiple)
        if set(self.head_dims) != {1.0}:
            narrowed = [block.head_dim for block in blocks if narrows_heads(self.arch, block)]
            if not narrowed:
                raise UserError(
                    f"head_dims are {', '.join(map(str, self.head_dims))}; no block has heads that can be narrower: "
                    "rotary and relative positions, norms of queries and mixers besides softmax need them whole. Leave "
                    "head_dims out."
                )
            _fit("head_dims", self.head_dims, narrowed, self.multiple)
        _fit("embed_dims", self.embed_dims, [stage.embed_dim for stage in self.arch.stages], self.multiple)

    def declared(self) -> Iterator[Gene]:
        number = 0
        for s, stage in enumerate(self.arch.stages):
            tail = f".{s}" if len(self.arch.stages) > 1 else ""
            widths = options_of(self.embed_dims, stage.embed_dim, self.multiple)
            yield Gene(f"embed_dim{tail}", widths, structural=True, scope="stage", stage=s)
            for i, block in enumerate(stage.blocks):
                place: dict[str, Any] = {"scope": "block", "stage": s, "slot": i}
                if number in self.blocks:
                    yield Gene(f"exists{tail}.{i}", (False, True), structural=True, flips=True, **place)
                heads = options_of(self.heads, block.num_heads, 1)
                if len(heads) > 1 and MIXERS[block.mixer].has_heads:
                    yield Gene(f"num_heads{tail}.{i}", heads, **place)
                wide = options_of(self.head_dims, block.head_dim, self.multiple)
                if len(wide) > 1 and narrows_heads(self.arch, block):
                    yield Gene(f"head_dim{tail}.{i}", wide, **place)
                hidden = options_of(self.hidden, block.mlp_hidden, self.multiple)
                if len(hidden) > 1:
                    yield Gene(f"mlp_hidden{tail}.{i}", hidden, **place)
                number += 1

    def fixed_blocks(self) -> Sequence[Sequence[dict[str, Any]]]:
        return [[_fields(block) for block in stage.blocks] for stage in self.arch.stages]

    def fixed(self) -> dict[str, Any]:
        return {name: value for name, value in _fields(self.arch).items() if name != "stages"}


def narrows_heads(arch: Arch, block: Block) -> bool:
    """Whether heads of `block` may be narrower: queries and keys meet in their product alone, so any basis serves."""
    return (
        block.mixer == "softmax"
        and rotary_of(arch.position) == "none"
        and not arch.qk_norm
        and not arch.relative_position
    )


def options_of(asked: Options, there: int, multiple: int) -> tuple[int, ...]:
    """The options that `asked` means where `there` units are; these are always the last.

    >>> options_of((0.3, 0.5, 1.0), 100, 8), options_of((8, 64, 256), 100, 8)
    ((32, 48, 100), (8, 64, 100))
    """
    if are_shares(asked):
        found = {round_to(round(share * there), multiple) for share in asked if share < 1}
    else:
        found = {int(number) for number in asked}
    return (*sorted(number for number in found if number < there), there)


def are_shares(asked: Options) -> bool:
    """Whether options are shares of what is there, and not numbers."""
    return all(0 < value <= 1 for value in asked) and any(isinstance(value, float) for value in asked)


def _fit(name: str, asked: Options, there: Sequence[int], multiple: int) -> None:
    """Refuse options that say nothing, or cannot be."""
    if are_shares(asked):
        for share in asked:
            if any(2 * share * n < multiple for n in there):
                least = min(there)
                raise UserError(
                    f"{name} has {share}; of {least} that is less than {multiple}, in multiples of which it is given. "
                    f"Nearest: {min(1.0, multiple / least):.2g}."
                )
        if set(asked) != {1.0} and all(len(options_of(asked, n, multiple)) == 1 for n in there):
            raise UserError(
                f"{name} is {', '.join(map(str, asked))}; that leaves nothing to choose in multiples of {multiple}. "
                "Use 1.0, or a smaller multiple."
            )
        return
    for number in asked:
        if number != int(number) or not 1 <= number <= max(there, default=0):
            raise UserError(
                f"{name} has {number}; options are shares above 0 and up to 1.0, or whole numbers from 1 to the "
                f"{max(there, default=0)} that are there. Use 0.5 and 1.0."
            )
        if number % multiple and number not in there:
            raise UserError(
                f"{name} has {number}; it must be a multiple of {multiple}. Nearest: {round_to(int(number), multiple)}."
            )


def _fields(value: Any) -> dict[str, Any]:
    return {item.name: getattr(value, item.name) for item in fields(value) if item.name != "slot"}


def every_second(stages: Sequence[Stage]) -> tuple[int, ...]:
    """The blocks with an odd number in their stage, counted through all stages.

    A block that may go leaves one beside it that stays, as in the spaces of ViT-ResNAS.
    """
    found: list[int] = []
    first = 0
    for stage in stages:
        found += range(first + 1, first + len(stage.blocks), 2)
        first += len(stage.blocks)
    return tuple(found)


def around(
    network: Arch | nn.Module,
    *,
    heads: Options | None = None,
    hidden: Options | None = None,
    embed_dim: Options = (1.0,),
    head_dim: Options = (1.0,),
    blocks: Sequence[int] | None = None,
    multiple: int = 8,
    **options: Any,
) -> AroundSpace:
    """The Space around a network: an Arch, a Model, or a timm ViT that an Arch can say.

    Args:
        heads, hidden: options of every block's heads and hidden units, as shares up to 1.0 of its own or as numbers; by
            default a half, three quarters and all, where that leaves a choice.
        embed_dim: options of the embedding width.
        head_dim: options of the width of every block's heads, where they may be narrower.
        blocks: which may be left out, counted from 0; by default every second one.
        multiple: hidden units and widths are snapped to it.
        options: other fields of `AroundSpace` (keep, keep_places, selector, name).

    Raises:
        UserError: a network that cannot be written as an Arch (all reasons are given); options that cannot be.

    >>> from vitnas.model import PUBLISHED
    >>> around(PUBLISHED["vitas_c"]).largest() == PUBLISHED["vitas_c"]
    True
    """
    if isinstance(network, Arch):
        arch = network
    else:
        arch = network.arch if isinstance(network, Model) else arch_of_timm(network)
    headed = [block.num_heads for block in arch.blocks if MIXERS[block.mixer].has_heads]
    return AroundSpace(
        arch=arch,
        heads=_where_it_fits(headed, 1) if heads is None else heads,
        hidden=_where_it_fits([b.mlp_hidden for b in arch.blocks], multiple) if hidden is None else hidden,
        embed_dims=embed_dim,
        head_dims=head_dim,
        blocks=every_second(arch.stages) if blocks is None else tuple(blocks),
        multiple=multiple,
        **options,
    )


def _where_it_fits(there: Sequence[int], multiple: int) -> Options:
    return HALF if any(len(options_of(HALF, n, max(1, multiple))) > 1 for n in there) else (1.0,)


def around_named(
    size: str = "half",
    *,
    network: str | None = None,
    image_size: ImageSize = 224,
    num_classes: int = 1000,
    in_chans: int = 3,
    **options: Any,
) -> AroundSpace:
    """The Space around a timm ViT, by name or from a folder, for any images.

    Args:
        size: how small a net may become, `half` or `quarter`.
        network: what `find_trained` takes; no weights are loaded.
        options: as in `around`.

    Raises:
        UserError: no network, an unknown one, or one that cannot be written as an Arch.
    """
    network = _stated(network)
    made = from_preset(AroundSpace, SIZES, size, options, also=("embed_dim", "head_dim"))
    given = find_trained(network, what="network")
    made["name"] = f"around_{Path(given.folder or given.name).name}"
    data = {"img_size": image_size, "num_classes": num_classes, "in_chans": in_chans}
    try:
        with torch.device("meta"):
            model = timm.create_model(given.name, **data)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise UserError(
            f"network {network!r} cannot be made ({' '.join(str(error).split())[:200]}); it must be a ViT of timm, "
            "or the folder of a saved one. Use deit_tiny_patch16_224."
        ) from error
    return around(model, **made)


SIZES: dict[str, dict[str, Any]] = {
    "half": {"heads": HALF, "hidden": HALF},
    "quarter": {"heads": (0.25, *HALF), "hidden": (0.25, *HALF), "embed_dim": HALF},
}


@dataclass(frozen=True, kw_only=True)
class AroundConfig(SpaceConfig):
    """The space around `network`, a timm ViT by name or from a folder: by default that of `pretrained`, which gives the
    weights; one of them must be given. Other options left at None are the preset's."""

    kind = AroundSpace.kind
    space = AroundSpace
    sizes = SIZES
    make = staticmethod(around_named)
    stands_around = True

    size: str = "half"
    network: str | None = None
    heads: tuple[float, ...] | None = None
    hidden: tuple[float, ...] | None = None
    embed_dim: tuple[float, ...] | None = None
    head_dim: tuple[float, ...] | None = None
    blocks: tuple[int, ...] | None = None
    multiple: int | None = None

    def starting_from(self, pretrained: str | None) -> Self:
        return replace(self, network=_stated(self.network or pretrained))


def _stated(network: str | None) -> str:
    if not network:
        raise UserError(
            "space.kind is 'around' and no network is named; such a space stands around a ViT of timm or a saved one. "
            "Set pretrained=NAME to start from its weights, or space.network=NAME to train new ones."
        )
    return network
