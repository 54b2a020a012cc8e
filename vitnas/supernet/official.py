"""Weights from the authors' AutoFormer checkpoints, for a Supernet or for the Model of one Arch.

Their tables are cut by the same rule as ours, `Sharing.piece`, with the checkpoint in the place of the Supernet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.layers.axes import named_axes
from vitnas.model import Model, build
from vitnas.model.official import arch_of_autoformer, autoformer_tensors, model_with, read_checkpoint
from vitnas.supernet.sharing import AUTOFORMER_OFFICIAL
from vitnas.supernet.supernet import Supernet

SAME = (
    "image_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "relative_position",
    "class_token",
    "position",
    "qkv_bias",
)


def load_autoformer_supernet(supernet: Supernet, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load the authors' supernet weights into ours, as far as the Space reaches (their tiny is 256 wide, ours 240).

    Args:
        source: a file, or the state dict itself.

    Raises:
        UserError: the checkpoint does not fit the Space, or the Supernet shares weights in another way than theirs.
    """
    if supernet.sharing != AUTOFORMER_OFFICIAL:
        raise UserError(
            "the Supernet's sharing is not the authors'; their qkv bias is cut as one run. "
            "Make it with Supernet(space, sharing=AUTOFORMER_OFFICIAL)."
        )
    supernet.load_state_dict(autoformer_weights(source, supernet.space.largest()))


def load_autoformer_model(source: str | Path | Mapping[str, Tensor], arch: Arch) -> Model:
    """The Model of `arch`, in evaluation mode, with the authors' weights (of a supernet, or of this subnet alone).

    Raises:
        UserError: the checkpoint does not hold `arch`; all reasons are given.
    """
    return model_with(autoformer_weights(source, arch), arch, "the checkpoint")


def autoformer_weights(source: str | Path | Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """For every parameter of `build(arch)`, its entries in the authors' checkpoint.

    Raises:
        UserError: the checkpoint cannot be read, is no AutoFormer or does not hold `arch`; all reasons are given.
    """
    tensors = autoformer_tensors(read_checkpoint(source))
    whole = arch_of_autoformer(tensors, global_pool="token" if arch.global_pool == "token" else "avg")
    reasons = _reasons(arch, whole)
    missing = [name for name in build(whole, device="meta").state_dict() if name not in tensors]
    reasons += [f"the checkpoint lacks {', '.join(missing[:4])}"] if missing else []
    if reasons:
        raise UserError(f"{arch.id} is not a part of this checkpoint: {'; '.join(reasons)}. Choose another.")
    largest = named_axes(build(whole, device="meta"))
    shared = {name: AUTOFORMER_OFFICIAL.taken(name, axes) for name, axes in largest.items()}
    table = {name: tensor.contiguous() for name, tensor in tensors.items()}
    skeleton = build(arch, device="meta")
    weights = {}
    for name, axes in named_axes(skeleton).items():
        homes = AUTOFORMER_OFFICIAL.homes(name, axes, lambda field: None)
        piece = AUTOFORMER_OFFICIAL.piece(name, homes, shared, tuple(skeleton.get_parameter(name).shape))
        weights[name] = piece.take(table)
    return weights


def _reasons(arch: Arch, whole: Arch) -> list[str]:
    """Why `arch` is not a part of the checkpoint, whose Arch is `whole`."""
    reasons = [
        f"{name} is {getattr(arch, name)}, the checkpoint's {getattr(whole, name)}"
        for name in SAME
        if getattr(arch, name) != getattr(whole, name)
    ]
    if arch.fc_norm or any(block.mixer != "softmax" or block.slot is not None for block in arch.blocks):
        reasons.append("an AutoFormer has its norm before pooling and softmax in blocks taken in order")
    if arch.selector is not None:
        reasons.append("an AutoFormer keeps all patches")
    sizes = [("embed_dim", arch.embed_dim, whole.embed_dim), ("depth", arch.depth, whole.depth)]
    for index, (block, other) in enumerate(zip(arch.blocks, whole.blocks, strict=False)):
        if block.head_dim != other.head_dim:
            reasons.append(f"block {index}: head_dim is {block.head_dim}, the checkpoint's {other.head_dim}")
        sizes += [
            (f"block {index}: {name}", getattr(block, name), getattr(other, name))
            for name in ("num_heads", "mlp_hidden")
        ]
    return reasons + [
        f"{what} is {size}, the checkpoint has {limit}" for what, size, limit in sizes if size > limit
    ]
