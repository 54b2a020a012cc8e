"""How much patches matter to what a network gives: the score of Patch Slimming, and the blocks that it is taken of.

Tang et al., "Patch Slimming for Efficient Vision Transformers" (CVPR 2022, arXiv 2106.02852), equation 6. With P_l^h
the attention of head h in block l, its rows those that block l gives and its columns those that came to it, the score
of patch i in block t is

    sum over every combination of heads of the blocks behind t of |column i of the product of their P|^2
    times the sum over heads of |row i of P_t^h |Z||^2,     Z: what enters block t

The first factor is the diagonal of a recursion from the last block to t + 1, G <- sum_h P_h^T G P_h, begun with what
the classifier reads: the class token, or the mean over patches. Blocks up to t are whole, those behind t give what they
keep.

Shapes: B images, N tokens, n and m tokens that a block gives and that come to it, A heads, D dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from vitnas.errors import UserError
from vitnas.layers.select import Kept, Picked
from vitnas.mixers.softmax import Softmax
from vitnas.model import Model


class Blocks:
    """The blocks of a Model among which patches may leave: all, or those of the last stage behind its first.

    Sets of tokens are their numbers, rising, the tokens before the patches first. Blocks are counted through the whole
    network, `first` to `depth` - 1.

    Raises:
        UserError: a network that keeps fewer patches already, or attention that is no plain softmax.
    """

    def __init__(self, model: Model) -> None:
        arch = model.arch
        if arch.selector is not None:
            raise UserError(
                f"{arch.id} keeps fewer patches already, chosen by {arch.selector!r}; patches are slimmed in a network "
                "that keeps all. Use the network before."
            )
        self.model, self.depth = model, arch.depth
        self.first = 0 if len(arch.stages) == 1 else arch.depth - len(arch.stages[-1].blocks) + 1
        self.prefix, self.patches = arch.num_prefix_tokens, prod(arch.grids[-1])
        others = [
            index for index in range(self.first, self.depth) if not isinstance(self.mixer(index), Softmax)
        ]
        if others or arch.relative_position or arch.rel_pos_bias != "none":
            what = (
                f"block {others[0]} mixes by {arch.blocks[others[0]].mixer!r}"
                if others
                else "distances change it"
            )
            raise UserError(
                f"patches are scored by softmax attention alone, and in {arch.id} {what}. Use a network without, for "
                "example a DeiT."
            )
        if self.first >= self.depth:
            raise UserError(
                f"the last stage of {arch.id} has one block; patches leave behind it. Use a network with more blocks."
            )

    def mixer(self, index: int) -> Any:
        block: Any = self.model.blocks[index]
        return block.attn

    @property
    def all_tokens(self) -> Tensor:
        return torch.arange(self.prefix + self.patches, device=self.device)

    @property
    def before_patches(self) -> Tensor:
        """The tokens that every block gives."""
        return torch.arange(self.prefix, device=self.device)

    def with_prefix(self, places: Tensor) -> Tensor:
        """Numbers of tokens: those before the patches, and patches by their places on the grid."""
        return torch.cat([self.before_patches, places.to(self.device) + self.prefix])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def reads_patches(self) -> bool:
        """Whether the classifier reads patches, not the class token."""
        return self.model.global_pool != "token" or self.model.patch_head is not None

    def reading(self, given_n: Tensor) -> Tensor:
        """(R, n) how the classifier reads what the last block gives: one row per token, or the mean over patches."""
        if self.reads_patches:
            is_patch = (given_n >= self.prefix).float()
            return (is_patch / is_patch.sum()).unsqueeze(0)
        read = 1 + self.model.arch.distill_token
        return torch.eye(read, len(given_n), device=given_n.device)

    def run(self, index: int, x_BmD: Tensor, came_m: Tensor, given_n: Tensor) -> Tensor:
        """What the block gives of the tokens `given_n`, by keys and values of all that came."""
        out_BnD: Tensor = self.model.blocks[index](x_BmD, *self._given(len(x_BmD), came_m, given_n))
        return out_BnD

    def attention(self, index: int, x_BmD: Tensor, came_m: Tensor, given_n: Tensor) -> Tensor:
        """(B, A, n, m) of the tokens that it gives."""
        block: Any = self.model.blocks[index]
        kept, _, picked = self._given(len(x_BmD), came_m, given_n)
        maps_BAnm: Tensor = block.attn.attention(block.norm1(x_BmD), kept, picked)
        return maps_BAnm

    def _given(self, images: int, came_m: Tensor, given_n: Tensor) -> tuple[Kept | None, Any, Picked | None]:
        is_whole = len(came_m) == self.prefix + self.patches
        kept = None if is_whole else Kept(rows_BN=came_m.expand(images, -1))
        if len(given_n) == len(came_m):
            return kept, "none", None
        index_n = torch.searchsorted(came_m, given_n)
        return kept, "none", Picked(index_n.expand(images, -1), given_n.expand(images, -1))


@torch.no_grad()
def patch_scores(blocks: Blocks, index: int, x_BND: Tensor, given: Sequence[Tensor]) -> Tensor:
    """(B, N) scores of all tokens in block `index`, in float64; the heads of all combinations are summed.

    Memory is that of the blocks' inputs and of one block's attention.

    Args:
        x_BND: what enters the block.
        given: the tokens that each block behind it gives.
    """
    came_m, x_BmD = blocks.all_tokens, blocks.run(index, x_BND, blocks.all_tokens, blocks.all_tokens)
    steps: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for number, given_n in enumerate(given, index + 1):
        steps.append((number, x_BmD, came_m, given_n))
        if number < blocks.depth - 1:
            x_BmD = blocks.run(number, x_BmD, came_m, given_n)
        came_m = given_n
    del x_BmD
    reading_Rn = blocks.reading(came_m)
    # Means over heads, so that deep networks with many heads stay within float32; the factor comes last.
    energy_Bnn, heads = (reading_Rn.t() @ reading_Rn).expand(len(x_BND), -1, -1), 1.0
    for step in reversed(steps):
        maps_BAnm = blocks.attention(*step)
        energy_Bnn = energy_Bnn.to(maps_BAnm)
        flat_BMm = maps_BAnm.flatten(1, 2)
        energy_Bnn = flat_BMm.transpose(1, 2) @ (energy_Bnn.unsqueeze(1) @ maps_BAnm).flatten(1, 2)
        energy_Bnn = energy_Bnn / maps_BAnm.shape[1]
        heads *= maps_BAnm.shape[1]
        del maps_BAnm, flat_BMm
    maps_BANN = blocks.attention(index, x_BND, blocks.all_tokens, blocks.all_tokens)
    size_BND = x_BND.abs().to(maps_BANN)
    reach_BN = sum((maps_BNN @ size_BND).square().sum(-1) for maps_BNN in maps_BANN.unbind(1))
    return energy_Bnn.diagonal(dim1=1, dim2=2).double() * heads * reach_BN


class Streams:
    """What enters each block of the whole network, for all images, held on the CPU.

    Every few blocks' inputs are kept, as many as fit into `memory_bytes`, and those between are computed again from
    the ones before, so that no layer ever costs a pass through the whole network.
    """

    def __init__(self, blocks: Blocks, images: Iterable[Tensor], memory_bytes: float) -> None:
        self._blocks, self._known = blocks, dict[int, list[Tensor]]()
        begin = [self._enter(images_BCHW) for images_BCHW in images]
        layer = sum(x.numel() * x.element_size() for x in begin)
        self._stride = max(1, ceil(layer * (blocks.depth - blocks.first + 1) / memory_bytes))
        self._known[blocks.first] = begin

    @torch.no_grad()
    def _enter(self, images_BCHW: Tensor) -> Tensor:
        blocks, model = self._blocks, self._blocks.model
        if not blocks.first:
            return model.embed(images_BCHW).cpu()
        name = f"blocks.{blocks.first - 1}"
        found: Tensor = model(images_BCHW, want=(name,))[name]
        return found.cpu()

    @torch.no_grad()
    def into(self, index: int) -> list[Tensor]:
        """(B, N, D) per batch that enters block `index`; of `depth`, what the last block gives."""
        blocks, begin = self._blocks, max(known for known in self._known if known <= index)
        found = self._known[begin]
        for number in range(begin, index):
            run = blocks.model.blocks[number]
            found = [run(x_BND.to(blocks.device)).cpu() for x_BND in found]
            if (number + 1 - blocks.first) % self._stride == 0:
                self._known[number + 1] = found
        return found

    def batches(self, index: int) -> Iterator[Tensor]:
        """The same, one after the other on the network's device."""
        for x_BND in self.into(index):
            yield x_BND.to(self._blocks.device)


def mean_scores(blocks: Blocks, index: int, into: Iterable[Tensor], given: Sequence[Tensor]) -> Tensor:
    """(N,) scores in block `index`, averaged over all images; `into` enters it, batch by batch."""
    total: Tensor | None = None
    for x_BND in into:
        scores_N = patch_scores(blocks, index, x_BND, given).sum(0)
        total = scores_N if total is None else total + scores_N
    assert total is not None
    return total
