"""Features of images: what a network's classifier gets, or what its last blocks give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.model.modes import evaluating
from vitnas.model.outputs import output_names, read_outputs


class Features(NamedTuple):
    """Of N images, in order, on the CPU.

    Attributes:
        values_ND: (N, D) float32.
        targets: as batches give them: (N,) class numbers, or (N, 0) without labels.
    """

    values_ND: Tensor
    targets: Tensor


@torch.no_grad()
def features(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    blocks: int = 0,
    arch: Arch | None = None,
    device: torch.device | str | None = None,
    told: Callable[[int], object] | None = None,
) -> Features:
    """Features of all images of `batches`, in evaluation mode; the training mode is restored.

    Args:
        network: a Model, a Supernet (as `arch`), or a network of timm.
        batches: (B, C, H, W) images and their targets.
        blocks: 0 for what the classifier gets; else the outputs of so many last blocks side by side, each pooled as the
            network pools (its class token, or the mean of its patches), those as wide as the final norm through that
            norm: the features of DINO's and EsViT's linear evaluations (Li et al. 2022). Not of a Supernet.
        device: where the network is; found from its parameters when None.
        told: hears how many images are done.

    Raises:
        UserError: more blocks than the network has, or a network whose features are not one set of tokens.
    """
    there = torch.device(device) if device is not None else next(network.parameters()).device
    found: list[Tensor] = []
    targets: list[Tensor] = []
    done = 0
    with evaluating(network):
        for images_BCHW, targets_B in batches:
            images_BCHW = images_BCHW.to(there)
            if blocks:
                values_BD = _last_blocks(network, images_BCHW, blocks)
            else:
                values_BD = read_outputs(network, images_BCHW, ("pooled",), arch=arch)["pooled"]
            found.append(values_BD.flatten(1).float().cpu())
            targets.append(targets_B)
            done += len(targets_B)
            if told is not None:
                told(done)
    return Features(torch.cat(found), torch.cat(targets))


def _last_blocks(network: Any, images_BCHW: Tensor, count: int) -> Tensor:
    """(B, D1 + D2 + ...) pooled outputs of the last `count` blocks."""
    names = [name for name in output_names(network) if name.startswith("blocks.")]
    if not 0 < count <= len(names):
        raise UserError(
            f"blocks is {count}; the network has {len(names)} that can be told apart, and 0 stands for what its "
            f"classifier gets. Use {min(4, len(names))}."
        )
    outputs = read_outputs(network, images_BCHW, names[-count:])
    first, last = int(getattr(network, "num_prefix_tokens", 0)), None
    if getattr(network, "global_pool", "avg") == "token":
        first, last = 0, 1
    norm = getattr(network, "norm", None)
    width = norm.normalized_shape[-1] if isinstance(norm, nn.LayerNorm) else None
    pooled = []
    for name in names[-count:]:
        tokens_BND = outputs[name]
        if norm is not None and tokens_BND.shape[-1] == width:
            tokens_BND = norm(tokens_BND)
        pooled.append(tokens_BND[:, first:last].mean(1))
    return torch.cat(pooled, dim=1)
