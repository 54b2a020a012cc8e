"""Selections that choose by a score; see `select.py`.

`predictor` is DynamicViT's (Rao et al., arXiv 2106.02034, section 3.2): a small network scores the patches, and in
training draws who is kept, straight through (a whole decision forward, its probability backward). `fixed` keeps the
same places in all images. `attention` keeps what got most of the class token's attention in the block before, or where
there is no class token most of all tokens'. `patch_slimming` and `dynamic_patch_slimming` are Patch Slimming's (Tang et
al., arXiv 2106.02852): what leaves in front of a block still gives that block keys and values. The first keeps the same
places in all images, the second what a small network takes to matter. `random` and `first` are what any other has to
beat.

Shapes: B images, N tokens, P patches, D dim, k patches kept.
"""

from __future__ import annotations

import random
from math import prod

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from vitnas.grids import Grid
from vitnas.layers.axes import Axes
from vitnas.layers.cost import LayerCost
from vitnas.layers.select import Choosing, Kept, Picked, SelectionFrame, masked_mean

TINY = 1e-30  # an exponential variable may come out as 0, whose logarithm is none


class PredictorSelection(Choosing):
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

    def score(self, x_BPD: Tensor, kept: Kept, told: Tensor | None) -> Tensor:
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
    def scoring_cost(dim: int, before: int, *, again: bool) -> LayerCost:
        half, quarter = _halves(dim)
        products = 2 * half * dim + 2 * half * half + half * quarter + 2 * quarter
        # Before and behind an activation, or own and whole features with their mean, apart and joined.
        memory = max(before * (dim + 2 * half), before * 4 * half + half)
        params = products + 2 * dim + 3 * half + quarter + 2
        return LayerCost(before * products, params, memory)


class FixedSelection(Choosing):
    """The same places in all images: a buffer `worth` ranks the patches of the grid.

    It begins as an even spread (any number of the best ones lies all over the grid); who finds better places writes
    them there.
    """

    word = "fixed"
    of_one_grid = True
    worth: Tensor

    def __init__(self, dim: int, keep: int, *, grid: Grid, num_prefix_tokens: int) -> None:
        super().__init__(dim, keep, grid=grid, num_prefix_tokens=num_prefix_tokens)
        self.register_buffer("worth", self.initial_worth(grid))

    def initial_worth(self, grid: Grid) -> Tensor:
        """The ranks to begin with."""
        return even_worth(grid)

    def axes(self) -> dict[str, Axes]:
        return {"worth": (("tokens", len(self.worth)),)}

    def set_grid(self, grid: Grid, keep: int) -> None:
        worth = self.worth.view(1, -1, 1)
        table = resample_abs_pos_embed(worth, [*grid], [*self.grid], num_prefix_tokens=0)
        self.worth = table.flatten().clone()
        super().set_grid(grid, keep)

    def score(self, x_BPD: Tensor, kept: Kept, told: Tensor | None) -> Tensor:
        if kept.rows_BN is None:
            return self.worth.expand(x_BPD.shape[0], -1)
        return self.worth[kept.rows_BN[:, self.num_prefix_tokens :] - self.num_prefix_tokens]

    @staticmethod
    def scoring_cost(dim: int, before: int, *, again: bool) -> LayerCost:
        return LayerCost(0, 0, 3 * before if again else 0)  # places, as 64-bit integers, beside the scores

    @staticmethod
    def scores_memory(before: int, frame: SelectionFrame) -> int:
        return before if frame.again else 0  # those of the whole grid are there before any image


class AttentionSelection(Choosing):
    """What got most attention in the block before. No weights."""

    word = "attention"
    asks = "attention"

    def score(self, x_BPD: Tensor, kept: Kept, told: Tensor | None) -> Tensor:
        assert told is not None
        return told

    @staticmethod
    def scores_memory(before: int, frame: SelectionFrame) -> int:
        return before + frame.num_prefix_tokens  # they are a view of all tokens'


class RandomSelection(FixedSelection):
    """Patches at random: in training others for each image and step, from torch's generator; in evaluation and in
    exported files the same places in all images, so that results repeat (the grid's patches in the order into which
    Python's `random.Random(0)` shuffles them)."""

    word = "random"

    def initial_worth(self, grid: Grid) -> Tensor:
        order = list(range(prod(grid)))
        random.Random(0).shuffle(order)
        return torch.tensor(order, dtype=torch.float32) / len(order)

    def set_grid(self, grid: Grid, keep: int) -> None:
        self.worth = self.initial_worth(grid).to(self.worth)
        Choosing.set_grid(self, grid, keep)

    def score(self, x_BPD: Tensor, kept: Kept, told: Tensor | None) -> Tensor:
        if self.training:
            return torch.rand_like(x_BPD[..., 0])
        return super().score(x_BPD, kept, told)


class FirstSelection(Choosing):
    """First come, first served: of the patches that are left the first ones, row by row."""

    word = "first"

    def score(self, x_BPD: Tensor, kept: Kept, told: Tensor | None) -> Tensor:
        if kept.rows_BN is not None:
            return (-kept.rows_BN[:, self.num_prefix_tokens :]).to(x_BPD.dtype)
        images, patches = x_BPD.shape[:2]
        falling_P = torch.arange(0, -patches, -1, dtype=x_BPD.dtype, device=x_BPD.device)
        return (falling_P - self.num_prefix_tokens).expand(images, -1)

    @staticmethod
    def scoring_cost(dim: int, before: int, *, again: bool) -> LayerCost:
        return LayerCost(0, 0, 3 * before if again else 2 * before)


class PatchSlimming(FixedSelection):
    """Patch Slimming's fixed places, which `vitnas.slimming.patches` finds."""

    word = "patch_slimming"
    keeps_keys = True
    masks_training = False  # a mask would have no gradient


class DynamicPatchSlimming(Choosing):
    """Patch Slimming's scores of every image, predicted by a small network: fewer channels, then one linear layer on a
    patch's own beside the mean over all patches.

    A score is the logarithm of the paper's, up to a number per image. What the network learns from is its `scores`:
    which patches are kept has no gradient.
    """

    word = "dynamic_patch_slimming"
    keeps_keys = learns_scores = True
    masks_training = False

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

    def score(self, x_BPD: Tensor, kept: Kept, told: Tensor | None) -> Tensor:
        mask_BN, own = kept.mask_BN, functional.gelu(self.down(self.norm(x_BPD)))
        mean = own.mean(1) if mask_BN is None else masked_mean(own, mask_BN[:, self.num_prefix_tokens :])
        both = torch.cat([own, mean.unsqueeze(1).expand_as(own)], dim=-1)
        scores_BP1: Tensor = self.worth(both)
        return scores_BP1.squeeze(-1)

    @staticmethod
    def scoring_cost(dim: int, before: int, *, again: bool) -> LayerCost:
        inner = _eighth(dim)
        products = dim * inner + 2 * inner
        # A norm gives mean and deviation too; or scores beside features, own ones and both.
        memory = max(before * (dim + max(2, inner)), before * (3 * inner + 1) + inner)
        return LayerCost(before * products, products + 2 * dim + inner + 1, memory)


class PrefixSelection(Choosing):
    """What every kind does where no patch is kept: the tokens before the patches go on, the last block's queries, and
    the patches still give it keys and values. Without loss where the class token alone is read."""

    word = "prefix"
    keeps_keys = True
    masks_training = False

    def score(self, x_BPD: Tensor, kept: Kept, told: Tensor | None) -> Tensor:
        return x_BPD.new_zeros(1).expand(x_BPD.shape[:2])

    def pick(self, x_BND: Tensor, kept: Kept, scores_BP: Tensor) -> Picked:
        rows_N = torch.arange(self.num_prefix_tokens, device=x_BND.device)
        return Picked(None, rows_N.expand(x_BND.shape[0], -1))

    @classmethod
    def cost(cls, dim: int, *, before: int, keep: int, frame: SelectionFrame) -> LayerCost:
        tokens = before + frame.num_prefix_tokens
        held = tokens * dim + (2 * tokens if frame.again else 0) + (tokens if frame.sized else 0)
        return LayerCost(0, 0, held + 1 + 2 * frame.num_prefix_tokens)


def straight_through(odds_BP: Tensor, noise_BP: Tensor) -> Tensor:
    """1 where `odds_BP + noise_BP` is above 0, else 0; the gradient is that of its sigmoid.

    With `noise_BP` the difference of two Gumbel variables this is the hard Gumbel softmax of two outcomes.
    """
    soft_BP = torch.sigmoid(odds_BP + noise_BP)
    hard_BP = (odds_BP + noise_BP > 0).to(soft_BP.dtype)
    return hard_BP - soft_BP.detach() + soft_BP


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
