"""Spaces: which Archs are allowed. `SPACES` maps a kind's word to what configures and makes its Spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitnas.errors import UserError, nearest
from vitnas.kinds import members
from vitnas.space.around import AroundConfig, AroundSpace, around
from vitnas.space.autoformer import AutoFormerConfig, AutoFormerSpace, autoformer
from vitnas.space.config import SpaceConfig
from vitnas.space.costs import CostTable, Term
from vitnas.space.gene import Gene, Genes, Matrix, kind_of
from vitnas.space.mixers import MixerConfig, MixerSpace, mixer_space
from vitnas.space.private import Private
from vitnas.space.space import NotInSpace, Space
from vitnas.space.unified import UnifiedConfig, UnifiedSpace, UnifiedStage, unified
from vitnas.space.vit_resnas import StageSpace, ViTResNASConfig, ViTResNASSpace, vit_resnas
from vitnas.space.vitas import VitasConfig, VitasSpace, vitas

SPACES: dict[str, type[SpaceConfig]] = members(SpaceConfig, globals(), "kind")

__all__ = [
    "SPACES",
    "AroundConfig",
    "AroundSpace",
    "AutoFormerConfig",
    "AutoFormerSpace",
    "CostTable",
    "Gene",
    "Genes",
    "Matrix",
    "MixerConfig",
    "MixerSpace",
    "NotInSpace",
    "Private",
    "Space",
    "SpaceConfig",
    "StageSpace",
    "Term",
    "UnifiedConfig",
    "UnifiedSpace",
    "UnifiedStage",
    "ViTResNASConfig",
    "ViTResNASSpace",
    "VitasConfig",
    "VitasSpace",
    "around",
    "autoformer",
    "kind_of",
    "mixer_space",
    "space_from_json",
    "unified",
    "vit_resnas",
    "vitas",
]


def space_from_json(value: Mapping[str, Any]) -> Space:
    """The Space that `Space.to_json` wrote.

    Raises:
        UserError: unknown kind, or options that do not fit.
    """
    kind = str(value.get("kind"))
    if kind not in SPACES:
        raise UserError(
            f"the Space's kind is {kind!r}; known are {', '.join(SPACES)}.{nearest(kind, SPACES)}"
        )
    try:
        return SPACES[kind].space(**value["options"])
    except (KeyError, TypeError) as error:
        raise UserError(f"the Space cannot be read ({error}); it needs the options of {kind!r}.") from error
