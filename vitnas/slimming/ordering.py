"""Ordering: a network with its units in the order of their importance, as a Supernet of the Space around it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.model import Model
from vitnas.model.timm_keys import from_timm
from vitnas.slimming.bases import turn
from vitnas.slimming.importance import Scores
from vitnas.space import AroundSpace
from vitnas.supernet import Supernet, start_from_timm
from vitnas.supernet.rewire import reorder


@torch.no_grad()
def ordered(network: nn.Module, space: AroundSpace, scores: Scores) -> Supernet:
    """A Supernet of `space` that at its largest is `network`, up to rounding, with the most important units first.

    So every smaller Arch is a prefix and has the best of what it can have: heads and hidden units in an order of their
    own per block, channels in one order for the whole network, as its blocks all add to one stream. (Of several stages
    the channels stay as they are: reductions tie their orders together.) Blocks stay in their places.

    Args:
        network: a Model, or a timm ViT that an Arch can say, around which `space` stands.

    Raises:
        UserError: the space stands around another network.
    """
    model = network if isinstance(network, Model) else from_timm(network)
    given = model.arch.with_blocks(replace(block, slot=None) for block in model.arch.blocks)
    if space.arch != given:
        raise UserError(
            f"the space stands around {space.arch.id}, the network is {given.id}; units are ordered of the network "
            "that a space stands around. Make the space with around(network)."
        )
    if any(gene.field == "head_dim" for gene in space.genes):
        model = copy.deepcopy(model)
        turn(model, scores.bases)
    supernet = Supernet(space).eval().to(next(model.parameters()).device)
    start_from_timm(supernet, model)
    for axis, prefix, scores_U in _orders(space, scores):
        names = [
            name for name, axes in supernet.axes.items() if name.startswith(prefix) and axis in dict(axes)
        ]
        reorder(supernet, axis, names, torch.argsort(scores_U, descending=True, stable=True))
    return supernet


def _orders(space: AroundSpace, scores: Scores) -> Iterator[tuple[str, str, Tensor]]:
    """(axis, what its tensors' names begin with, scores of its units)."""
    for axis, found in (("heads", scores.heads), ("hidden", scores.hidden)):
        for index, scores_U in enumerate(found):
            if len(scores_U):
                yield axis, f"blocks.{index}.", scores_U
    if len(scores.width) == 1 and any(
        gene.field == "embed_dim" and len(gene.options) > 1 for gene in space.genes
    ):
        yield "dim", "", scores.width[0]
