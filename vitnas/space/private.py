"""Which parameters of a Supernet are not shared between some options."""

from __future__ import annotations

from dataclasses import dataclass

from vitnas.layers.axes import Axes


@dataclass(frozen=True)
class Private:
    """Parameters that have a tensor per option.

    Args:
        names: endings of their names.
        by: the field of the Block or Arch that chooses, for example `patch_size` or `num_heads`.
        axis, entries: only these entries of that axis are private, the others stay shared (q and k of a fused qkv);
            "" for the whole parameter.
        starts: beginnings of their names.
        having: axes of which they have one.
    """

    names: tuple[str, ...]
    by: str
    axis: str = ""
    entries: tuple[int, int] = (0, 0)
    starts: tuple[str, ...] = ()
    having: tuple[str, ...] = ()

    def covers(self, name: str, axes: Axes) -> bool:
        """Whether it is about the parameter of that name and these axes."""
        return (
            any(name == ending or name.endswith(f".{ending}") for ending in self.names)
            or any(axis in self.having for axis, _ in axes)
            or name.startswith(self.starts)
        )
