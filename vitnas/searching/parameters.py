"""Genes as Optuna parameters, for dashboards, importances and other people's tools. Nothing here reads them back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from vitnas.space import Genes, Space
from vitnas.space.gene import Gene


class Parameters:
    """`params` and `distributions` of Archs of a Space, as `create_trial` takes them.

    A gene that does not matter to an Arch (the heads of a block that it has not) is no parameter of its trial, nor is
    one of a single option.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._of = [distribution(gene) if len(gene.options) > 1 else None for gene in space.genes]

    def __call__(self, genes: Genes) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
        """Of canonical genes."""
        matters = self._space.active_matrix(np.asarray([genes], dtype=np.int64))[0]
        params, distributions = {}, {}
        for gene, option, given, counts in zip(self._space.genes, genes, self._of, matters, strict=True):
            if given is not None and counts:
                params[gene.name] = _told(gene.options[option])
                distributions[gene.name] = given
        return params, distributions


def distribution(gene: Gene) -> BaseDistribution:
    """What has exactly the gene's options: numbers that rise by one step are a range, all others categories.

    >>> distribution(Gene("depth", (12, 13, 14)))
    IntDistribution(high=14, log=False, low=12, step=1)
    """
    options = gene.options
    if all(isinstance(option, int | float) and not isinstance(option, bool) for option in options):
        step = options[1] - options[0]
        is_even = all(np.isclose(after - before, step, rtol=1e-9) for before, after in pairwise(options))
        if is_even and step > 0:
            kind = (
                IntDistribution if all(isinstance(option, int) for option in options) else FloatDistribution
            )
            return kind(options[0], options[-1], step=step)
    return CategoricalDistribution([_told(option) for option in options])


def _told(option: Any) -> Any:
    """An option as Optuna takes one: a number, a truth value or a word."""
    return option if isinstance(option, bool | int | float | str) else str(option)
