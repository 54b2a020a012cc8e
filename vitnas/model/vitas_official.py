"""The authors' checkpoints of retrained ViTAS nets (github.com/xiusu/ViTAS), read by name into a Model.

Their network is a list of modules `backbone_<stage>_<kind>_<slot>`, each a list with the one operation that was chosen;
slots that hold the identity own nothing. Tensors are laid out as ours. A checkpoint does not say how many heads a block
has, so the Arch must be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.model.official import foreign, model_with, read_checkpoint
from vitnas.model.vit import Model

_NAME = re.compile(
    r"(?:net\.)?backbone_\w+?_(?P<kind>Patch_init|Block|Norm|FC)_(?P<slot>\d+)\.0\.(?P<leaf>.+)"
)


def load_vitas_model(source: str | Path | Mapping[str, Tensor], arch: Arch) -> Model:
    """The Model of `arch`, in evaluation mode, with the weights of the authors' retrained net.

    Args:
        source: a file, or the state dict itself; keys may begin with `net.`.

    Raises:
        UserError: the checkpoint cannot be read, is no ViTAS net, or is one of another Arch (all reasons are given).
    """
    tensors = read_checkpoint(source)
    found = {name: _NAME.fullmatch(name) for name in tensors}
    unknown = [name for name, match in found.items() if match is None]
    if unknown:
        raise foreign(unknown, "a retrained ViTAS net", "retraining")
    matches = {name: match for name, match in found.items() if match is not None}
    theirs = sorted({int(match["slot"]) for match in matches.values() if match["kind"] == "Block"})
    ours = [slot for stage in arch.stages for slot in stage.slots]
    if theirs != ours:
        raise UserError(
            f"the checkpoint has blocks in slots {', '.join(map(str, theirs)) or 'none'}; {arch.id} has them in "
            f"{', '.join(map(str, ours))}. Give the Arch of the checkpoint's net_id."
        )
    place = {slot: index for index, slot in enumerate(theirs)}
    weights = {_our_name(match, place): tensors[name] for name, match in matches.items()}
    return model_with(weights, arch, "the checkpoint's net_id")


def _our_name(match: re.Match[str], place: Mapping[int, int]) -> str:
    kind, leaf = match["kind"], match["leaf"]
    if kind == "Block":
        return f"blocks.{place[int(match['slot'])]}.{leaf}"
    if kind == "Patch_init":
        return leaf
    return f"norm.{leaf}" if kind == "Norm" else f"head.{leaf.removeprefix('module.0.')}"
