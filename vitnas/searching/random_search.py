"""Random search: genes drawn by their chances among the Archs that meet the Budget, none twice. The baseline to beat.

Where genes are dead in some Archs (blocks that the depth leaves out) that is not uniform over Archs: all depths are
drawn alike, although deep Archs are many more. Only in Spaces small enough to list is every Arch equally likely.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vitnas.searching.goal import Goal
from vitnas.searching.trial import NamedSearcher, Trial, tried
from vitnas.space import Genes


@dataclass(frozen=True)
class RandomSearch(NamedSearcher):
    """See `Goal.draw`."""

    word = "random"

    def propose(self, goal: Goal, history: Sequence[Trial], index: int, rng: random.Random) -> Genes | None:
        """See `Searcher.propose`."""
        return goal.draw(rng, tried(history))
