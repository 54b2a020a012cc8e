"""An Arch by words: a published name, one of ViTAS by its code, or a file that an earlier search or training wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from vitnas.arch import Arch
from vitnas.errors import UserError, nearest
from vitnas.grids import ImageSize, size_text
from vitnas.model.blocks import resized
from vitnas.model.net_id import arch_of_net_id, net_id_of
from vitnas.model.published import PUBLISHED
from vitnas.runs import RunFile

NET_ID = "vitas:"


class Named(NamedTuple):
    """An Arch and what to call it (safe in file names). `is_file`: it was written for certain images and classes."""

    name: str
    arch: Arch
    is_file: bool

    def fitted(self, *, image_size: ImageSize, in_chans: int, num_classes: int) -> Arch:
        """The Arch for these images. A published name or a code says nothing of them and follows; a file does.

        Raises:
            UserError: a file's Arch is for others, or patches that do not divide the image.
        """
        wanted: dict[str, Any] = {"image_size": image_size, "in_chans": in_chans, "num_classes": num_classes}
        if not self.is_file:
            try:
                return replace(resized(self.arch, image_size, self.arch.patch_size), **wanted)
            except UserError as error:
                raise UserError(f"{self.name} does not fit the data: {error}") from error
        has = {name: getattr(self.arch, name) for name in wanted}
        if has != wanted:
            raise UserError(
                f"the Arch {self.name} is for {_images(has)}; the data are {_images(wanted)}. Choose data or an Arch "
                "that fit each other."
            )
        return self.arch


def _images(of: Mapping[str, Any]) -> str:
    return f"{size_text(of['image_size'])} pixels, {of['in_chans']} channels and {of['num_classes']} classes"


def find_arch(name: str, also: Iterable[str] = ()) -> Named:
    """A published Arch by name, one of ViTAS by its code (`1 2 4 3 ...`, with or without `vitas:` before it), or the
    one in a JSON file (an Arch's own, or a search's chosen.json) or in a folder with an arch.json.

    Args:
        also: other words that would have been right, for the message.

    Raises:
        UserError: none of these, or a code or file that cannot be read (saying where).
    """
    if name.startswith(NET_ID) or (re.match(r"\d+(\s*,|\s+\S)|\d+$", name) and not os.path.exists(name)):
        arch = arch_of_net_id(name.removeprefix(NET_ID))
        return Named(arch.id, arch, is_file=False)
    if name in PUBLISHED:
        return Named(name, PUBLISHED[name], is_file=False)
    path = Path(name) / "arch.json" if Path(name).is_dir() else Path(name)
    if path.suffix == ".json":
        if not path.exists():
            raise UserError(f"{path} does not exist; it must be a file with an Arch in it. Correct the path.")
        found = ArchFile.load(path)
        return Named(found.name or found.arch.id, found.arch, is_file=True)
    known = (*PUBLISHED, *also)
    what = "model, recipe or arch.json" if also else "model, arch.json or ViTAS code"
    raise UserError(f"{name!r} is no {what}; `vitnas list` names them.{nearest(name, known)}")


@dataclass(frozen=True)
class ArchFile(RunFile):
    """arch.json: an Arch beside its weights. Any file that holds one as `arch` is read too, as chosen.json does."""

    FILE = "arch.json"
    COMMAND = "vitnas retrain"
    REMEDY = "Give another, or delete it where a run makes it anew."

    arch: Arch
    name: str | None = None

    @classmethod
    def from_json(cls, value: Any) -> Self:
        is_named = isinstance(value, dict) and isinstance(value.get("arch"), dict)
        arch = Arch.from_json(value["arch"] if is_named else value)
        return cls(arch, str(value["name"]) if is_named and "name" in value else None)

    def to_json(self) -> dict[str, Any]:
        return self.arch.to_json()


@dataclass(frozen=True, kw_only=True)
class Chosen(RunFile):
    """The search's answer, for people first; `find_arch` reads it back.

    `name` begins with its Space's kind (`vitas-p16-d154-l7-3f9a1c2b`); `net_id` is ViTAS's code, where it has one.
    """

    FILE = "chosen.json"
    COMMAND = "vitnas search"

    name: str
    about: str
    blocks: tuple[str, ...]
    net_id: str | None
    macs: int
    params: int
    supernet_accuracy: float
    budget: str
    recipe: str
    arch: Arch

    @classmethod
    def of(cls, arch: Arch, kind: str, **found: Any) -> Self:
        """`kind` is its Space's; `found` is what the search knows of it."""
        try:
            code = " ".join(map(str, net_id_of(arch)))
        except UserError:  # only ViTAS's own Spaces have one
            code = None
        return cls(
            name=f"{kind}-p{arch.patch_size}-{arch.id}",
            about=arch.describe(),
            blocks=tuple(_line(index, arch) for index in range(arch.depth)),
            net_id=code,
            arch=arch,
            **found,
        )


def _line(index: int, arch: Arch) -> str:
    block = arch.blocks[index]
    slot = "" if block.slot is None else f" (slot {block.slot})"
    size = "" if block.mixer_size is None else f" {block.mixer_size}"
    mixer = "" if block.mixer == "softmax" else f", {block.mixer}{size}"
    return f"{index}: {block.num_heads} heads of {block.head_dim}, MLP {block.mlp_hidden}{mixer}{slot}"
