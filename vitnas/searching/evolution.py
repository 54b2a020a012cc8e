"""Evolution over fixed-length genes: mutants and crossovers of the best Archs so far, all within the Budget.

Papers: AutoFormer (arXiv 2107.00651), ViT-ResNAS (arXiv 2109.00642) and ViTAS (arXiv 2106.13700), whose settings have
classes of their own. Two deliberate deviations: an Arch that misses the Budget after all redraws is repaired, one gene
at a time, before a random one takes its place; and with several objectives parents are NSGA-II's best (rank, then
crowding) instead of the highest scores.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from vitnas.errors import UserError
from vitnas.searching.goal import Goal, oriented
from vitnas.searching.pareto import best_first
from vitnas.searching.shrinking import shrunk
from vitnas.searching.trial import NamedSearcher, Trial, tried
from vitnas.space import Genes, Space

GENERATIONS = 8  # of a search whose size is given


@dataclass(frozen=True, kw_only=True)
class Evolution(NamedSearcher):
    """Generations of `population` Archs; the first is random, later ones descend from the best of all before.

    Args:
        population: Archs per generation.
        parents: how many of the best Archs of all earlier generations may have children.
        mutants: children by mutation per generation.
        crossovers: children by crossover per generation; what is left of the population is random.
        generations: how many generations a whole search has.
        prob: chance that a mutation redraws a gene.
        structural_prob: chance that it redraws a gene of the structure (depth, width of the whole net).
        num_mutated: genes that a mutation redraws on average, whatever the two chances say; None for these.
        mutate_crossed: mutate what crossover made, too.
        attempts: redraws of a child that misses the Budget or was tried before; then it is repaired.
        first: Archs of the first generation; None for `population`.
        shrink: draw the first generation by gradual shrinking (`shrinking.py`) instead of uniformly.
    """

    word = "evolution"

    population: int = 50
    parents: int = 10
    mutants: int = 25
    crossovers: int = 25
    generations: int = 20
    prob: float = 0.2
    structural_prob: float = 0.4
    num_mutated: float | None = None
    mutate_crossed: bool = False
    attempts: int = 10
    first: int | None = None
    shrink: bool = False
    # The parents of a generation, which saves time: they are found anew where the Trials before it are others.
    _ranked: list[tuple[Goal, Sequence[Trial], list[Genes]]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("population", "parents", "generations", "attempts", "first"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.mutants < 0 or self.crossovers < 0 or self.mutants + self.crossovers > self.population:
            raise UserError(
                f"mutants + crossovers is {self.mutants} + {self.crossovers}; both are at least 0 and together at "
                f"most the population of {self.population}. Lower them or raise it."
            )
        for name in ("prob", "structural_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; a probability lies in 0..1.")
        if self.num_mutated is not None and self.num_mutated <= 0:
            raise UserError(f"num_mutated is {self.num_mutated}; a mutation redraws genes. Use 1, or None.")
        if self.mutants and self.num_mutated is None and not self.prob and not self.structural_prob:
            raise UserError("prob and structural_prob are 0; mutants would equal their parents. Raise one.")

    @classmethod
    def sized(cls, num_trials: int, answers: Callable[[], Sequence[Genes]] | None = None) -> Self:
        """AutoFormer's proportions, fitted to a search of `num_trials` Archs."""
        population = max(2, round(num_trials / GENERATIONS))
        return cls(
            population=population,
            parents=max(2, population // 5),
            mutants=population // 2,
            crossovers=population // 2,
            generations=max(1, -(-num_trials // population)),
        )

    @property
    def num_trials(self) -> int:
        """Archs that a whole search scores."""
        return self._first + self.population * (self.generations - 1)

    @property
    def _first(self) -> int:
        return self.population if self.first is None else self.first

    def generation(self, index: int) -> int | None:
        """Proposals count off generations: `first` Archs, then `population` each."""
        return 0 if index < self._first else 1 + (index - self._first) // self.population

    def propose(self, goal: Goal, history: Sequence[Trial], index: int, rng: random.Random) -> Genes | None:
        """See `Searcher.propose`."""
        seen = tried(history)
        slot, generation = (index - self._first) % self.population, self.generation(index)
        start = index - slot if generation else 0  # the generation's first proposal
        earlier = [t for t in history if t.state == "scored" and t.proposal < start]
        parents = self._parents(goal, earlier)
        if slot < self.mutants and parents:
            child = self._child("mutant", goal, parents, seen, rng)
        elif slot < self.mutants + self.crossovers and len(parents) > 1:
            child = self._child("crossover", goal, parents, seen, rng)
        else:
            child = shrunk(goal, rng, seen) if self.shrink else None
        return child if child is not None else goal.draw(rng, seen)

    def _parents(self, goal: Goal, scored: Sequence[Trial]) -> list[Genes]:
        """The genes of the best `parents` Trials, best first."""
        if not scored:
            return []
        for known, before, parents in self._ranked:
            if known is goal and before == scored:
                return parents
        values = [[o.value(trial.values, trial.cost) for o in goal.objectives] for trial in scored]
        order = best_first(oriented(values, goal.objectives), self.parents)
        parents = [scored[place].genes for place in order]
        self._ranked[:] = [(goal, scored, parents)]
        return parents

    def _child(
        self,
        kind: Literal["mutant", "crossover"],
        goal: Goal,
        parents: Sequence[Genes],
        seen: Collection[Genes],
        rng: random.Random,
    ) -> Genes | None:
        """A new child within the Budget: the first of `attempts` draws that is, else one of them repaired."""
        drawn = [self._draw(kind, goal, parents, rng) for _ in range(self.attempts)]
        new = [genes for genes in dict.fromkeys(drawn) if genes not in seen]
        if not new:
            return None
        inside = goal.meets(new)
        for genes, is_inside in zip(new, inside, strict=True):
            if is_inside:
                return genes
        misses = goal.violation(new)
        return goal.repair(new[int(misses.argmin())], rng, seen)

    def _draw(
        self,
        kind: Literal["mutant", "crossover"],
        goal: Goal,
        parents: Sequence[Genes],
        rng: random.Random,
    ) -> Genes:
        space = goal.space
        if kind == "crossover":
            first, second = rng.sample(list(parents), 2)
            child = space.cross_genes(first, second, rng)
            return space.canonical(self._mutated(space, child, rng) if self.mutate_crossed else child)
        return space.canonical(self._mutated(space, rng.choice(list(parents)), rng))

    def _mutated(self, space: Space, genes: Genes, rng: random.Random) -> Genes:
        if self.num_mutated is None:
            return space.mutate_genes(genes, rng, prob=self.prob, structural_prob=self.structural_prob)
        share = min(1.0, self.num_mutated / len(space.genes))
        return space.mutate_genes(genes, rng, prob=share, structural_prob=share)


@dataclass(frozen=True, kw_only=True)
class PaperEvolution(Evolution):
    """A paper's own settings, whatever the size of the search."""

    @classmethod
    def sized(cls, num_trials: int, answers: Callable[[], Sequence[Genes]] | None = None) -> Self:
        return cls()


@dataclass(frozen=True, kw_only=True)
class AutoFormerEvolution(PaperEvolution):
    """AutoFormer's settings, which are the defaults: 20 generations of 50, 10 parents, 25 mutants, 25 crossovers."""

    word = "autoformer"


@dataclass(frozen=True, kw_only=True)
class ViTResNASEvolution(PaperEvolution):
    """ViT-ResNAS's settings: 500 Archs by gradual shrinking, then 19 times 75 mutants and 75 crossovers of the best 75
    so far. Its budget is a window: MACs of 0.975 to 1 times the limit."""

    word = "vit_resnas"

    population: int = 150
    parents: int = 75
    mutants: int = 75
    crossovers: int = 75
    prob: float = 0.3
    structural_prob: float = 0.3
    attempts: int = 100
    first: int | None = 500
    shrink: bool = True


@dataclass(frozen=True, kw_only=True)
class VitasEvolution(PaperEvolution):
    """ViTAS's settings: 40 generations of 50, the best 50 of all so far mate, every child by crossover and then one
    gene in n mutated. Differences to the authors' NSGA-II: PAPERS.md."""

    word = "vitas"

    parents: int = 50
    mutants: int = 0
    crossovers: int = 50
    generations: int = 40
    num_mutated: float | None = 1
    mutate_crossed: bool = True
    attempts: int = 100
