"""Random search: every Arch that meets the Budget is equally likely, none twice. The baseline to beat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vitnas.searching.problem import Problem
from vitnas.searching.trial import NamedSearcher, Trial
from vitnas.space import Genes


@dataclass(frozen=True)
class RandomSearch(NamedSearcher):
    """Uniform over the Archs that meet the counted limits."""

    word = "random"

    def propose(
        self, problem: Problem, history: Sequence[Trial], index: int, rng: random.Random
    ) -> Genes | None:
        """See `Searcher.propose`."""
        return problem.draw(rng, {trial.genes for trial in history})
