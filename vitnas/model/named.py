"""An Arch by words: a published name, one of ViTAS by its code, or a file that an earlier search or training wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vitnas.arch import Arch
from vitnas.errors import UserError, nearest
from vitnas.grids import ImageSize, size_text
from vitnas.model.net_id import arch_of_net_id, net_id_of
from vitnas.model.published import PUBLISHED
from vitnas.runs import read_json

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
                return replace(self.arch, **wanted)
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
        found = read_json(path)
        is_told = isinstance(found, dict) and isinstance(found.get("arch"), dict)
        try:
            arch = Arch.from_json(found["arch"] if is_told else found)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return Named(str(found["name"]) if is_told and "name" in found else arch.id, arch, is_file=True)
    known = (*PUBLISHED, *also)
    what = "model, recipe or arch.json" if also else "model, arch.json or ViTAS code"
    raise UserError(f"{name!r} is no {what}; known are {', '.join(known)}.{nearest(name, known)}")


def told(arch: Arch, kind: str, **more: Any) -> dict[str, Any]:
    """What chosen.json says of an Arch, for people first; `find_arch` reads it back.

    Args:
        kind: of its Space, which begins its name (`vitas-p16-d154-l7-3f9a1c2b`).
        more: what else is known of it.
    """
    try:
        code = " ".join(map(str, net_id_of(arch)))
    except UserError:  # only ViTAS's own Spaces have one
        code = None
    return {
        "name": f"{kind}-p{arch.patch_size}-{arch.id}",
        "about": arch.describe(),
        "blocks": [_line(index, arch) for index in range(arch.depth)],
        **({"net_id": code} if code else {}),
        **more,
        "arch": arch.to_json(),
    }


def _line(index: int, arch: Arch) -> str:
    block = arch.blocks[index]
    slot = "" if block.slot is None else f" (slot {block.slot})"
    size = "" if block.mixer_size is None else f" {block.mixer_size}"
    mixer = "" if block.mixer == "softmax" else f", {block.mixer}{size}"
    return f"{index}: {block.num_heads} heads of {block.head_dim}, MLP {block.mlp_hidden}{mixer}{slot}"
