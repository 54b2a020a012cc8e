"""Spaces: which Archs are allowed. `SPACES` maps a word to the function that makes the Space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vitnas.errors import UserError, nearest
from vitnas.space.autoformer import AutoFormerSpace, autoformer
from vitnas.space.mixers import MixerSpace, mixer_space
from vitnas.space.space import CostTable, Gene, Genes, Matrix, NotInSpace, Space, Term
from vitnas.space.vit_resnas import StageSpace, ViTResNASSpace
from vitnas.space.vit_resnas_sizes import vit_resnas
from vitnas.space.vitas import VitasSpace
from vitnas.space.vitas_sizes import vitas

SPACES: dict[str, Callable[..., Space]] = {
    "autoformer": autoformer,
    "mixers": mixer_space,
    "vit_resnas": vit_resnas,
    "vitas": vitas,
}
KINDS: dict[str, Callable[..., Space]] = {
    "autoformer": AutoFormerSpace,
    "mixers": MixerSpace,
    "vit_resnas": ViTResNASSpace,
    "vitas": VitasSpace,
}

__all__ = [
    "SPACES",
    "AutoFormerSpace",
    "CostTable",
    "Gene",
    "Genes",
    "Matrix",
    "MixerSpace",
    "NotInSpace",
    "Space",
    "StageSpace",
    "Term",
    "ViTResNASSpace",
    "VitasSpace",
    "autoformer",
    "mixer_space",
    "space_from_json",
    "vit_resnas",
    "vitas",
]


def space_from_json(value: Mapping[str, Any]) -> Space:
    """The Space that `Space.to_json` wrote.

    Raises:
        UserError: unknown kind, or options that do not fit.
    """
    kind = str(value.get("kind"))
    if kind not in KINDS:
        raise UserError(f"the Space's kind is {kind!r}; known are {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    try:
        return KINDS[kind](**value["options"])
    except (KeyError, TypeError) as error:
        raise UserError(f"the Space cannot be read ({error}); it needs the options of {kind!r}.") from error
