"""Dynamic Patch Slimming: small networks that learn to predict each image's scores.

Tang et al. (arXiv 2106.02852), section 4: in front of every block a small module reads what enters it and predicts the
score of every patch, fitted to the score of equation 6 per image; as many patches as were found for all images together
go on, those with the largest predicted scores.

Modules learn from the first block to the last, each from what the earlier ones really leave it, computed once: none
costs more than its own layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.layers.choose import DynamicPatchSlimming
from vitnas.layers.select import Kept
from vitnas.model import Model, build
from vitnas.slimming.patch_scores import Blocks, Streams, patch_scores

TINY = 1e-38  # the least score


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How the modules learn: by AdamW with a rate that falls to 0 along half a cosine.

    Args:
        steps: batches that each module sees, however few images there are.
    """

    steps: int = 600
    lr: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"prediction.{name} is {getattr(self, name)}; it must be above 0. Raise it.")


def predicting(
    arch: Arch, blocks: Blocks, streams: Streams, given: Sequence[Tensor], prediction: Prediction
) -> Model:
    """The Model of `arch`, whose modules predict what each patch is worth.

    Args:
        arch: as many patches as `given`, chosen by `dynamic_patch_slimming`.
        blocks: of the network that keeps all patches, with the weights that the Model gets.
        streams: what enters each block of the whole network.
        given: the tokens that each block gives where all images keep the same.
    """
    generator = torch.Generator().manual_seed(prediction.seed)
    model = build(arch, generator=generator).to(blocks.device).eval()
    model.load_state_dict(blocks.model.state_dict(), strict=False)
    model.to(next(blocks.model.parameters()).dtype)
    into = [x_BND.clone() for x_BND in streams.into(blocks.first)]
    rows: list[Kept] = [Kept()] * len(into)
    for index in range(blocks.first, blocks.depth):
        name = str(index)
        module = model.selections[name] if name in model.selections else None
        if isinstance(module, DynamicPatchSlimming):
            targets = [
                # Where nobody looks a score is 0 in float32, whose logarithm would make all NaN.
                patch_scores(blocks, index, x_BND, given[index + 1 :]).clamp(min=TINY).log().float().cpu()
                for x_BND in streams.batches(index)
            ]
            _fit(module, into, rows, targets, prediction, generator)
        passed = [*_through(model, index, into, rows, blocks.device)]
        into, rows = [x_BND for x_BND, _ in passed], [kept for _, kept in passed]
    return model


@torch.no_grad()
def _through(
    model: Model, index: int, into: Sequence[Tensor], rows: Sequence[Kept], device: torch.device
) -> Iterator[tuple[Tensor, Kept]]:
    """What a block gives of each batch, and which tokens that is."""
    for x_BND, kept in zip(into, rows, strict=True):
        x_BND, entering, picked = x_BND.to(device), kept, None
        if str(index) in model.selections:
            selected = model.selections[str(index)](x_BND, kept)
            x_BND, entering, kept, picked = selected.x_BND, selected.entering, selected.after, selected.picked
        yield model.blocks[index](x_BND, entering, "none", picked).cpu(), kept


@torch.enable_grad()
def _fit(
    module: DynamicPatchSlimming,
    into: Sequence[Tensor],
    rows: Sequence[Kept],
    targets: Sequence[Tensor],
    prediction: Prediction,
    generator: torch.Generator,
) -> None:
    """Fit the module to the logarithms of scores of those patches that come, up to a number per image."""
    device = module.worth.weight.device
    prefix = module.num_prefix_tokens
    wanted = [_centred(_of_rows(t, kept)[:, prefix:]) for t, kept in zip(targets, rows, strict=True)]
    spread = torch.cat([w_BP.flatten() for w_BP in wanted]).std().clamp(min=1e-6)
    module.requires_grad_(True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=prediction.lr, weight_decay=prediction.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, prediction.steps)
    order = list[int]()
    for _ in range(prediction.steps):
        order = order or torch.randperm(len(into), generator=generator).tolist()
        batch = order.pop()
        x_BPD = into[batch][:, prefix:].to(device)
        off_BP = _centred(module.score(x_BPD, rows[batch], None)) - (wanted[batch] / spread).to(x_BPD)
        optimizer.zero_grad(set_to_none=True)
        off_BP.square().mean().backward()
        optimizer.step()
        schedule.step()


def _of_rows(x_BN: Tensor, kept: Kept) -> Tensor:
    return x_BN if kept.rows_BN is None else x_BN.gather(1, kept.rows_BN.cpu())


def _centred(x_BP: Tensor) -> Tensor:
    return x_BP - x_BP.mean(1, keepdim=True)
