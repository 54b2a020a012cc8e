"""The authors' DynamicViT checkpoints on DeiT (github.com/raoyongming/DynamicViT), read by name into a Model.

Their predictors are numbered by themselves, ours stand at their blocks; all else has timm's names on both sides. A
checkpoint says neither the places nor how many patches are kept, so the Arch must be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vitnas.arch import Arch
from vitnas.model.official import model_with, read_checkpoint
from vitnas.model.vit import Model

PARTS = {  # of a predictor: theirs, ours
    "in_conv.0": "norm",
    "in_conv.1": "embed",
    "out_conv.0": "fc1",
    "out_conv.2": "fc2",
    "out_conv.4": "decision",
}
_NAME = re.compile(r"score_predictor\.(?P<number>\d+)\.(?P<part>(?:in|out)_conv\.\d)\.(?P<leaf>\w+)")


def load_dynamicvit(source: str | Path | Mapping[str, Tensor], arch: Arch) -> Model:
    """The Model of `arch`, in evaluation mode, with the authors' weights.

    Args:
        source: a file, or the state dict itself.

    Raises:
        UserError: the checkpoint cannot be read, or is of another Arch (the first reasons are given).
    """
    return model_with(
        dynamicvit_tensors(read_checkpoint(source), arch), arch, "its name, as PUBLISHED has it"
    )


def dynamicvit_tensors(state: Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """Their state dict under our names; what has no such name in `arch` stays as it is."""
    places = [index for index, block in enumerate(arch.blocks) if block.keep is not None]
    return {_our_name(name, places): tensor for name, tensor in state.items()}


def _our_name(name: str, places: list[int]) -> str:
    found = _NAME.fullmatch(name)
    if found is None or found["part"] not in PARTS or int(found["number"]) >= len(places):
        return name
    return f"selections.{places[int(found['number'])]}.{PARTS[found['part']]}.{found['leaf']}"
