"""Random search: every Arch that meets the Budget is equally likely, none twice. The baseline to beat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vitnas.searching.problem import Problem
from vitnas.searching.trial import Trial
from vitnas.space import Genes


@dataclass(frozen=True)
class RandomSearch:
    """Uniform over the Archs that meet the counted limits."""

    def propose(
        self, problem: Problem, history: Sequence[Trial], index: int, rng: random.Random
    ) -> Genes | None:
        """See `Searcher.propose`."""
        return problem.draw(rng, {trial.genes for trial in history})

    def generation(self, index: int) -> int | None:
        """None: random search has no generations."""
        return None
