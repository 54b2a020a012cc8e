"""Search without searching: Archs that a learned policy drew for the budget, best guess first."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitnas.errors import UserError
from vitnas.searching.goal import Goal
from vitnas.searching.trial import NamedSearcher, Trial, tried
from vitnas.space import Genes


@dataclass(frozen=True)
class PolicySearch(NamedSearcher):
    """Proposes `ranked` in order (FocusFormer, arXiv 2208.10861: the sampler answers, held-out images decide).

    Args:
        ranked: canonical genes.
    """

    word = "sampler"
    asks_sampler = True

    ranked: tuple[Genes, ...]

    @classmethod
    def sized(cls, num_trials: int, answers: Callable[[], Sequence[Genes]] | None = None) -> PolicySearch:
        if answers is None:
            raise UserError(
                "searcher is 'sampler', which asks a learned sampler; a search by itself has none. Pass "
                "PolicySearch(ranked), or use evolution."
            )
        return cls(tuple(answers()))

    def propose(self, goal: Goal, history: Sequence[Trial], index: int, rng: random.Random) -> Genes | None:
        """See `Searcher.propose`."""
        seen = tried(history)
        left = (genes for genes in self.ranked if genes not in seen and bool(goal.meets([genes])[0]))
        return next(left, None)
