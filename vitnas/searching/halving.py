"""Halving: a search without a supernet. Archs are trained briefly from new weights; in the run's finals the better
half of them trains on, rung by rung, and the best is chosen.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943). On little data it is the honest rival of a supernet,
whose scores are of weights that no Arch would have by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from vitnas.searching.goal import Goal
from vitnas.searching.predictor_search import PredictorSearch
from vitnas.searching.random_search import RandomSearch
from vitnas.searching.trial import Trial
from vitnas.space import Genes


@dataclass(frozen=True)
class Halving(RandomSearch):
    """Proposes as random search does; what differs is how Archs are scored, and that all of them go to the finals."""

    word = "halving"
    trains = True


@dataclass(frozen=True)
class GuidedHalving(PredictorSearch):
    """Halving in which a predictor, fitted to what was trained so far, proposes the second half of the Archs.

    Args:
        given: canonical genes that are proposed first, as they were trained already.
    """

    word = "guided_halving"
    trains = True

    given: tuple[Genes, ...] = ()

    @classmethod
    def sized(cls, num_trials: int, answers: Callable[[], Sequence[Genes]] | None = None) -> Self:
        """Half of the search to begin with."""
        return cls(first=max(2, num_trials // 2), given=tuple(answers()) if answers else ())

    def propose(self, goal: Goal, history: Sequence[Trial], index: int, rng: random.Random) -> Genes | None:
        """See `Searcher.propose`."""
        seen = {trial.genes for trial in history}
        left = (genes for genes in self.given if genes not in seen and bool(goal.meets([genes])[0]))
        return next(left, None) or super().propose(goal, history, index, rng)
