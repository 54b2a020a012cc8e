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
from vitnas.model.build import build
from vitnas.model.official import read_checkpoint
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
    model = build(arch, device="meta").to_empty(device="cpu")
    model.load_state_dict(vitas_weights(source, arch))
    return model.eval()


def vitas_weights(source: str | Path | Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """The authors' tensors under the names of `build(arch)`.

    Raises:
        UserError: see `load_vitas_model`.
    """
    tensors = read_checkpoint(source)
    found = {name: _NAME.fullmatch(name) for name in tensors}
    unknown = [name for name, match in found.items() if match is None]
    if unknown or not found:
        raise UserError(
            f"the checkpoint has {len(unknown)} names that a retrained ViTAS net lacks ({', '.join(unknown[:4])}); it "
            "must be a state dict of the authors' retraining. Choose another file."
        )
    matches = {name: match for name, match in found.items() if match is not None}
    theirs = sorted({int(match["slot"]) for match in matches.values() if match["kind"] == "Block"})
    ours = [index if block.slot is None else block.slot for index, block in enumerate(arch.blocks)]
    if theirs != ours:
        raise UserError(
            f"the checkpoint has blocks in slots {', '.join(map(str, theirs)) or 'none'}; {arch.id} has them in "
            f"{', '.join(map(str, ours))}. Give the Arch of the checkpoint's net_id."
        )
    place = {slot: index for index, slot in enumerate(theirs)}
    weights = {_our_name(match, place): tensors[name] for name, match in matches.items()}
    wanted = {name: tuple(p.shape) for name, p in build(arch, device="meta").named_parameters()}
    reasons = [f"{name} is missing" for name in wanted if name not in weights]
    reasons += [f"{name} is unknown" for name in weights if name not in wanted]
    reasons += [
        f"{name} is {tuple(weights[name].shape)}, needed {shape}"
        for name, shape in wanted.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if reasons:
        told = "; ".join(reasons[:4]) + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")
        raise UserError(
            f"the checkpoint is not of {arch.id}: {told}. Give the Arch of the checkpoint's net_id."
        )
    return weights


def _our_name(match: re.Match[str], place: Mapping[int, int]) -> str:
    kind, leaf = match["kind"], match["leaf"]
    if kind == "Block":
        return f"blocks.{place[int(match['slot'])]}.{leaf}"
    if kind == "Patch_init":
        return leaf
    return f"norm.{leaf}" if kind == "Norm" else f"head.{leaf.removeprefix('module.0.')}"
