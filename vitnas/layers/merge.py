"""Selections that lose no patch: they make fewer tokens out of those that come.

`evit` (Liang et al., "Not All Patches are What You Need", arXiv 2202.07800, section 3.2) keeps what got most attention
and fuses all others into one token, their sum weighted by that attention. `merge` is token merging (Bolya et al.,
arXiv 2210.09461, section 3): between two halves, tokens whose keys are most alike become one, their mean weighted by
how many patches each stands for; attention and mean pooling behind it go by these numbers too. `pool` takes the mean of
2 x 2 patches.

A token that holds several stands at the place of one of them: the last one that would have been kept (`evit`), the one
that the others came to (`merge`), the upper left one (`pool`). Where the papers do this inside a block, between
attention and MLP, it is done here in front of the next block.

Shapes: B images, N tokens, P patches, D dim, k patch tokens that go on, K head_dim, O and E tokens of the two halves.
"""

from __future__ import annotations

from math import isqrt, prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vitnas.grids import Grid, size_text
from vitnas.layers.choose import AttentionSelection
from vitnas.layers.cost import LayerCost
from vitnas.layers.select import (
    Kept,
    Selected,
    Selection,
    SelectionFrame,
    take,
    with_prefix,
)


class EvitSelection(AttentionSelection):
    """Of the patch tokens that go on all but one are those with most attention; the last one takes in all others.

    The weights are attention itself and need not add up to 1, as in the paper. A fused token is like any other to the
    next selection. Gradients flow through the weights.
    """

    word = "evit"

    def forward(
        self,
        x_BND: Tensor,
        kept: Kept | None = None,
        told: Tensor | None = None,
        *,
        masked: bool = False,
        grouping: bool = False,
    ) -> Selected:
        prefix, kept = self.num_prefix_tokens, kept or Kept()
        scores_BP = ranked_BP = self.score(x_BND[:, prefix:], kept, told)
        if kept.mask_BN is not None:
            ranked_BP = scores_BP.masked_fill(kept.mask_BN[:, prefix:] == 0, -torch.inf)
        best_Bk = ranked_BP.topk(self.keep, dim=1).indices
        weights_B1P = scores_BP.scatter(1, best_Bk[:, :-1], 0.0).unsqueeze(1)
        fused_B1D = weights_B1P.to(x_BND.dtype) @ x_BND[:, prefix:]
        del weights_B1P
        last_B1 = best_Bk[:, -1:] + prefix
        into_BP = self._into(best_Bk, last_B1, scores_BP.shape[1], kept) if grouping else None
        if masked:
            mask_BP = torch.zeros_like(scores_BP, dtype=torch.bool).scatter(1, best_Bk, True)
            is_last_BN = torch.arange(x_BND.shape[1], device=x_BND.device) == last_B1
            x_BND = fused_B1D.where(is_last_BN.unsqueeze(-1), x_BND)
            after = Kept(mask_BN=functional.pad(mask_BP, (prefix, 0), value=True))
            return Selected(x_BND, after, after, scores_BP, None, into_BP)
        index_BN = with_prefix(best_Bk[:, :-1].sort(dim=1).values, prefix)
        del best_Bk
        rows_BN = torch.cat([index_BN, last_B1], dim=1)
        if kept.rows_BN is not None:
            rows_BN = kept.rows_BN.gather(1, rows_BN)
        x_BND = torch.cat([take(x_BND, index_BN), fused_B1D], dim=1)
        after = Kept(rows_BN=rows_BN)
        return Selected(x_BND, after, after, scores_BP, None, into_BP)

    def _into(self, best_Bk: Tensor, last_B1: Tensor, patches: int, kept: Kept) -> Tensor:
        """(B, P) rows of the tokens that patches go into: their own, or that of the fused one."""
        prefix = self.num_prefix_tokens
        into_BP = last_B1.expand(-1, patches).scatter(1, best_Bk, best_Bk + prefix)
        return into_BP if kept.rows_BN is None else kept.rows_BN.gather(1, into_BP)

    @classmethod
    def cost(cls, dim: int, *, before: int, keep: int, frame: SelectionFrame) -> LayerCost:
        tokens, left = before + frame.num_prefix_tokens, keep + frame.num_prefix_tokens
        held = tokens * dim + tokens + (2 * tokens if frame.again else 0)  # attention, rows
        ordering = 2 * keep + dim + 2 + 4 * max(keep - 1, left - 1)
        joining = (
            dim + 2 + 2 * (left - 1) + max(4 * left if frame.again else 0, 2 * left + (2 * left - 1) * dim)
        )
        return LayerCost(before * dim, 0, held + max(2 * keep + before + dim, ordering, joining))

    @classmethod
    def refusal(cls, keep: int, before: int, grid: Grid) -> str | None:
        if keep > 1:
            return None
        return "one token is the others fused, so that nothing would be kept. Keep at least 2."


class MergeSelection(Selection):
    """Merges the most similar tokens, in as many rounds as it takes: one round halves them at most."""

    word = "merge"
    asks = "keys"
    has_mask = False
    has_sizes = True

    def forward(
        self,
        x_BND: Tensor,
        kept: Kept | None = None,
        told: Tensor | None = None,
        *,
        masked: bool = False,
        grouping: bool = False,
    ) -> Selected:
        assert told is not None
        prefix, kept = self.num_prefix_tokens, kept or Kept()
        sizes_BP = kept.weights_BP(prefix)
        with torch.no_grad():  # which tokens go together is no function to learn
            match = merge_down(told.detach(), sizes_BP, self.keep)
        weights_BkP, sizes_Bk = shares(match.into_BP, self.keep, sizes_BP, x_BND.dtype)
        merged_BkD = weights_BkP @ x_BND[:, prefix:]
        del weights_BkP
        x_BND = torch.cat([x_BND[:, :prefix], merged_BkD], dim=1)
        del merged_BkD
        rows_BN = with_prefix(match.index_Bk, prefix)
        if kept.rows_BN is not None:
            rows_BN = kept.rows_BN.gather(1, rows_BN)
        after = Kept(rows_BN=rows_BN, log_size_BN=functional.pad(sizes_Bk.log(), (prefix, 0)))
        into_BP = rows_BN[:, prefix:].gather(1, match.into_BP) if grouping else None
        return Selected(x_BND, after, after, match.scores_BP, None, into_BP)

    @classmethod
    def cost(cls, dim: int, *, before: int, keep: int, frame: SelectionFrame) -> LayerCost:
        tokens, left, wide = before + frame.num_prefix_tokens, keep + frame.num_prefix_tokens, frame.head_dim
        held = tokens * (dim + wide) + (3 * tokens + before if frame.again else 0)  # keys; rows and sizes
        macs, peak, match, ones = keep * before * dim, 0, 0, 0 if frame.again else before
        now, beside = before, 0  # tokens in a round, and what earlier rounds left
        while now > keep:
            fewer, odd = min(now - keep, now // 2), now // 2
            macs += odd * (now - odd) * wide
            finding = max(
                now + now * wide, now * wide + 3 * odd + max(odd * (now - odd), now), 9 * now + 2 * fewer
            )
            found, after = 5 * now, now - fewer  # numbers are 64-bit integers
            joining = found + 2 * before + 2 * after if match else found
            peak = max(peak, match + beside + max(finding, joining))
            match = 3 * before + 2 * after if match else found
            if after > keep:
                macs += after * now * wide
                found = 0 if now == before else found
                sharing = found + beside + (ones if now == before else 0) + after * now + after
                means = after * now + after + after * wide + (0 if now == before else now * wide)
                peak = max(peak, match + sharing, match + means)
                beside = after + after * wide
            now = after
        sharing = max(ones + keep * before + keep, keep * before + keep + keep * dim)
        joined = keep + left * dim + max(keep * dim, 4 * left)
        return LayerCost(macs, 0, held + max(peak, match + max(sharing, joined)))


class PoolSelection(Selection):
    """The mean of 2 x 2 patches, on a whole grid of even sides."""

    word = "pool"
    has_mask = False

    def forward(
        self,
        x_BND: Tensor,
        kept: Kept | None = None,
        told: Tensor | None = None,
        *,
        masked: bool = False,
        grouping: bool = False,
    ) -> Selected:
        prefix, kept = self.num_prefix_tokens, kept or Kept()
        height, width = pooled(self.grid, 4 * self.keep)
        step = self.grid[0] // height
        squares = x_BND[:, prefix:].unflatten(1, (height, 2, width, 2))
        x_BND = torch.cat([x_BND[:, :prefix], squares.mean((2, 4)).flatten(1, 2)], dim=1)
        del squares
        rows, cols = (torch.arange(side, device=x_BND.device) * step for side in (height, width))
        place_k = (rows.unsqueeze(1) * self.grid[1] + cols).flatten()
        rows_BN = with_prefix(place_k.expand(x_BND.shape[0], -1), prefix)
        into_BP = None
        if grouping:
            square = torch.arange(self.keep, device=x_BND.device).view(height, 1, width, 1)
            into_BP = rows_BN[:, prefix:][:, square.expand(height, 2, width, 2).flatten()]
        after = Kept(rows_BN=rows_BN)
        return Selected(x_BND, after, after, None, None, into_BP)

    @classmethod
    def cost(cls, dim: int, *, before: int, keep: int, frame: SelectionFrame) -> LayerCost:
        tokens, left = before + frame.num_prefix_tokens, keep + frame.num_prefix_tokens
        height, width = pooled(frame.grid, before)
        held = tokens * dim + (2 * tokens if frame.again else 0) + left * dim
        return LayerCost(0, 0, held + max(keep * dim, 2 * (height + width + keep) + 4 * left))

    @classmethod
    def refusal(cls, keep: int, before: int, grid: Grid) -> str | None:
        step = isqrt(prod(grid) // before)  # of earlier pooling
        if any(side // step % 2 for side in grid):
            now = size_text((grid[0] // step, grid[1] // step))
            return f"2 x 2 are pooled, and {now} patches have an odd side. Use another grid."
        if 4 * keep != before:
            return f"2 x 2 are pooled, which leaves the quarter. Use {before // 4}."
        return None


def pooled(grid: Grid, before: int) -> Grid:
    """Rows and columns behind pooling of `before` tokens, of patches of a grid."""
    step = 2 * isqrt(prod(grid) // before)
    return grid[0] // step, grid[1] // step


class Match(NamedTuple):
    """Which tokens become one.

    Attributes:
        into_BP: the number of the token, among those that go on, that each becomes part of.
        index_Bk: of each token that goes on, the number of the one that the others came to; rising.
        scores_BP: of those that may go elsewhere, minus their similarity to the nearest one there; 1 of the others.
    """

    into_BP: Tensor
    index_Bk: Tensor
    scores_BP: Tensor

    def then(self, later: Match) -> Match:
        """Both, one after the other."""
        into_BP = later.into_BP.gather(1, self.into_BP)
        return Match(into_BP, self.index_Bk.gather(1, later.index_Bk), self.scores_BP)


def merge_down(keys_BPK: Tensor, sizes_BP: Tensor | None, keep: int) -> Match:
    """Which tokens become one so that `keep` are left, in rounds; merged ones go by the mean of their keys."""
    match = None
    while True:
        before = keys_BPK.shape[1]
        found = matched(keys_BPK, min(before - keep, before // 2))
        match = found if match is None else match.then(found)
        left = found.index_Bk.shape[1]
        if left == keep:
            return match
        weights_BkP, sizes_BP = shares(found.into_BP, left, sizes_BP, keys_BPK.dtype)
        del found
        keys_BPK = weights_BkP @ keys_BPK
        del weights_BkP


def matched(keys_BPK: Tensor, fewer: int) -> Match:
    """Bipartite soft matching: `fewer` tokens of odd number each join the nearest one of even number.

    They are those whose nearest one is most similar, by the cosine of their keys.
    """
    patches, device = keys_BPK.shape[1], keys_BPK.device
    keys_BPK = functional.normalize(keys_BPK, dim=-1)
    best_BO, to_BO = (keys_BPK[:, 1::2] @ keys_BPK[:, ::2].transpose(1, 2)).max(2)
    scores_BP = torch.ones_like(keys_BPK[..., 0])
    del keys_BPK
    scores_BP[:, 1::2] = -best_BO
    joins_BF = best_BO.topk(fewer, dim=1).indices
    to_BF = 2 * to_BO.gather(1, joins_BF)
    del best_BO, to_BO
    joins_BF = 2 * joins_BF + 1
    place_BP = torch.arange(patches, device=device).expand(joins_BF.shape[0], -1)
    number_BP = torch.ones_like(place_BP).scatter_(1, joins_BF, 0).cumsum_(1).sub_(1)
    into_BP = number_BP.scatter(1, joins_BF, number_BP.gather(1, to_BF))
    del to_BF
    # Who joins another writes behind the end, which is cut off.
    number_BP.scatter_(1, joins_BF, patches - fewer)
    index_BP = torch.zeros_like(place_BP).scatter_(1, number_BP, place_BP)
    return Match(into_BP, index_BP[:, : patches - fewer], scores_BP)


def shares(into_BP: Tensor, keep: int, sizes_BP: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, k, P): each token's share of those that go on, by its size, and the sizes of these, (B, k)."""
    into_B1P = into_BP.unsqueeze(1)
    sizes_B1P = torch.ones_like(into_B1P, dtype=dtype) if sizes_BP is None else sizes_BP.unsqueeze(1)
    weights_BkP = sizes_B1P.new_zeros(into_BP.shape[0], keep, into_BP.shape[1]).scatter_(
        1, into_B1P, sizes_B1P
    )
    sizes_Bk1 = weights_BkP.sum(2, keepdim=True)
    return weights_BkP.div_(sizes_Bk1), sizes_Bk1.squeeze(2)
