"""Selections: what stands in front of a block that fewer patches enter. `SELECTIONS` maps an Arch's word to its class.

Every kind scores the patches that are left, and the `keep` best of them go on; prefix tokens always do. In evaluation
and in exported files the others are gone: a top-k of constant k, then a gather, in the order of the patches. A masked
pass, as in training, carries all tokens along and tells attention and pooling which are kept, so both give the same
numbers.

`predictor` is DynamicViT's (Rao et al., arXiv 2106.02034, section 3.2): a small network scores the patches, and in
training draws who is kept, straight through (a whole decision forward, its probability backward). `fixed` keeps the
same places in all images. `attention` keeps what got most of the class token's attention in the block before, or where
there is no class token most of all tokens'. `patch_slimming` and `dynamic_patch_slimming` are Patch Slimming's (Tang et
al., arXiv 2106.02852): what leaves in front of a block still gives that block keys and values. The first keeps the same
places in all images, the second what a small network takes to matter.

Shapes: B images, N tokens, P patches, D dim, k patches kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from vitnas.grids import Grid
from vitnas.layers.axes import Axes
from vitnas.layers.cost import LayerCost

MASK_EPS = 1e-6  # keeps a row finite in which attention has nothing left, as in DynamicViT's code
TINY = 1e-30  # an exponential variable may come out as 0, whose logarithm is none


Asked = Literal["none", "class", "all"]
"""Whose attention a block tells the selection behind it: nobody's, the class token's, or the mean over all tokens."""


class Kept(NamedTuple):
    """Which tokens of a stage's grid are left.

    `rows_BN` are the numbers of those that are there, rising, prefix tokens included (None: all are there). `mask_BN`
    is 1, or True, for those kept, in a pass that carries the dropped ones along (None: all that are there are kept).
    """

    rows_BN: Tensor | None = None
    mask_BN: Tensor | None = None


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
        return x_BND.gather(1, self.index_BN.unsqueeze(-1).expand(-1, -1, x_BND.shape[2]))


class Selected(NamedTuple):
    """The tokens that enter the block, which they are, which go on behind it, and what every patch that was left
    scored. `picked`: those among them that the block gives; None: all."""

    x_BND: Tensor
    entering: Kept
    after: Kept
    scores_BP: Tensor
    picked: Picked | None = None


class Choice(NamedTuple):
    """One selection's scores, which patches it had them of, which it kept, and how many it keeps in evaluation."""

    scores_BP: Tensor
    before: Kept
    after: Kept
    keep: int

    def keep_on(self, patches: int, prefix: int) -> Tensor:
        """(B, patches) of the whole grid: 1 for those kept, with the gradient of a decision in training."""
        if self.after.mask_BN is not None:
            return self.after.mask_BN[:, prefix:].to(self.scores_BP.dtype)
        assert self.after.rows_BN is not None
        none = self.scores_BP.new_zeros(self.scores_BP.shape[0], patches)
        return none.scatter(1, self.after.rows_BN[:, prefix:] - prefix, 1.0)

    def scores_on(self, patches: int, prefix: int) -> Tensor:
        """(B, patches) scores on the whole grid, -inf for patches that were gone before."""
        if self.before.rows_BN is not None:
            gone = self.scores_BP.new_full((self.scores_BP.shape[0], patches), -torch.inf)
            return gone.scatter(1, self.before.rows_BN[:, prefix:] - prefix, self.scores_BP)
        if self.before.mask_BN is not None:
            return self.scores_BP.masked_fill(self.before.mask_BN[:, prefix:] == 0, -torch.inf)
        return self.scores_BP

    def shares_on(self, patches: int, prefix: int) -> Tensor:
        """(B,) the share of the whole grid that is kept in evaluation."""
        share = self.keep / patches
        return self.scores_BP.new_full((len(self.scores_BP),), share, dtype=torch.float32)


@dataclass(slots=True)
class Trail:
    """What selections leave behind in one pass through the blocks; their choices only where somebody wants them."""

    kept: Kept | None = None
    entering: Kept | None = None  # what a block is given, of which it gives those `picked`
    picked: Picked | None = None
    attention_BP: Tensor | None = None
    choices: list[Choice] | None = None

    def enter(self) -> tuple[Kept | None, Picked | None]:
        """What the next block is given, which nobody needs to hold but it."""
        given, self.entering, self.picked = (self.entering, self.picked), None, None
        return given

    def places(self, x_BND: Tensor, prefix: int) -> Tensor:
        """(B, P) numbers on the grid of the patches among the tokens."""
        if self.kept is not None and self.kept.rows_BN is not None:
            return self.kept.rows_BN[:, prefix:] - prefix
        return torch.arange(x_BND.shape[1] - prefix, device=x_BND.device).expand(x_BND.shape[0], -1)


class Selection(nn.Module, ABC):
    """Keeps `keep` of the patches that are left.

    Args:
        dim: width of the tokens.
        keep: patches that go on.
        grid: rows and columns of the stage's patches.
        num_prefix_tokens: tokens before the patches, which always go on.
    """

    word: ClassVar[str]  # an Arch's word for it
    needs_attention: ClassVar[bool] = False  # goes by that of the block before
    has_scores: ClassVar[bool] = False  # of the whole grid, before any image
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
    def score(self, x_BPD: Tensor, kept: Kept, attention_BP: Tensor | None) -> Tensor:
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
        attention_BP: Tensor | None = None,
        *,
        masked: bool = False,
    ) -> Selected:
        """The tokens that go on.

        Args:
            kept: what earlier selections left.
            attention_BP: how much attention each patch got, for kinds that need it.
            masked: carry all tokens along, with a mask.
        """
        prefix, kept = self.num_prefix_tokens, kept or Kept()
        scores_BP = self.score(x_BND[:, prefix:], kept, attention_BP)
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
        prefix = self.num_prefix_tokens
        index_Bk = scores_BP.topk(self.keep, dim=1).indices.sort(dim=1).values + prefix
        first = index_Bk[:, :1] * 0 + torch.arange(prefix, device=x_BND.device)  # exporters keep its batch
        index_BN = torch.cat([first, index_Bk], dim=1)
        del first, index_Bk
        return Picked(index_BN, index_BN if kept.rows_BN is None else kept.rows_BN.gather(1, index_BN))

    @classmethod
    def cost(cls, dim: int, *, before: int, keep: int, num_prefix_tokens: int, again: bool) -> LayerCost:
        """Of keeping `keep` of `before` patches, memory with the input; `again`: not all of the grid's patches were
        left."""
        macs, params, scoring = cls.scoring_cost(dim, before)
        tokens, left = before + num_prefix_tokens, keep + num_prefix_tokens
        rows = 2 * tokens if again else 0  # 64-bit integers
        # Places, sorted places with their order, and tokens' numbers are 64-bit integers.
        scores = before if again or not cls.has_scores else 0
        taken = (2 * left if again else 0) if cls.keeps_keys else left * dim  # or the block takes them
        picking = scores + max(7 * keep, 4 * keep + 2 * left, 2 * left + taken)
        return LayerCost(macs, params, tokens * dim + rows + max(scoring, picking))

    @staticmethod
    def scoring_cost(dim: int, before: int) -> LayerCost:
        """Of `score`, memory besides the input."""
        return LayerCost(0, 0, 0)


class PredictorSelection(Selection):
    """DynamicViT's predictor: each patch's own features beside the mean over all patches, in four linear layers.

    A score is the log-odds of being kept, the difference of the paper's two log-probabilities.
    """

    word = "predictor"

    def __init__(self, dim: int, keep: int, *, grid: Grid, num_prefix_tokens: int) -> None:
        super().__init__(dim, keep, grid=grid, num_prefix_tokens=num_prefix_tokens)
        half, quarter = _halves(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.embed = nn.Linear(dim, 2 * half)
        self.fc1 = nn.Linear(2 * half, half)
        self.fc2 = nn.Linear(half, quarter)
        self.decision = nn.Linear(quarter, 2)

    def axes(self) -> dict[str, Axes]:
        dim: Axes = (("dim", self.embed.in_features),)
        inner: Axes = (("own_whole", 2), ("predictor_dim", self.fc1.out_features))
        half: Axes = (("predictor_half", self.fc1.out_features),)
        quarter: Axes = (("predictor_quarter", self.fc2.out_features),)
        two: Axes = (("decisions", 2),)
        return {
            "norm.weight": dim,
            "norm.bias": dim,
            "embed.weight": inner + dim,
            "embed.bias": inner,
            "fc1.weight": half + inner,
            "fc1.bias": half,
            "fc2.weight": quarter + half,
            "fc2.bias": quarter,
            "decision.weight": two + quarter,
            "decision.bias": two,
        }

    def score(self, x_BPD: Tensor, kept: Kept, attention_BP: Tensor | None) -> Tensor:
        mask_BN = kept.mask_BN
        own, whole = functional.gelu(self.embed(self.norm(x_BPD))).chunk(2, dim=-1)
        mean = whole.mean(1) if mask_BN is None else masked_mean(whole, mask_BN[:, self.num_prefix_tokens :])
        del whole
        both = torch.cat([own, mean.unsqueeze(1).expand_as(own)], dim=-1)
        del own, mean
        half = self.fc1(both)
        del both
        half = functional.gelu(half)
        quarter = self.fc2(half)
        del half
        quarter = functional.gelu(quarter)
        decision_BP2 = self.decision(quarter)
        return decision_BP2[..., 0] - decision_BP2[..., 1]

    def decide(self, scores_BP: Tensor, mask_BP: Tensor | None) -> Tensor:
        """In training drawn patch by patch, so that `keep` is not met exactly; a patch dropped before stays dropped."""
        if not self.training:
            return super().decide(scores_BP, mask_BP)
        odds_BP = scores_BP.float()  # differences of Gumbel noise: one per outcome
        one_BP, other_BP = (torch.empty_like(odds_BP).exponential_().clamp_(min=TINY).log() for _ in range(2))
        drawn_BP = straight_through(odds_BP, one_BP - other_BP)
        return drawn_BP if mask_BP is None else drawn_BP * mask_BP

    @staticmethod
    def scoring_cost(dim: int, before: int) -> LayerCost:
        half, quarter = _halves(dim)
        products = 2 * half * dim + 2 * half * half + half * quarter + 2 * quarter
        memory = max(dim + 2 * half, 4 * half)  # both before and behind an activation
        params = products + 2 * dim + 3 * half + quarter + 2
        return LayerCost(before * products, params, before * memory + half)


class FixedSelection(Selection):
    """The same places in all images: a buffer `worth` ranks the patches of the grid.

    It begins as an even spread (any number of the best ones lies all over the grid); who finds better places writes
    them there.
    """

    word = "fixed"
    has_scores = True
    worth: Tensor

    def __init__(self, dim: int, keep: int, *, grid: Grid, num_prefix_tokens: int) -> None:
        super().__init__(dim, keep, grid=grid, num_prefix_tokens=num_prefix_tokens)
        self.register_buffer("worth", even_worth(grid))

    def axes(self) -> dict[str, Axes]:
        return {"worth": (("tokens", len(self.worth)),)}

    def set_grid(self, grid: Grid, keep: int) -> None:
        worth = self.worth.view(1, -1, 1)
        table = resample_abs_pos_embed(worth, [*grid], [*self.grid], num_prefix_tokens=0)
        self.worth = table.flatten().clone()
        super().set_grid(grid, keep)

    def score(self, x_BPD: Tensor, kept: Kept, attention_BP: Tensor | None) -> Tensor:
        if kept.rows_BN is None:
            return self.worth.expand(x_BPD.shape[0], -1)
        return self.worth[kept.rows_BN[:, self.num_prefix_tokens :] - self.num_prefix_tokens]


class AttentionSelection(Selection):
    """What got most attention in the block before. No weights."""

    word = "attention"
    needs_attention = True

    def score(self, x_BPD: Tensor, kept: Kept, attention_BP: Tensor | None) -> Tensor:
        assert attention_BP is not None
        return attention_BP


class PatchSlimming(FixedSelection):
    """Patch Slimming's fixed places, which `vitnas.slimming.patches` finds."""

    word = "patch_slimming"
    keeps_keys = True


class DynamicPatchSlimming(Selection):
    """Patch Slimming's scores of every image, predicted by a small network: fewer channels, then one linear layer on a
    patch's own beside the mean over all patches.

    A score is the logarithm of the paper's, up to a number per image. What the network learns from is its `scores`:
    which patches are kept has no gradient.
    """

    word = "dynamic_patch_slimming"
    keeps_keys = learns_scores = True

    def __init__(self, dim: int, keep: int, *, grid: Grid, num_prefix_tokens: int) -> None:
        super().__init__(dim, keep, grid=grid, num_prefix_tokens=num_prefix_tokens)
        inner = _eighth(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.down = nn.Linear(dim, inner)
        self.worth = nn.Linear(2 * inner, 1)

    def axes(self) -> dict[str, Axes]:
        dim: Axes = (("dim", self.down.in_features),)
        inner: Axes = (("slimming_dim", self.down.out_features),)
        one: Axes = (("one", 1),)
        return {
            "norm.weight": dim,
            "norm.bias": dim,
            "down.weight": inner + dim,
            "down.bias": inner,
            "worth.weight": (*one, ("own_whole", 2), *inner),
            "worth.bias": one,
        }

    def score(self, x_BPD: Tensor, kept: Kept, attention_BP: Tensor | None) -> Tensor:
        mask_BN, own = kept.mask_BN, functional.gelu(self.down(self.norm(x_BPD)))
        mean = own.mean(1) if mask_BN is None else masked_mean(own, mask_BN[:, self.num_prefix_tokens :])
        both = torch.cat([own, mean.unsqueeze(1).expand_as(own)], dim=-1)
        scores_BP1: Tensor = self.worth(both)
        return scores_BP1.squeeze(-1)

    @staticmethod
    def scoring_cost(dim: int, before: int) -> LayerCost:
        inner = _eighth(dim)
        products = dim * inner + 2 * inner
        memory = before * max(dim + inner, 2 * inner, 3 * inner + 1) + inner
        return LayerCost(before * products, products + 2 * dim + inner + 1, memory)


class PrefixSelection(Selection):
    """What every kind does where no patch is kept: the tokens before the patches go on, the last block's queries, and
    the patches still give it keys and values. Without loss where the class token alone is read."""

    word = "prefix"
    has_scores = keeps_keys = True

    def score(self, x_BPD: Tensor, kept: Kept, attention_BP: Tensor | None) -> Tensor:
        return x_BPD.new_zeros(1).expand(x_BPD.shape[:2])

    def pick(self, x_BND: Tensor, kept: Kept, scores_BP: Tensor) -> Picked:
        rows_N = torch.arange(self.num_prefix_tokens, device=x_BND.device)
        return Picked(None, rows_N.expand(x_BND.shape[0], -1))

    @classmethod
    def cost(cls, dim: int, *, before: int, keep: int, num_prefix_tokens: int, again: bool) -> LayerCost:
        tokens = before + num_prefix_tokens
        rows = 2 * tokens if again else 0
        return LayerCost(0, 0, tokens * dim + rows + 1 + 2 * num_prefix_tokens)


SELECTIONS: dict[str, type[Selection]] = {
    kind.word: kind
    for kind in (
        PredictorSelection,
        FixedSelection,
        AttentionSelection,
        PatchSlimming,
        DynamicPatchSlimming,
    )
}


def selection_of(selector: str, keep: int) -> type[Selection]:
    """The class that keeps so many patches where an Arch's selector is this word."""
    return SELECTIONS[selector] if keep else PrefixSelection


def straight_through(odds_BP: Tensor, noise_BP: Tensor) -> Tensor:
    """1 where `odds_BP + noise_BP` is above 0, else 0; the gradient is that of its sigmoid.

    With `noise_BP` the difference of two Gumbel variables this is the hard Gumbel softmax of two outcomes.
    """
    soft_BP = torch.sigmoid(odds_BP + noise_BP)
    hard_BP = (odds_BP + noise_BP > 0).to(soft_BP.dtype)
    return hard_BP - soft_BP.detach() + soft_BP


def masked_mean(x_BPD: Tensor, mask_BP: Tensor) -> Tensor:
    """(B, D) mean over the patches that are kept; 0 where none is."""
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


def even_worth(grid: Grid) -> Tensor:
    """A rank from 0 to 1 per patch of the grid, so that the highest ones, however many, lie all over it."""
    rows, cols = (torch.arange(1, side + 1, dtype=torch.float64) for side in grid)
    # Steps of a plane-filling sequence: powers of the root of x^3 = x + 1, the golden ratio of two dimensions.
    ratio = 1.324717957244746
    return ((rows[:, None] / ratio + cols / ratio**2) % 1).flatten().float()


def _halves(dim: int) -> tuple[int, int]:
    """Half and a quarter of `dim`, at least 1."""
    return max(1, dim // 2), max(1, dim // 4)


def _eighth(dim: int) -> int:
    """An eighth of `dim`, at least 1."""
    return max(1, dim // 8)
