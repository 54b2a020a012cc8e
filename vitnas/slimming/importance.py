"""Importance: how much each head, hidden unit, channel and block of a network matters. `IMPORTANCE` is the table.

Sources: Molchanov et al. (arXiv 1906.10771) for Taylor; the spread of an activation times its outgoing weights is
that of variance-based pruning (VBP). Blocks are worth what leaving them out costs (`magnitude` and `random` look at no
images).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.layers.axes import inputs_of as input_axes
from vitnas.layers.axes import named_axes
from vitnas.model import Model
from vitnas.model.features import stage_starts
from vitnas.model.modes import evaluating
from vitnas.slimming.bases import Bases, bases_of
from vitnas.slimming.branches import branches
from vitnas.slimming.elimination import eliminated
from vitnas.slimming.images import LOOKED_AT, Images, pairs_of
from vitnas.slimming.regression import Regression
from vitnas.slimming.streams import Streams

UNITS = ("heads", "hidden", "dim")
"""Axes whose entries can be put in another order without changing what the network computes."""
MOST_IMAGES = 16  # for what leaving out each block costs


@dataclass(frozen=True)
class Scores:
    """How much each unit matters, larger for more; float64 on the CPU.

    Args:
        heads, hidden: per block, of its heads (none where its mixer has none) and of its hidden units.
        width: per stage, of the channels of its stream.
        blocks: of each block.
        bases: per block, of its heads, with the entries that tell most first; None where heads need all of theirs.
    """

    heads: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    width: tuple[Tensor, ...]
    blocks: Tensor
    bases: tuple[Bases | None, ...]


class Importance(Protocol):
    """Scores of a Model from some images."""

    def __call__(self, model: Model, images: Images, generator: torch.Generator) -> Scores: ...


Key = tuple[str, int]  # an axis, and the number of its block, or of its stage for the stream's


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer that sums over units, of which each has as many of its inputs."""

    linear: nn.Linear
    key: Key
    units: int


def readers_of(model: Model) -> list[Reader]:
    """The linear layers of `model` that sum over heads, hidden units or channels of the stream."""
    axes, starts, found = named_axes(model), stage_starts(model.arch), []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or f"{name}.weight" not in axes:
            continue
        inside = input_axes(axes[f"{name}.weight"], module.in_features)
        if not inside or inside[0][0] not in UNITS:
            continue
        axis, size = inside[0]
        part, _, rest = name.partition(".")
        block = int(rest.split(".")[0]) if part == "blocks" else model.arch.depth - 1
        # A reduction reads the stream of the stage before it.
        stage = (
            int(rest.split(".")[0]) if part == "reductions" else sum(start <= block for start in starts) - 1
        )
        found.append(Reader(module, (axis, stage if axis == "dim" else block), size))
    return found


def activation(model: Model, images: Images, generator: torch.Generator) -> Scores:
    """Standard deviation of what a unit gives times the norm of the weights that take it. No labels."""
    readers = readers_of(model)
    spreads = [_Spread() for _ in readers]

    def watch(number: int, x: Tensor) -> Tensor:
        spreads[number].add(x.flatten(0, -2))
        return x

    with _watched(readers, watch), torch.no_grad(), evaluating(model):
        for images_BCHW, _ in pairs_of(images, model, LOOKED_AT):
            model(images_BCHW)
    totals = _Totals()
    for reader, spread in zip(readers, spreads, strict=True):
        weight_A = (reader.linear.weight.detach().double() ** 2).sum(0)
        totals.add(reader, spread.variance_A * weight_A)
    return totals.scores(model, left_out(model, images), bases_of(model, images), root=True)


def taylor(model: Model, images: Images, generator: torch.Generator) -> Scores:
    """Mean square, over images, of what a loss would change to first order if a unit were gone.

    The loss is cross-entropy with the images' labels. Where they have none, labels are drawn from what the network
    itself says (which gives Fisher's information); of features without classes, random directions are drawn.
    """
    readers, totals = readers_of(model), _Totals()
    seen: dict[int, Tensor] = {}

    def watch(number: int, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        x.retain_grad()
        seen[number] = x
        return x

    with _watched(readers, watch), _frozen(model), evaluating(model):
        for images_BCHW, targets_B in pairs_of(images, model, LOOKED_AT):
            seen.clear()
            with torch.enable_grad():
                _loss(model, images_BCHW, targets_B, generator).backward()
            for number, x in seen.items():
                if x.grad is not None:
                    gain_BA = (x * x.grad).detach().double()
                    gain_BA = gain_BA.flatten(1, -2).sum(1) if gain_BA.dim() > 2 else gain_BA
                    totals.add(readers[number], gain_BA, square=True)
    return totals.scores(model, left_out(model, images), bases_of(model, images))


@torch.no_grad()
def unexplained(model: Model, images: Images, generator: torch.Generator) -> Scores:
    """The squared error in the stream once a unit and all less important ones are gone and the others make up for them
    (`elimination.py`). No labels. Channels and blocks as `activation`."""
    found = activation(model, images, generator)
    scores: dict[str, list[Tensor]] = {"heads": [], "hidden": []}
    with evaluating(model):
        streams = Streams(model.embed(images_BCHW) for images_BCHW, _ in pairs_of(images, model, LOOKED_AT))
        for branch in branches(model):
            streams.move(branch.enter)
            if (writer := branch.writer) is None:
                scores[branch.axis].append(torch.zeros(0, dtype=torch.float64))
                streams.move(branch)
                continue
            fit = Regression(writer.in_features, 0, writer.weight.device)
            handle = writer.register_forward_pre_hook(
                lambda _, given, fit=fit: fit.add(given[0], given[0][..., :0])
            )
            streams.move(branch)
            handle.remove()
            gamma = getattr(branch.scale, "gamma", None)
            weight_YA = writer.weight.double() * (1 if gamma is None else gamma.double()[:, None])
            units = len(getattr(found, branch.axis)[branch.slot])
            scores[branch.axis].append(eliminated(fit.covariance()[0], weight_YA, units).cpu())
    return replace(found, heads=tuple(scores["heads"]), hidden=tuple(scores["hidden"]))


def magnitude(model: Model, images: Images, generator: torch.Generator) -> Scores:
    """Norm of the weights that take what a unit gives; of a block, of all its writers' together."""
    totals = _Totals()
    blocks = torch.zeros(model.arch.depth, dtype=torch.float64)
    for reader in readers_of(model):
        squares_A = (reader.linear.weight.detach().double() ** 2).sum(0)
        totals.add(reader, squares_A)
        if reader.key[0] != "dim":
            blocks[reader.key[1]] += squares_A.sum().cpu()
    return totals.scores(model, blocks.sqrt(), bases_of(model, None), root=True)


def random(model: Model, images: Images, generator: torch.Generator) -> Scores:
    """Drawn: what anything else must beat."""
    totals = _Totals()
    for reader in readers_of(model):
        totals.add(reader, torch.rand(reader.linear.in_features, generator=generator, dtype=torch.float64))
    blocks = torch.rand(model.arch.depth, generator=generator, dtype=torch.float64)
    return totals.scores(model, blocks, bases_of(model, None))


IMPORTANCE: Mapping[str, Importance] = {
    "activation": activation,
    "unexplained": unexplained,
    "taylor": taylor,
    "magnitude": magnitude,
    "random": random,
}
"""By the word that a user gives. All but `magnitude` and `random` look at images; only `taylor` at labels, if any."""


@torch.no_grad()
def left_out(model: Model, images: Images) -> Tensor:
    """For each block of `model`, how far the final tokens turn away where it is left out: one minus the mean cosine, on
    the first images."""
    given = next(iter(pairs_of(images, model)))[0][:MOST_IMAGES]
    with evaluating(model):
        whole_BND = model.forward_features(given)
        found = []
        for block in model.blocks:
            handle = block.register_forward_hook(lambda module, inputs, output: inputs[0])
            try:
                found.append(
                    1 - functional.cosine_similarity(model.forward_features(given), whole_BND, dim=-1).mean()
                )
            finally:
                handle.remove()
    return torch.stack(found).double().cpu()


def _loss(model: Model, images_BCHW: Tensor, targets_B: Tensor | None, generator: torch.Generator) -> Tensor:
    outputs_BY: Tensor = model(images_BCHW)
    if model.num_classes == 0:
        directions_BY = torch.randn(outputs_BY.shape, generator=generator).to(outputs_BY)
        return (outputs_BY * directions_BY).sum()
    if targets_B is None:
        chances_BY = outputs_BY.detach().softmax(-1).cpu()
        targets_B = torch.multinomial(chances_BY, 1, generator=generator).squeeze(1)
    return functional.cross_entropy(outputs_BY, targets_B.to(outputs_BY.device), reduction="sum")


class _Spread:
    """Variance of each input of a layer, in one pass."""

    def __init__(self) -> None:
        self.shift: Tensor | None = None
        self.n, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x_TA: Tensor) -> None:
        if self.shift is None:
            self.shift = x_TA.mean(0)
        x_TA = x_TA - self.shift
        self.n += len(x_TA)
        self.total = self.total + x_TA.sum(0).double()
        self.squares = self.squares + x_TA.square().sum(0).double()

    @property
    def variance_A(self) -> Tensor:
        return (self.squares / max(1, self.n) - (self.total / max(1, self.n)) ** 2).clamp(min=0)


class _Totals:
    """Scores of units, summed over the layers that read them."""

    def __init__(self) -> None:
        self._found: dict[Key, Tensor] = {}

    def add(self, reader: Reader, values: Tensor, *, square: bool = False) -> None:
        """`values` per input, (A) or (B, A); summed over the entries of each unit, then squared and over images."""
        by_unit = values.cpu().unflatten(-1, (reader.units, -1)).sum(-1)
        by_unit = by_unit.square().sum(0) if square else by_unit
        known = self._found.get(reader.key)
        self._found[reader.key] = by_unit if known is None else known + by_unit

    def scores(
        self, model: Model, blocks: Tensor, bases: tuple[Bases | None, ...], *, root: bool = False
    ) -> Scores:
        def of(axis: str, count: int) -> tuple[Tensor, ...]:
            none = torch.zeros(0, dtype=torch.float64)
            found = [self._found.get((axis, index), none) for index in range(count)]
            return tuple(each.sqrt() if root else each for each in found)

        depth, stages = model.arch.depth, len(model.arch.stages)
        return Scores(of("heads", depth), of("hidden", depth), of("dim", stages), blocks, bases)


@contextmanager
def _watched(readers: list[Reader], watch: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, `watch` is given the number and the input of each reader that runs, and says what it gets."""

    def hook(number: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (watch(number, inputs[0]),)

    handles = [r.linear.register_forward_pre_hook(partial(hook, number)) for number, r in enumerate(readers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """Weights want no gradients meanwhile."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_()
