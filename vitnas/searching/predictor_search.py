"""Search guided by a predictor: what is tried next is what a predictor, fitted to all scores so far, thinks best.

Thompson sampling: of the predictors that the scores allow one is drawn, and the best Arch by it is proposed, so
that what is not known well is tried as often as it may be the best. Finding that Arch costs no score: the best so
far and random Archs are crossed and mutated for a few rounds by the drawn predictor, thousands at a time, within
the counted limits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from vitnas.searching.goal import Goal
from vitnas.searching.predictor import Features, Predictor
from vitnas.searching.trial import NamedSearcher, Trial, tried
from vitnas.space import Genes, Matrix

FIRST_SHARE = 0.15  # of the search is drawn at random, for the predictor to begin with


@dataclass(frozen=True)
class PredictorSearch(NamedSearcher):
    """See the module.

    Args:
        first: Archs drawn at random before the predictor is asked.
        crowd: Archs looked at per round; `rounds` of them per proposal.
        kept: of a round, the best as parents of the next.
        mutated: genes of a child that are drawn anew, on average.
    """

    word = "predictor"

    first: int = 20
    crowd: int = 512
    rounds: int = 6
    kept: int = 48
    mutated: float = 1.5

    @classmethod
    def sized(cls, num_trials: int, answers: Callable[[], Sequence[Genes]] | None = None) -> Self:
        """A seventh of the search to begin with, 8 Archs at least."""
        return cls(first=max(8, round(FIRST_SHARE * num_trials)))

    def propose(self, goal: Goal, history: Sequence[Trial], index: int, rng: random.Random) -> Genes | None:
        """See `Searcher.propose`."""
        seen = tried(history)
        scored = [trial for trial in history if trial.state == "scored"]
        if len(scored) < self.first:
            return goal.draw(rng, seen)
        generator = np.random.default_rng(rng.getrandbits(64))
        objective = goal.objectives[0]
        sign = 1 if objective.direction == "maximize" else -1
        scores = [sign * objective.value(trial.values, trial.cost) for trial in scored]
        drawn = Predictor.fit(Features(goal.space), [trial.genes for trial in scored], scores).drawn(
            generator
        )
        parents = np.array([scored[place].genes for place in np.argsort(scores)[-self.kept :]])
        best = self._best(goal, drawn, parents, seen, generator)
        return best if best is not None else goal.draw(rng, seen)

    def _best(
        self,
        goal: Goal,
        predictor: Predictor,
        parents_PG: Matrix,
        seen: Collection[Genes],
        generator: np.random.Generator,
    ) -> Genes | None:
        """The best new Arch within the counted limits that was met on the way."""
        found: dict[Genes, float] = {}
        for _ in range(self.rounds):
            crowd_NG = np.concatenate([parents_PG, self._children(goal, parents_PG, generator)])
            crowd_NG = np.unique(crowd_NG[goal.meets(crowd_NG)], axis=0)
            if not len(crowd_NG):
                return None
            value_N = predictor(crowd_NG)
            order = np.argsort(-value_N, kind="stable")[: self.kept]
            parents_PG = crowd_NG[order]
            found |= dict(zip(map(tuple, parents_PG.tolist()), value_N[order].tolist(), strict=True))
        new = [genes for genes in found if genes not in seen]
        return max(new, key=lambda genes: found[genes], default=None)

    def _children(self, goal: Goal, parents_PG: Matrix, generator: np.random.Generator) -> Matrix:
        """Crossed and mutated, and some drawn at random."""
        space, genes = goal.space, parents_PG.shape[1]
        mothers, fathers = (parents_PG[generator.integers(len(parents_PG), size=self.crowd)] for _ in "ab")
        crossed = generator.random((self.crowd, genes)) < 0.5 * (generator.random((self.crowd, 1)) < 0.5)
        fresh = space.random_matrix(self.crowd, generator)
        mutated = generator.random((self.crowd, genes)) < self.mutated / genes
        children = np.where(mutated, fresh, np.where(crossed, fathers, mothers))
        return np.asarray(space.canonical_matrix(np.concatenate([children, fresh[: self.crowd // 8]])))
