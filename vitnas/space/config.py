"""A Space by name: a preset, and options in place of the preset's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from vitnas.errors import UserError, nearest
from vitnas.space.space import Space

Presets = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """Which Space. Image size, channels and classes come from the data.

    `size` names a preset of the Space; what is left at None is the preset's. `keep` (shares of the patches, such
    as 1.0, 0.7, 0.5), `keep_places` and `selector` are those of every `Space`.
    """

    kind: ClassVar[str]
    space: ClassVar[type[Space]]
    sizes: ClassVar[Presets]
    make: ClassVar[Callable[..., Space]]
    stands_around: ClassVar[bool] = (
        False  # a given network, its largest Arch, of whose cost a Budget may be a share
    )

    size: str = "micro"
    keep: tuple[float, ...] | None = None
    keep_places: tuple[int, ...] | None = None
    selector: str | None = None

    def starting_from(self, pretrained: str | None) -> Self:
        """This, for a run that starts from the network of that name.

        Raises:
            UserError: the Space stands around a network, and there is none.
        """
        return self

    def build(self, **images: Any) -> Space:
        """The Space.

        Args:
            images: `image_size`, `in_chans`, `num_classes`, and other fields of the Space that the preset leaves open.

        Raises:
            UserError: what the Space refuses.
        """
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        return type(self).make(
            **images, **{name: value for name, value in given.items() if value is not None}
        )


@dataclass(frozen=True, kw_only=True)
class WidthsConfig(SpaceConfig):
    """What spaces with one patch size and options of depth, widths and heads share."""

    patch_size: int | None = None
    embed_dims: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    num_heads: tuple[int, ...] | None = None
    mlp_ratios: tuple[float, ...] | None = None
    head_dim: int | None = None


def from_preset(
    space: type[Space], sizes: Presets, size: str, options: Mapping[str, Any], also: Iterable[str] = ()
) -> dict[str, Any]:
    """The fields of a preset, with `options` in place of its own where they are not None.

    Args:
        also: names that the preset knows besides fields of the Space.

    Raises:
        UserError: an unknown size or option.
    """
    if size not in sizes:
        raise UserError(f"size is {size!r}; {space.kind} has {', '.join(sizes)}.{nearest(size, sizes)}")
    known = [*(item.name for item in fields(space)), *also]
    for name in options:
        if name not in known:
            raise UserError(f"the {space.kind} space has no option {name!r}.{nearest(name, known)}")
    chosen = {name: value for name, value in options.items() if value is not None}
    return {"name": f"{space.kind}_{size}", **sizes[size], **chosen}
