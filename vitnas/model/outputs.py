"""Outputs by name: what `want=` asks of a Model or a Supernet, and the same read from any network of timm.

    logits        (B, Y) what the plain call gives
    head, head_dist, patch_head   the logits of each head as it trains: (B, Y), (B, Y), (B, patches, Y)
    pooled        (B, D) what the classifier gets
    tokens        (B, N, D) the last tokens, behind the final norm, prefix tokens first
    blocks.<i>    (B, N, D) what block i gives; blocks are numbered through all stages
    keep, scores  (B, S, P) over all patches of the grid, of each of S selections: 1 for those kept (or at whose place a
                  merged token stands), and what patches scored (-inf where they were gone before)
    groups        (B, S, P) the place of the token that each patch of the grid is in behind each selection, -1 in none
    shares        (B, S) the share of the grid's patches that each selection keeps in evaluation
    places.<i>    (B, P) numbers on the grid of the patches in blocks.<i>, behind a selection; in training all are there

A name that ends in "?" is left out where the network has no such output. Maps of rows and columns become tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.errors import UserError, nearest


def read_outputs(
    network: nn.Module, images_BCHW: Tensor, want: Sequence[str], *, arch: Arch | None = None, side: int = 0
) -> dict[str, Tensor]:
    """The outputs of `network` that `want` names: of `arch` in a Supernet, of a Model, or of a network of timm.

    Raises:
        UserError: a name that the network does not have, with the nearest.
    """
    if arch is not None:
        found: dict[str, Tensor] = network(images_BCHW, arch, want=want, side=side)
        return found
    if hasattr(network, "output_names"):  # ours
        found = network(images_BCHW, want=want)
        return found
    return _read(network, images_BCHW, wanted(want, output_names(network)))


def output_names(network: Any) -> list[str]:
    """The names that can be wanted of `network`."""
    if (ours := getattr(network, "output_names", None)) is not None:
        return [*ours]
    names = ["logits", "head", *(["head_dist"] if hasattr(network, "head_dist") else [])]
    if hasattr(network, "forward_features") and hasattr(network, "forward_head"):
        names += ["pooled", "tokens"]
    return names + [f"blocks.{index}" for index in range(len(_blocks(network)))]


def wanted(want: Sequence[str], names: Iterable[str]) -> list[str]:
    """`want` without the "?" and what they leave out.

    Raises:
        UserError: a name that is not in `names`, with the nearest.
    """
    known = set(names)
    for name in want:
        if name not in known and not name.endswith("?"):
            few = ", ".join(sorted(word for word in known if not word.startswith(("blocks.", "places."))))
            blocks = sum(word.startswith("blocks.") for word in known)
            raise UserError(
                f"the output {name!r} is wanted; this network has {few}"
                + (f" and blocks.0 to blocks.{blocks - 1}." if blocks else ".")
                + (nearest(name, known) or " Use one of these.")
            )
    return [name.removesuffix("?") for name in want if name.removesuffix("?") in known]


def _read(network: Any, images_BCHW: Tensor, want: list[str]) -> dict[str, Tensor]:
    """By hooks, and by the two halves of timm's forward pass where what lies between them is wanted."""
    found: dict[str, Tensor] = {}
    watched = {f"blocks.{index}": block for index, block in enumerate(_blocks(network))}
    if hasattr(network, "head_dist"):
        watched |= {"head": network.head, "head_dist": network.head_dist}
    handles = [
        watched[name].register_forward_hook(partial(_keep, found, name)) for name in want if name in watched
    ]
    try:
        if "pooled" in want or "tokens" in want:
            features = network.forward_features(images_BCHW)
            if not isinstance(features, Tensor):
                raise UserError(
                    f"{type(network).__name__} has features of several kinds, not one set of tokens. Want its logits, "
                    "or use another network."
                )
            found["tokens"] = features
            if "pooled" in want:
                found["pooled"] = network.forward_head(features, pre_logits=True)
            if {"logits", "head", "head_dist"} & {*want}:
                found["logits"] = network.forward_head(features)
        else:
            found["logits"] = network(images_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    if "logits" in found:
        found.setdefault("head", found["logits"])
    return {name: _as_tokens(network, name, found[name]) for name in want}


def _keep(found: dict[str, Tensor], name: str, module: nn.Module, given: Any, output: Any) -> None:
    found[name] = output if isinstance(output, Tensor) else output[0]  # some blocks give the grid's size too


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of all stages, in order; [] where they cannot be told."""
    for name in ("blocks", "stages", "layers"):
        if isinstance(parts := getattr(network, name, None), nn.Sequential | nn.ModuleList):
            found: list[nn.Module] = []
            for part in parts:
                inner = part if isinstance(part, nn.ModuleList) else getattr(part, "blocks", None)
                found += inner if isinstance(inner, nn.Sequential | nn.ModuleList) else [part]
            return found
    return []


def _as_tokens(network: Any, name: str, output: Tensor) -> Tensor:
    """(B, N, D) of a block's or the last map; where channels are is told by the widths that the network says it has."""
    if output.dim() != 4 or not name.startswith(("tokens", "blocks.")):
        return output
    widths = {network.num_features, *(info["num_chs"] for info in getattr(network, "feature_info", []))}
    first, last = output.shape[1] in widths, output.shape[-1] in widths
    channels_last = last if first != last else getattr(network, "output_fmt", "NCHW") == "NHWC"
    return output.flatten(1, 2) if channels_last else output.flatten(2).transpose(1, 2)
