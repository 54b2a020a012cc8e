"""Patch Slimming: which patches each block of a trained network can do without, found from the last block to the first.

Tang et al., "Patch Slimming for Efficient Vision Transformers" (CVPR 2022, arXiv 2106.02852), algorithm 1. Block t
begins with the patches that block t + 1 gives. It takes those of the others with the highest scores
(`patch_scores.py`), `step` at a time, until what block t + 1 gives of its own patches is within a tolerance of what it
gives in the whole network. Every candidate may be followed by some fine-tuning of block t, whose inputs and targets are
those of the whole network and computed once: a step costs two blocks, not the network. Keys and values are of what the
block before gives.

What the paper leaves open is in PAPERS.md. Patches are either the same in all images (PS), or as many of them in each
image, by a score that a small network predicts (DPS, `patch_prediction.py`).

Shapes: B images, N tokens, n tokens that a block gives, D dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.errors import UserError, check_word
from vitnas.model import Model
from vitnas.model.modes import evaluating
from vitnas.model.selections import selecting, with_places
from vitnas.model.timm_keys import from_timm
from vitnas.slimming.images import Images, pairs_of
from vitnas.slimming.patch_prediction import Prediction, predicting
from vitnas.slimming.patch_scores import Blocks, Streams, mean_scores

ErrorKind = Literal["relative", "mse", "sum"]
BISECTIONS = 14
CLOSE = 0.01  # of the budget: near enough
LEAST = 1e-9  # of the largest error: the lowest tolerance that is tried


@dataclass(frozen=True, kw_only=True)
class BlockTuning:
    """Fine-tuning of a block towards what the whole network gives, by AdamW. `lr` is constant.

    Args:
        epochs: passes over the images per candidate, 3 in the paper.
    """

    epochs: int = 3
    lr: float = 1e-4
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "lr"):
            if getattr(self, name) <= 0:
                raise UserError(
                    f"tuning.{name} is {getattr(self, name)}; it must be above 0. Use tuning=None for none."
                )


class Tried(NamedTuple):
    """A candidate: patches added to those of the block behind, tokens that the block gives, error after tuning."""

    block: int
    added: int
    tokens: int
    error: float


@dataclass(frozen=True)
class Slimmed:
    """A network that gives fewer patches from block to block.

    Args:
        model: the network; its Arch says how many patches each block gives.
        places: per block the numbers on the grid of the patches that it gives, as found for all images together.
        errors: per block, of what the block behind gives; 0 for the last.
        tolerance: what they were held to.
        tried: all candidates, in order.
    """

    model: Model
    places: tuple[Tensor, ...]
    errors: tuple[float, ...]
    tolerance: float
    tried: tuple[Tried, ...]


def slim_patches(
    network: nn.Module,
    images: Images,
    *,
    budget: Budget | str | None = None,
    tolerance: float | None = None,
    dynamic: bool | Prediction = False,
    step: int = 10,
    error: ErrorKind = "relative",
    tuning: BlockTuning | None = None,
    seed: int = 0,
    memory_bytes: float = 2e9,
) -> Slimmed:
    """A copy of `network` that gives fewer patches from block to block (Patch Slimming), to a budget or a tolerance.

    With a budget the tolerance is found by bisection, without fine-tuning; then every block is tuned once, at the
    patches found. With a tolerance every candidate is tuned, as in the paper. Train the whole network afterwards, by
    `fit` or `vitnas retrain`.

    Args:
        network: a Model, or a timm ViT that an Arch can say. It is left as it is, and must be on the device to work on.
        images: batches of normalised images, with or without targets; some hundreds are enough to score by.
        budget: for example "macs<=55%".
        tolerance: the largest error of a block.
        dynamic: choose the patches of every image by a predicted score (DPS) instead of the same places in all (PS);
            a `Prediction` says how the score is learned.
        step: patches added from candidate to candidate, 10 in the paper; fewer use a budget better and take longer.
        error: "relative" to the energy of what should come out, the mean square ("mse"), or the plain sum of squares
            over all images ("sum"; the paper's, whose tolerance means another thing for every network and number of
            images).
        tuning: of single blocks; None for none.
        seed: of the order of batches in tuning.
        memory_bytes: about how much of the main memory the blocks' inputs may take.

    Raises:
        UserError: neither or both of budget and tolerance, a budget that cannot be met, a network that cannot be
            slimmed so (see `Blocks`), or no images.
    """
    if (budget is None) == (tolerance is None):
        raise UserError(
            f"budget is {budget and str(budget)!r} and tolerance {tolerance}; one of them says how far patches are "
            "slimmed. Give budget='macs<=55%', or tolerance=0.02."
        )
    model = (
        network if isinstance(network, Model) else from_timm(network).to(next(network.parameters()).device)
    )
    with evaluating(model):
        slimming = PatchSearch(
            model,
            [given for given, _ in pairs_of(images, model)],
            step=step,
            error=error,
            seed=seed,
            memory_bytes=memory_bytes,
        )
        selector = "dynamic_patch_slimming" if dynamic else "patch_slimming"
        if budget is None:
            found = slimming.search(0.0 if tolerance is None else tolerance, tuning)
        else:
            asked = Budget.parse(budget) if isinstance(budget, str) else budget
            found = slimming.within(asked.resolved(count(model.arch)), selector, tuning)
        if not dynamic:
            return found
        return slimming.predicting(found, dynamic if isinstance(dynamic, Prediction) else None)


class PatchSearch:
    """The search, on one network and its images; `slim_patches` says what the arguments are."""

    def __init__(
        self,
        model: Model,
        images: Sequence[Tensor],
        *,
        step: int = 10,
        error: ErrorKind = "relative",
        seed: int = 0,
        memory_bytes: float = 2e9,
    ) -> None:
        check_word("error", error, get_args(ErrorKind))
        if step < 1:
            raise UserError(
                f"step is {step}; a candidate has at least 1 patch more than the one before. Use 10."
            )
        self.blocks, self.step, self.error, self.seed = Blocks(model), step, error, seed
        self.streams = Streams(self.blocks, images, memory_bytes)
        self._known: dict[tuple[tuple[int, ...], ...], Known] = {}

    def search(self, tolerance: float, tuning: BlockTuning | None = None) -> Slimmed:
        """The patches of every block, so that no error is above the tolerance; tuned after every candidate."""
        if not tolerance >= 0:
            raise UserError(f"tolerance is {tolerance}; an error is at least 0. Use 0.02.")
        blocks = self._working(tuning)
        given, errors, tried = dict[int, Tensor](), dict[int, float](), list[Tried]()
        for index in reversed(range(blocks.first, blocks.depth)):
            if index == blocks.depth - 1 and not blocks.reads_patches:
                given[index], errors[index] = blocks.before_patches, 0.0
                continue
            layer, known = self.layer(blocks, index, given), Known()
            if (
                tuning is None
            ):  # then what comes out depends on the patches behind alone, not on the tolerance
                behind = tuple(tuple(tokens_n.tolist()) for tokens_n in given.values())
                known = self._known.setdefault(behind, known)
            base_n = given.get(index + 1, blocks.before_patches)
            for added, tokens_n in self._candidates(layer, base_n, known):
                if tuning is not None:
                    layer.tune(tokens_n, tuning, self.seed)
                if added not in known.errors:
                    known.errors[added] = layer.error(tokens_n)
                given[index], errors[index] = tokens_n, known.errors[added]
                tried.append(Tried(index, added, len(tokens_n), errors[index]))
                if errors[index] <= tolerance:
                    break
        return self._made(blocks, given, errors, tolerance, tried)

    def within(self, budget: Budget, selector: str, tuning: BlockTuning | None = None) -> Slimmed:
        """What meets the budget at the lowest tolerance; found without tuning, then each block is tuned once.

        Raises:
            UserError: even the fewest patches cost more.
        """
        found = self.search(math.inf)
        if reasons := budget.misses(count(self._arch(found, selector))):
            raise UserError(
                f"with the fewest patches the network still misses the budget: {'; '.join(reasons)}. Raise the budget, "
                "or slim heads, hidden units and blocks too."
            )
        high, low = max(max(found.errors), 1e-30), 0.0
        whole = self.search(low)
        if not budget.misses(count(self._arch(whole, selector))):
            return self.tuned(whole, tuning)
        low = high * LEAST
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            now = self.search(middle)
            if budget.misses(count(self._arch(now, selector))):
                low = middle
                continue
            high, found = middle, now
            if _nearly_full(budget, count(self._arch(now, selector)).macs):
                break
        return self.tuned(found, tuning)

    def tuned(self, found: Slimmed, tuning: BlockTuning | None) -> Slimmed:
        """`found` with every block tuned once at its patches, the last ones first."""
        if tuning is None:
            return found
        blocks, errors, given = self._working(tuning), dict[int, float](), dict[int, Tensor]()
        for index in reversed(range(blocks.first, blocks.depth)):
            given[index] = blocks.with_prefix(found.places[index])
            if index == blocks.depth - 1 and not blocks.reads_patches:
                errors[index] = 0.0
                continue
            layer = self.layer(blocks, index, given)
            layer.tune(given[index], tuning, self.seed)
            errors[index] = layer.error(given[index])
        return self._made(blocks, given, errors, found.tolerance, found.tried)

    def predicting(self, found: Slimmed, prediction: Prediction | None = None) -> Slimmed:
        """`found` with as many patches per block, chosen in every image by a score that is predicted from it (DPS)."""
        whole = copy.deepcopy(self.blocks.model)
        whole.load_state_dict(found.model.state_dict(), strict=False)  # but for the places
        given = [self.blocks.with_prefix(places) for places in found.places]
        model = predicting(
            self._arch(found, "dynamic_patch_slimming"),
            Blocks(whole),
            self.streams,
            given,
            prediction or Prediction(seed=self.seed),
        )
        return Slimmed(model, found.places, found.errors, found.tolerance, found.tried)

    def _working(self, tuning: BlockTuning | None) -> Blocks:
        """The blocks to slim: the network's own, or where they are tuned a copy's."""
        if tuning is None:
            return self.blocks
        return Blocks(copy.deepcopy(self.blocks.model))

    def layer(self, blocks: Blocks, index: int, given: Mapping[int, Tensor]) -> Layer:
        """A block at its turn, of `blocks`, where the blocks behind it give these tokens."""
        into = self.streams.into(index)
        if index == blocks.depth - 1:  # the classifier is what stands behind
            head = _pooled(blocks.model)
            after = self.streams.into(blocks.depth)
            with torch.no_grad():
                targets = [head(x_BND.to(blocks.device)).cpu() for x_BND in after]
            return Layer(blocks, index, self.error, into, targets, head)
        behind_n = given[index + 1]
        targets = [x_BND[:, behind_n.cpu()] for x_BND in self.streams.into(index + 2)]

        def behind(x_BnD: Tensor, tokens_n: Tensor) -> Tensor:
            return blocks.run(index + 1, x_BnD, tokens_n, behind_n)

        return Layer(
            blocks, index, self.error, into, targets, behind, [given[i] for i in sorted(given) if i > index]
        )

    def _candidates(self, layer: Layer, base_n: Tensor, known: Known) -> Iterator[tuple[int, Tensor]]:
        """More and more tokens, by their scores, until all are there; how many were added, and the tokens."""
        blocks = self.blocks
        is_there = torch.zeros(len(blocks.all_tokens), dtype=torch.bool, device=blocks.device)
        is_there[base_n] = True
        added, least = 0, 1 if layer.needs_patches else 0
        while len(base_n) + added - blocks.prefix < least:
            added += self.step
        missing = int((~is_there).sum())
        while True:
            added = min(added, missing)
            if added and known.order_N is None:
                known.order_N = (
                    layer.scores().masked_fill(is_there, -torch.inf).argsort(descending=True, stable=True)
                )
            taken = is_there.clone()
            if known.order_N is not None:
                taken[known.order_N[:added]] = True
            yield added, taken.nonzero()[:, 0]
            if added == missing:
                return
            added += self.step

    def _made(
        self,
        blocks: Blocks,
        given: dict[int, Tensor],
        errors: dict[int, float],
        tolerance: float,
        tried: Sequence[Tried],
    ) -> Slimmed:
        all_n = torch.arange(blocks.patches)
        places = tuple(
            (given[index][blocks.prefix :] - blocks.prefix).cpu() if index in given else all_n
            for index in range(blocks.depth)
        )
        for parameter, own in zip(blocks.model.parameters(), self.blocks.model.parameters(), strict=True):
            parameter.requires_grad_(own.requires_grad)
        model = with_places(blocks.model, places)
        told = tuple(errors.get(index, 0.0) for index in range(blocks.depth))
        return Slimmed(model, places, told, tolerance, tuple(tried))

    def _arch(self, found: Slimmed, selector: str) -> Arch:
        arch = found.model.arch
        keeps = {index: block.keep for index, block in enumerate(arch.blocks) if block.keep is not None}
        return selecting(arch, keeps, selector)


@dataclass(eq=False)
class Known:
    """Of a block with certain patches behind it: the order of the others, and errors by how many of these are added."""

    order_N: Tensor | None = None
    errors: dict[int, float] = field(default_factory=dict)


@dataclass(eq=False)
class Layer:
    """A block at its turn: what enters it, what should come out behind it, and how that is computed."""

    blocks: Blocks
    index: int
    error_kind: ErrorKind
    into: Sequence[Tensor]
    targets: Sequence[Tensor]
    behind: Callable[..., Tensor]  # of what the block gives and the tokens that this is of
    given: Sequence[Tensor] = ()  # tokens of each block behind
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        if self.error_kind == "relative":
            self.scale = max(1e-30, float(sum(t.double().square().sum() for t in self.targets)))
        else:
            self.scale = float(sum(t.numel() for t in self.targets)) if self.error_kind == "mse" else 1.0

    @property
    def needs_patches(self) -> bool:
        return not self.given and self.blocks.reads_patches

    def scores(self) -> Tensor:
        """(N,) of all tokens, over all images."""
        blocks, given = self.blocks, self.given
        into = (x_BND.to(blocks.device) for x_BND in self.into)
        return mean_scores(blocks, self.index, into, given)

    def _off(self, batch: int, tokens_n: Tensor) -> Tensor:
        """The sum of squares by which a batch misses its target."""
        blocks = self.blocks
        x_BND, target = self.into[batch].to(blocks.device), self.targets[batch].to(blocks.device)
        x_BnD = blocks.run(self.index, x_BND, blocks.all_tokens, tokens_n)
        return (self.behind(x_BnD, tokens_n) - target).square().sum()

    @torch.no_grad()
    def error(self, tokens_n: Tensor) -> float:
        """Of what comes out behind the block where it gives these tokens."""
        return sum(float(self._off(batch, tokens_n).double()) for batch in range(len(self.into))) / self.scale

    @torch.enable_grad()
    def tune(self, tokens_n: Tensor, tuning: BlockTuning, seed: int) -> None:
        """Train the block, from the weights that it has, where it gives these tokens."""
        blocks = self.blocks
        blocks.model.requires_grad_(False)
        own = [*blocks.model.blocks[self.index].requires_grad_(True).parameters()]
        optimizer = torch.optim.AdamW(own, lr=tuning.lr, weight_decay=tuning.weight_decay)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(tuning.epochs):
            for batch in torch.randperm(len(self.into), generator=generator).tolist():
                optimizer.zero_grad(set_to_none=True)
                (self._off(batch, tokens_n) / self.targets[batch].numel()).backward()
                optimizer.step()


def _pooled(model: Model) -> Callable[..., Tensor]:
    def head(x_BND: Tensor, tokens_n: Tensor | None = None) -> Tensor:
        return model.forward_head(model.norm(x_BND), pre_logits=True)

    return head


def _nearly_full(budget: Budget, macs: int) -> bool:
    limits = [limit.high for limit in budget.limits if limit.quantity == "macs" and limit.high is not None]
    return bool(limits) and macs >= (1 - CLOSE) * min(limits)
