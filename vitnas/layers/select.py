"""Selections: what stands in front of a block that fewer patches enter. `selectors.py` names them all.

A `Choosing` one (`choose.py`) scores the patches that are left, and the `keep` best of them go on; prefix tokens always
do. In evaluation and in exported files the others are gone: a top-k of constant k, then a gather, in the order of the
patches. A masked pass, as in training, carries all tokens along and tells attention and pooling which are kept, so both
give the same numbers. Others (`merge.py`) make fewer tokens out of those that come.

Shapes: B images, N tokens, P patches, D dim, k patches kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vitnas.grids import Grid
from vitnas.layers.axes import Axes
from vitnas.layers.cost import LayerCost

MASK_EPS = 1e-6  # keeps a row finite in which attention has nothing left, as in DynamicViT's code
OF_CHOICES = (
    "keep",
    "scores",
    "groups",
    "shares",
)  # outputs that are read off the choices, see `model/outputs.py`

Asked = Literal["none", "class", "all", "keys"]
"""What a block tells the selection behind it: nothing, how much attention patches got from the class token or from all
tokens, (B, P), or the patches' keys, mean over heads, (B, P, K)."""


class Kept(NamedTuple):
    """Which tokens of a stage's grid are left.

    `rows_BN` are the numbers of those that are there, rising, prefix tokens included (None: all are there). `mask_BN`
    is 1, or True, for those kept, in a pass that carries the dropped ones along (None: all that are there are kept).
    `log_size_BN` is the logarithm of how many patches each stands for (None: all count alike).
    """

    rows_BN: Tensor | None = None
    mask_BN: Tensor | None = None
    log_size_BN: Tensor | None = None

    def weights_BP(self, prefix: int) -> Tensor | None:
        """How much each patch counts in a mean; None: all alike."""
        if self.log_size_BN is not None:
            return self.log_size_BN[:, prefix:].exp()
        return None if self.mask_BN is None else self.mask_BN[:, prefix:]


class Picked(NamedTuple):
    """Which tokens of its input a block works on and gives, where the others are among its keys and values too.

    `index_BN` counts the tokens that came, `rows_BN` those of the stage's grid; `index_BN` is None where the tokens
    before the patches alone go on.
    """

    index_BN: Tensor | None
    rows_BN: Tensor

    def of(self, x_BND: Tensor) -> Tensor:
        """These tokens of all that came."""
        if self.index_BN is None:
            return x_BND[:, : self.rows_BN.shape[1]]
        return take(x_BND, self.index_BN)


class Selected(NamedTuple):
    """What a selection leaves.

    Attributes:
        x_BND: the tokens that enter the block.
        entering: which they are.
        after: which go on behind the block.
        scores_BP: what every patch that was left scored, of a kind that scores.
        picked: those of the tokens that the block gives; None: all.
        into_BP: where asked for, the number on the grid (prefix tokens included) of the token that each patch goes
            into; None: each that is kept is its own.
    """

    x_BND: Tensor
    entering: Kept
    after: Kept
    scores_BP: Tensor | None
    picked: Picked | None = None
    into_BP: Tensor | None = None


class Choice(NamedTuple):
    """One selection's scores, which patches it had them of, which it kept, what went into which, and how many tokens it
    keeps in evaluation."""

    scores_BP: Tensor | None
    before: Kept
    after: Kept
    into_BP: Tensor | None
    keep: int

    def keep_on(self, like: Tensor, patches: int, prefix: int) -> Tensor:
        """(B, patches) of the whole grid: 1 where a token that goes on has its place, with the gradient of a decision
        in training. `like` says how many images, and the type."""
        if self.after.mask_BN is not None:
            return self.after.mask_BN[:, prefix:].to(like.dtype)
        assert self.after.rows_BN is not None
        none = like.new_zeros(len(like), patches)
        return none.scatter(1, self.after.rows_BN[:, prefix:] - prefix, 1.0)

    def scores_on(self, like: Tensor, patches: int, prefix: int) -> Tensor:
        """(B, patches) scores on the whole grid, -inf for patches that were gone before; 0 of a kind that has none."""
        scores_BP, (rows_BN, mask_BN, _) = self.scores_BP, self.before
        if scores_BP is None:
            left = patches if rows_BN is None else rows_BN.shape[1] - prefix
            scores_BP = like.new_zeros(len(like), left)
        if rows_BN is not None:
            gone = scores_BP.new_full((len(like), patches), -torch.inf)
            return gone.scatter(1, rows_BN[:, prefix:] - prefix, scores_BP)
        if mask_BN is not None:
            return scores_BP.masked_fill(mask_BN[:, prefix:] == 0, -torch.inf)
        return scores_BP

    def places_on(self, like: Tensor, patches: int, prefix: int) -> Tensor:
        """(B, patches): the place of the token that a token at a place goes into, -1 where none was or it is gone."""
        place_1P = torch.arange(patches, device=like.device).unsqueeze(0)
        if self.into_BP is None:
            return place_1P.where(self.keep_on(like, patches, prefix) > 0, -1)
        gone = place_1P.new_full((len(like), patches), -1)
        rows_BN = self.before.rows_BN
        here_BP = place_1P.expand(len(like), -1) if rows_BN is None else rows_BN[:, prefix:] - prefix
        return gone.scatter(1, here_BP, self.into_BP.expand_as(here_BP) - prefix)

    def shares_on(self, like: Tensor, patches: int, prefix: int) -> Tensor:
        """(B,) the share of the whole grid that is kept in evaluation."""
        return like.new_full((len(like),), self.keep / patches, dtype=torch.float32)


def groups(choices: Sequence[Choice], like: Tensor, patches: int, prefix: int) -> list[Tensor]:
    """Per selection (B, patches): the place of the token that each patch of the grid is in from there on, or -1."""
    found: list[Tensor] = []
    for choice in choices:
        place_BP = choice.places_on(like, patches, prefix)
        if found:
            place_BP = place_BP.gather(1, found[-1].clamp(min=0)).where(found[-1] >= 0, -1)
        found.append(place_BP)
    return found


@dataclass(slots=True)
class Trail:
    """What selections leave behind in one pass through the blocks; their choices only where somebody wants them."""

    kept: Kept | None = None
    entering: Kept | None = None  # what a block is given, of which it gives those `picked`
    picked: Picked | None = None
    told: Tensor | None = None  # by the block before, see `Asked`
    choices: list[Choice] | None = None

    def enter(self) -> tuple[Kept | None, Picked | None]:
        """What the next block is given, which nobody needs to hold but it."""
        given, self.entering, self.picked = (self.entering, self.picked), None, None
        return given

    def select(self, selection: Any, x_BND: Tensor, *, masked: bool) -> Tensor:
        """Let `selection` choose, or merge; the tokens that enter the block behind it."""
        before, wants = self.kept, self.choices is not None
        found: Selected = selection(x_BND, before, self.told, masked=masked, grouping=wants)
        x_BND, self.entering, self.kept, scores_BP, self.picked, into_BP = found
        self.told = None
        if self.choices is not None:
            self.choices.append(Choice(scores_BP, before or Kept(), self.kept, into_BP, selection.keep))
        return x_BND

    def told_by_choices(self, name: str, like: Tensor, patches: int, prefix: int) -> Tensor:
        """(B, S, patches): the output of that name, one of OF_CHOICES."""
        choices, on = self.choices or (), (like, patches, prefix)
        if name == "groups":
            return torch.stack(groups(choices, *on), dim=1)
        return torch.stack([getattr(choice, f"{name}_on")(*on) for choice in choices], dim=1)

    def places(self, x_BND: Tensor, prefix: int) -> Tensor:
        """(B, P) numbers on the grid of the patches among the tokens."""
        if self.kept is not None and self.kept.rows_BN is not None:
            return self.kept.rows_BN[:, prefix:] - prefix
        return torch.arange(x_BND.shape[1] - prefix, device=x_BND.device).expand(x_BND.shape[0], -1)


class Selection(nn.Module, ABC):
    """Lets `keep` patch tokens go on, of those that are left.

    Args:
        dim: width of the tokens.
        keep: patch tokens that go on.
        grid: rows and columns of the stage's patches.
        num_prefix_tokens: tokens before the patches, which always go on.
    """

    word: ClassVar[str]  # an Arch's word for it
    asks: ClassVar[Literal["nothing", "attention", "keys"]] = "nothing"  # of the block before
    has_mask: ClassVar[bool] = True  # can carry along what it drops; what cannot drops in training too
    masks_training: ClassVar[bool] = True  # carries it along in training, where nobody says otherwise
    has_sizes: ClassVar[bool] = False  # its tokens stand for different numbers of patches
    of_one_grid: ClassVar[bool] = False  # has something for each place of the grid
    keeps_keys: ClassVar[bool] = False  # what leaves still gives the block behind keys and values
    learns_scores: ClassVar[bool] = False  # its weights learn from its scores alone

    def __init__(self, dim: int, keep: int, *, grid: Grid, num_prefix_tokens: int) -> None:
        super().__init__()
        self.keep, self.grid, self.num_prefix_tokens = keep, grid, num_prefix_tokens

    def axes(self) -> dict[str, Axes]:
        """Named axes of all parameters."""
        return {}

    def set_grid(self, grid: Grid, keep: int) -> None:
        """Keep `keep` patches of images of another grid from now on."""
        self.grid, self.keep = grid, keep

    @abstractmethod
    def forward(
        self,
        x_BND: Tensor,
        kept: Kept | None = None,
        told: Tensor | None = None,
        *,
        masked: bool = False,
        grouping: bool = False,
    ) -> Selected:
        """The tokens that go on.

        Args:
            kept: what earlier selections left.
            told: what the block before told, for kinds that ask.
            masked: carry all tokens along, with a mask, if the kind can.
            grouping: also say what goes into which.
        """

    @classmethod
    @abstractmethod
    def cost(cls, dim: int, *, before: int, keep: int, frame: SelectionFrame) -> LayerCost:
        """Of keeping `keep` of `before` patches, memory with the input."""

    @classmethod
    def asked(cls, *, class_token: bool) -> Asked:
        """What it asks of the block before, in a network that has a class token or none."""
        if cls.asks == "attention":
            return "class" if class_token else "all"
        return "keys" if cls.asks == "keys" else "none"

    @classmethod
    def refusal(cls, keep: int, before: int, grid: Grid) -> str | None:
        """Why it cannot keep `keep` of `before` patches, fewer than those, of a stage with that grid: the rule and the
        remedy."""
        return None


def carried(selections: Iterable[Any], *, training: bool, asked: bool | None) -> bool:
    """Whether these carry along what they drop; `asked` by hand, or None."""
    kinds = [*selections]
    if not all(kind.has_mask for kind in kinds):
        return False
    return (training and any(kind.masks_training for kind in kinds)) if asked is None else asked


class SelectionFrame(NamedTuple):
    """What a selection's cost depends on besides the width and the patches before and behind."""

    grid: Grid
    num_prefix_tokens: int
    head_dim: int  # of the block before
    again: bool  # not all of the grid's patches were left
    sized: bool = False  # those that were left stand for different numbers of patches


class Choosing(Selection):
    """Keeps the patches with the largest scores."""

    @abstractmethod
    def score(self, x_BPD: Tensor, kept: Kept, told: Tensor | None) -> Tensor:
        """(B, P, D) patches that are there to their (B, P) scores; the largest are kept."""

    def decide(self, scores_BP: Tensor, mask_BP: Tensor | None) -> Tensor:
        """The (B, P) mask of a masked pass: the patches kept, among those that were."""
        if mask_BP is not None:
            scores_BP = scores_BP.masked_fill(mask_BP == 0, -torch.inf)
        none = torch.zeros_like(scores_BP, dtype=torch.bool)
        return none.scatter(1, scores_BP.topk(self.keep, dim=1).indices, True)

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
        scores_BP = self.score(x_BND[:, prefix:], kept, told)
        if masked:
            mask_BP = self.decide(scores_BP, None if kept.mask_BN is None else kept.mask_BN[:, prefix:])
            ones = mask_BP.new_ones(mask_BP.shape[0], prefix)
            after = Kept(mask_BN=torch.cat([ones, mask_BP], dim=1))
            return Selected(x_BND, kept if self.keeps_keys else after, after, scores_BP)
        picked = self.pick(x_BND, kept, scores_BP)
        after = Kept(rows_BN=picked.rows_BN)
        if self.keeps_keys:
            return Selected(x_BND, kept, after, scores_BP, picked)
        return Selected(picked.of(x_BND), after, after, scores_BP)

    def pick(self, x_BND: Tensor, kept: Kept, scores_BP: Tensor) -> Picked:
        """The tokens that go on, in the order of the patches."""
        index_BN = with_prefix(
            scores_BP.topk(self.keep, dim=1).indices.sort(dim=1).values, self.num_prefix_tokens
        )
        return Picked(index_BN, index_BN if kept.rows_BN is None else kept.rows_BN.gather(1, index_BN))

    @classmethod
    def cost(cls, dim: int, *, before: int, keep: int, frame: SelectionFrame) -> LayerCost:
        macs, params, scoring = cls.scoring_cost(dim, before, again=frame.again)
        tokens, left = before + frame.num_prefix_tokens, keep + frame.num_prefix_tokens
        rows = 2 * tokens if frame.again else 0  # 64-bit integers
        # Places, sorted places with their order, and tokens' numbers are 64-bit integers.
        taking = 2 * left + (2 * left if frame.again else 0)
        taking += 0 if cls.keeps_keys else left * dim  # or the block takes them
        scores = cls.scores_memory(before, frame)
        picking = scores + max(6 * keep, 4 * left, taking)
        return LayerCost(macs, params, tokens * dim + rows + max(scoring, picking))

    @staticmethod
    def scoring_cost(dim: int, before: int, *, again: bool) -> LayerCost:
        """Of `score`, memory besides the input."""
        return LayerCost(0, 0, 0)

    @staticmethod
    def scores_memory(before: int, frame: SelectionFrame) -> int:
        """Elements of the scores while the best are picked."""
        return before


def with_prefix(index_Bk: Tensor, prefix: int) -> Tensor:
    """(B, N) numbers of tokens: all prefix tokens, then those of patches counted from 0."""
    index_Bk = index_Bk + prefix
    first = index_Bk[:, :1] * 0 + torch.arange(prefix, device=index_Bk.device)  # exporters keep its batch
    return torch.cat([first, index_Bk], dim=1)


def take(x_BND: Tensor, index_BN: Tensor) -> Tensor:
    """The tokens of these numbers."""
    return x_BND.gather(1, index_BN.unsqueeze(-1).expand(-1, -1, x_BND.shape[2]))


def masked_mean(x_BPD: Tensor, mask_BP: Tensor) -> Tensor:
    """(B, D) mean over the patches that are kept, or weighted by how much each counts; 0 where none is."""
    mask_BP1 = mask_BP.unsqueeze(-1).to(x_BPD.dtype)
    mean: Tensor = (x_BPD * mask_BP1).sum(1) / mask_BP1.sum(1).clamp(min=1)
    return mean


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis where entries count as much as `mask` says (0 to 1); differentiable in the mask.

    DynamicViT's: the row's maximum is taken over all entries, and MASK_EPS keeps a row finite that has nothing left.
    """
    weights = _masked_weights(scores, mask)
    return (weights + MASK_EPS / scores.shape[-1]) / (weights.sum(-1, keepdim=True) + MASK_EPS)


def masked_attention(scores_BANN: Tensor, mask_B1NN: Tensor, v_BANK: Tensor) -> Tensor:
    """`masked_softmax(scores, mask) @ v`, divided behind the product: N x N numbers are gone through less often."""
    weights_BANN = _masked_weights(scores_BANN, mask_B1NN)
    sums_BAN1 = weights_BANN.sum(-1, keepdim=True) + MASK_EPS
    means_BA1K = MASK_EPS * v_BANK.mean(2, keepdim=True)
    return ((weights_BANN.to(v_BANK.dtype) @ v_BANK + means_BA1K) / sums_BAN1).to(v_BANK.dtype)


def _masked_weights(scores: Tensor, mask: Tensor) -> Tensor:
    """What a masked softmax divides by its sums, in float32 at least."""
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return (wide - wide.detach().amax(-1, keepdim=True)).exp() * mask


def sees(mask_BN: Tensor) -> Tensor:
    """(B, 1, N, N): how much token i (third axis) sees of token j: what is kept, and itself."""
    mask_B11N = mask_BN[:, None, None]
    eye_NN = torch.eye(mask_BN.shape[1], dtype=mask_BN.dtype, device=mask_BN.device)
    if mask_BN.dtype == torch.bool:
        return mask_B11N | eye_NN
    return mask_B11N + (1 - mask_B11N) * eye_NN
