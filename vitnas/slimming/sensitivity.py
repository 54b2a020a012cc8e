"""Sensitivity: what each smaller option of each gene would cost, measured once, on images that nothing is fitted to.

One gene is changed at a time, in the ordered network, and what goes is made up for by its own writer (or where a block
goes, by the writer before it). The cost is how far the final tokens turn away: one minus their mean cosine. Of many
options some are measured, and those between follow. Layers behind mend some of the damage, which is measured at a few
blocks. The numbers are for choosing among Archs; those chosen are folded and measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vitnas.extraction import extract
from vitnas.model.features import stage_starts
from vitnas.runs import RunFile
from vitnas.slimming.agreement import agreement
from vitnas.slimming.branches import Branch, branches, inputs_of
from vitnas.slimming.folding import fold
from vitnas.slimming.images import Images, split
from vitnas.slimming.regression import Regression, ridge_solve
from vitnas.space import Gene
from vitnas.supernet import Supernet
from vitnas.train import Progress, Silent

STRENGTH = 1e-3
MEASURED = 6  # options of a gene; what lies between is interpolated
LEAST_DAMAGE = 1e-8
MENDED = 4  # blocks at which it is measured how much those behind mend
LEAST_MENDED = 1e-4  # predicted damage that can be told from none
LEAST_LEFT = 0.05


@dataclass(frozen=True, kw_only=True)
class Sensitivity(RunFile):
    """What each option of each gene costs, by the gene's name: one minus the cosine of the final tokens.

    Args:
        damage: per gene, of each option in order; the last, which changes nothing, costs 0.
        n_fitted, n: images that compensation was fitted to, and that the damage was measured on.
        seconds: what measuring took.
    """

    FILE = "sensitivity.json"
    COMMAND = "vitnas slim"

    damage: Mapping[str, tuple[float, ...]]
    n_fitted: int
    n: int
    seconds: float


Streams = list[Tensor]
Found = dict[str, tuple[float, ...]]


@torch.no_grad()
def sensitivity(supernet: Supernet, images: Images, *, progress: Progress | None = None) -> Sensitivity:
    """Measure a Supernet of `ordered`.

    Args:
        images: unlabelled; a quarter of them, 64 at most, are measured on, the others fitted to.
        progress: told of every gene; silent by default.

    Raises:
        UserError: fewer than two images.
    """
    start = time.monotonic()
    fitted, held = split(images, supernet)
    genes, told, found = supernet.space.genes, progress or Silent(), Found()
    for name, costs in _Pass(supernet, fitted, held).run():
        found[name] = costs
        told.update("sensitivity", len(found), len(genes))
    found = _mended(supernet, found, fitted, held)
    for place, gene in enumerate(genes):
        if gene.name not in found:
            found[gene.name] = _by_folding(supernet, gene, place, fitted, held)
            told.update("sensitivity", len(found), len(genes))
    in_order = {gene.name: found[gene.name] for gene in supernet.space.genes}
    return Sensitivity(
        damage=in_order,
        n_fitted=sum(map(len, fitted)),
        n=sum(map(len, held)),
        seconds=time.monotonic() - start,
    )


class _Pass:
    """One way through the largest network, with every gene of a block changed where it lies."""

    def __init__(self, supernet: Supernet, fitted: Streams, held: Streams) -> None:
        self.space = supernet.space
        self.whole = extract(supernet, self.space.largest()).eval()
        self.branches = branches(self.whole)
        starts = stage_starts(self.whole.arch)
        self.genes = {
            (gene.field, starts[gene.stage] + gene.slot): gene
            for gene in self.space.genes
            if gene.scope == "block"
        }
        self.fitted, self.held = ([self.whole.embed(x) for x in given] for given in (fitted, held))
        self.final = [self._finish(0, x_BND) for x_BND in self.held]

    def run(self) -> Iterator[tuple[str, tuple[float, ...]]]:
        before: _Written | None = None
        for number, branch in enumerate(self.branches):
            if branch.entry is not None:
                self.fitted, self.held = (
                    [branch.enter(x) for x in given] for given in (self.fitted, self.held)
                )
                before = None
            if branch.axis == "heads" and (gene := self.genes.get(("exists", branch.slot))) is not None:
                yield gene.name, (self._without(number, before), 0.0)
            written = _Written(branch, self.fitted, self.held)
            if branch.writer is not None:
                fields = ("num_heads", "head_dim") if branch.axis == "heads" else ("mlp_hidden",)
                for gene in (
                    self.genes[field, branch.slot] for field in fields if (field, branch.slot) in self.genes
                ):
                    yield gene.name, between(gene.options, partial(self._cut, number, written, gene))
            self.fitted, self.held = written.behind
            before = written

    def _cut(self, number: int, written: _Written, gene: Gene, option: int) -> float:
        """The damage where the branch's writer is left with what `option` of `gene` keeps of its inputs."""
        if option == gene.options[-1]:
            return 0.0
        inputs = torch.arange(len(written.mean_A), device=written.mean_A.device)
        if gene.field == "head_dim":
            inner: Any = written.branch.inner
            kept = inputs.remainder(inner.head_dim) < option
        else:
            kept = inputs < len(inputs) * option // gene.options[-1]
        return self._damage(number + 1, written.cut(kept))

    def _without(self, number: int, before: _Written | None) -> float:
        """The damage where both branches of a block are left out, and the writer before makes up for it."""
        attn, mlp = self.branches[number : number + 2]
        added = [mlp(attn(x_BND)) - x_BND for x_BND in self.fitted]
        if before is None or before.branch.writer is None:
            constant_D = torch.cat([x_BND.flatten(0, 1) for x_BND in added]).mean(0)
            streams = [x_BND + constant_D for x_BND in self.held]
        else:
            streams = before.map(added, self.held)
        return self._damage(number + 2, streams)

    def _damage(self, number: int, streams: Streams) -> float:
        pairs = zip(streams, self.final, strict=True)
        found = torch.cat(
            [functional.cosine_similarity(self._finish(number, x), y, dim=-1).mean(1) for x, y in pairs]
        )
        return 1 - float(found.double().mean())

    def _finish(self, number: int, x_BND: Tensor) -> Tensor:
        """The final tokens, from the stream behind the branches before `number`."""
        for branch in self.branches[number:]:
            x_BND = branch(branch.enter(x_BND))
        normed_BND: Tensor = self.whole.norm(x_BND)
        return normed_BND


def between(options: Sequence[int], measure: Callable[[int], float]) -> tuple[float, ...]:
    """What each option costs, of which the last costs nothing: some measured, those between by a line from logarithm
    to logarithm."""
    last = len(options) - 1
    some = sorted({round(place) for place in np.linspace(0, last - 1, min(last, MEASURED))})
    logs = np.log([max(measure(options[place]), LEAST_DAMAGE) for place in some])
    found = np.exp(np.interp(options[:last], [options[place] for place in some], logs))
    return (*found.tolist(), 0.0)


class _Written:
    """What a branch adds to streams, by what its writer is given."""

    def __init__(self, branch: Branch, fitted: Streams, held: Streams) -> None:
        self.branch = branch
        self.given: tuple[Streams, Streams] = ([], [])
        self.behind: tuple[Streams, Streams] = ([], [])
        self.base = [branch.base(x_BND) for x_BND in held]
        writer = branch.writer
        for given, behind, streams in zip(self.given, self.behind, (fitted, held), strict=True):
            for x_BND in streams:
                if writer is None:
                    behind.append(branch(x_BND))
                    continue
                with inputs_of(writer) as seen:
                    behind.append(branch(x_BND))
                given.append(seen[0])
        if writer is not None:
            fit = Regression(writer.in_features, 0, writer.weight.device)
            for given_BNA in self.given[0]:
                fit.add(given_BNA, given_BNA[..., :0])
            self.covariance_AA, self.mean_A = fit.covariance()

    def cut(self, kept_A: Tensor) -> Streams:
        """Streams behind the branch with those inputs of the writer alone, which make up for the others."""
        writer = self.branch.writer
        assert writer is not None
        kept, gone = kept_A.nonzero().squeeze(1), (~kept_A).nonzero().squeeze(1)
        weight_DA = writer.weight.double()
        cov_SS, cov_SP = self.covariance_AA[kept][:, kept], self.covariance_AA[kept][:, gone]
        slopes_SP = ridge_solve(cov_SS, cov_SP, STRENGTH * cov_SS.diagonal().mean())
        weight_DS = weight_DA[:, kept] + weight_DA[:, gone] @ slopes_SP.T
        constant_D = writer.bias.double() + weight_DA[:, gone] @ (
            self.mean_A[gone] - slopes_SP.T @ self.mean_A[kept]
        )
        weight_DS, constant_D = weight_DS.to(writer.weight), constant_D.to(writer.weight)
        return [
            base_BND + self.branch.scale(functional.linear(given_BNA[..., kept], weight_DS, constant_D))
            for base_BND, given_BNA in zip(self.base, self.given[1], strict=True)
        ]

    def map(self, wanted: Streams, streams: Streams) -> Streams:
        """`streams` and the best linear map of what the writer is given to `wanted`, fitted where that is known."""
        fit = Regression(len(self.mean_A), wanted[0].shape[-1], wanted[0].device)
        for given_BNA, wanted_BND in zip(self.given[0], wanted, strict=True):
            fit.add(given_BNA, wanted_BND)
        slopes_AD, constant_D = (found.to(wanted[0].dtype) for found in fit.solve(STRENGTH))
        return [
            x + given_BNA @ slopes_AD + constant_D
            for x, given_BNA in zip(streams, self.given[1], strict=True)
        ]


def _mended(supernet: Supernet, found: Found, fitted: Streams, held: Streams) -> Found:
    """The damage that is left once layers behind mend what they can, which in the last block is all of it.

    How much that is is measured at a few blocks, each cut to the middle of its options and folded through to the end;
    between them by a line.
    """
    space = supernet.space
    whole = extract(supernet, space.largest()).eval()
    starts, last = stage_starts(whole.arch), whole.arch.depth - 1
    slots = {gene.name: starts[gene.stage] + gene.slot for gene in space.genes if gene.name in found}
    shares = {last: 1.0}
    for slot in sorted({last * number // MENDED for number in range(MENDED)} - {last}):
        genes, predicted = [count - 1 for count in space.num_options], 0.0
        for place, gene in enumerate(space.genes):
            if slots.get(gene.name) == slot and gene.field != "exists":
                genes[place] = (len(gene.options) - 1) // 2
                predicted += found[gene.name][genes[place]]
        if predicted > LEAST_MENDED:
            agreed = agreement(fold(supernet, space.decode(genes), fitted), whole, held)
            left = 1 - agreed.cosine
            shares[slot] = min(1.0, max(LEAST_LEFT, left / predicted))
    at = sorted(shares)
    left_at = np.interp(range(last + 1), at, [shares[slot] for slot in at])
    return {
        name: tuple(float(left_at[slots[name]] * cost) for cost in costs) for name, costs in found.items()
    }


def _by_folding(
    supernet: Supernet, gene: Gene, place: int, fitted: Streams, held: Streams
) -> tuple[float, ...]:
    """The damage of a gene's options, each folded through the whole network."""
    space = supernet.space
    last = [count - 1 for count in space.num_options]
    whole = extract(supernet, space.largest()).eval()
    damage = []
    for option in range(len(gene.options) - 1):
        arch = space.decode([*last[:place], option, *last[place + 1 :]])
        damage.append(1 - agreement(fold(supernet, arch, fitted), whole, held).cosine)
    return (*damage, 0.0)
