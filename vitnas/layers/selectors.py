"""`SELECTIONS` maps an Arch's `selector` to its class."""

from __future__ import annotations

from vitnas.layers.choose import (
    AttentionSelection,
    DynamicPatchSlimming,
    FirstSelection,
    FixedSelection,
    PatchSlimming,
    PredictorSelection,
    PrefixSelection,
    RandomSelection,
)
from vitnas.layers.merge import EvitSelection, MergeSelection, PoolSelection
from vitnas.layers.select import Selection

SELECTIONS: dict[str, type[Selection]] = {
    kind.word: kind
    for kind in (
        PredictorSelection,
        FixedSelection,
        AttentionSelection,
        PatchSlimming,
        DynamicPatchSlimming,
        EvitSelection,
        MergeSelection,
        PoolSelection,
        RandomSelection,
        FirstSelection,
    )
}


def selection_of(selector: str, keep: int) -> type[Selection]:
    """The class that keeps so many patches where an Arch's selector is this word."""
    return SELECTIONS[selector] if keep else PrefixSelection
