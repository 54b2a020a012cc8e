"""Search without searching: Archs that a learned policy drew for the budget, best guess first."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vitnas.searching.problem import Problem
from vitnas.searching.trial import Trial
from vitnas.space import Genes


@dataclass(frozen=True)
class PolicySearch:
    """Proposes `ranked` in order (FocusFormer, arXiv 2208.10861: the sampler answers, held-out images decide).

    Args:
        ranked: canonical genes.
    """

    ranked: tuple[Genes, ...]

    def propose(
        self, problem: Problem, history: Sequence[Trial], index: int, rng: random.Random
    ) -> Genes | None:
        """See `Searcher.propose`."""
        tried = {trial.genes for trial in history}
        left = (genes for genes in self.ranked if genes not in tried and bool(problem.meets([genes])[0]))
        return next(left, None)

    def generation(self, index: int) -> int | None:
        """None: it has no generations."""
        return None
