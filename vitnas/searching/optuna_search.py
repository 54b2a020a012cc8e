"""Any Optuna sampler as a Searcher: TPE, NSGA-II, NSGA-III, GP, or one of your own.

Suggestions run against an in-memory copy of the history, so that the stored Study costs a handful of transactions
per trial instead of one per gene. Optuna's samplers do not know what was tried before, nor a Space's canonical
form; a suggestion that was tried or misses the Budget is asked again, then repaired, and at last replaced by a
random Arch within the Budget.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from vitnas.searching.goal import Goal
from vitnas.searching.storage import quiet
from vitnas.searching.trial import NamedSearcher, Trial, tried
from vitnas.space import Genes, Space


@dataclass
class OptunaSearch(NamedSearcher):
    """Proposes what an Optuna sampler suggests.

    Args:
        sampler: a function from a seed to a sampler, or a sampler object. Only the first makes a search that was
            killed go on bit for bit: an object's own generator is not stored.
        attempts: suggestions asked per proposal before the last one is repaired.
    """

    sampler: Callable[..., BaseSampler] | BaseSampler
    attempts: int = 4
    # The copy of the history that the sampler reads. It only saves time: it is made anew when it does not fit.
    _copy: optuna.Study | None = field(default=None, init=False, repr=False, compare=False)
    _copied: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def propose(self, goal: Goal, history: Sequence[Trial], index: int, rng: random.Random) -> Genes | None:
        """See `Searcher.propose`."""
        seen = tried(history)
        distributions = _distributions(goal.space)
        with quiet():
            sampler = self._make(rng.getrandbits(31))
            study = self._mirror(goal, history, distributions, sampler)
            last: Genes | None = None
            for _ in range(self.attempts):
                asked = study.ask(distributions)
                genes = goal.space.canonical(_genes(goal.space, asked.params))
                study.tell(asked, state=TrialState.FAIL)  # samplers leave failed trials out
                if genes not in seen and goal.meets([genes])[0]:
                    return genes
                last = genes
        repaired = goal.repair(last, rng, seen) if last is not None else None
        return repaired if repaired is not None else goal.draw(rng, seen)

    def _make(self, seed: int) -> BaseSampler:
        return self.sampler if isinstance(self.sampler, BaseSampler) else self.sampler(seed=seed)

    def _mirror(
        self,
        goal: Goal,
        history: Sequence[Trial],
        distributions: dict[str, BaseDistribution],
        sampler: BaseSampler,
    ) -> optuna.Study:
        """The in-memory Study of all scored Trials, with `sampler`."""
        scored = [trial for trial in history if trial.state == "scored"]
        numbers = [trial.number for trial in scored]
        if self._copy is None or self._copied != numbers[: len(self._copied)]:
            directions = [StudyDirection[o.direction.upper()] for o in goal.objectives]
            self._copy, self._copied = optuna.create_study(directions=directions), []
        study = self._copy
        study.sampler = sampler
        for trial in scored[len(self._copied) :]:
            _add(study, sampler, goal, trial, distributions)
        self._copied = numbers
        return study


@dataclass
class Tpe(OptunaSearch):
    """Optuna's tree-structured Parzen estimator."""

    word = "tpe"
    sampler: Callable[..., BaseSampler] | BaseSampler = TPESampler


@dataclass
class Nsga2(OptunaSearch):
    """Optuna's NSGA-II."""

    word = "nsga2"
    sampler: Callable[..., BaseSampler] | BaseSampler = NSGAIISampler


@dataclass
class Nsga3(OptunaSearch):
    """Optuna's NSGA-III."""

    word = "nsga3"
    sampler: Callable[..., BaseSampler] | BaseSampler = NSGAIIISampler


@dataclass
class GaussianProcess(OptunaSearch):
    """Optuna's Gaussian process."""

    word = "gp"
    sampler: Callable[..., BaseSampler] | BaseSampler = GPSampler


def _add(
    study: optuna.Study,
    sampler: BaseSampler,
    goal: Goal,
    trial: Trial,
    distributions: dict[str, BaseDistribution],
) -> None:
    """Record one scored Trial, with the generation a genetic sampler would have given it."""
    attrs: dict[str, Any] = {}
    if isinstance(sampler, optuna.samplers.BaseGASampler):
        # Asking for the generation of a running trial writes it down; the record then carries the same attribute.
        running = study.ask()
        latest = study.get_trials(deepcopy=False)[running.number]
        sampler.get_trial_generation(study, latest)
        attrs = dict(study.get_trials(deepcopy=False)[running.number].system_attrs)
        study.tell(running, state=TrialState.FAIL)
    study.add_trial(
        create_trial(
            state=TrialState.COMPLETE,
            values=[objective.value(trial.values, trial.cost) for objective in goal.objectives],
            params=_params(goal.space, trial.genes),
            distributions=distributions,
            system_attrs=attrs,
        )
    )


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    """Ordered numbers as integers, so that samplers can interpolate; anything else as categories."""
    result: dict[str, BaseDistribution] = {}
    for gene in space.genes:
        count = len(gene.options)
        numeric = all(isinstance(option, int | float) for option in gene.options)
        if count > 1 and numeric and list(gene.options) == sorted(gene.options):
            result[gene.name] = IntDistribution(0, count - 1)
        elif count > 1:
            result[gene.name] = CategoricalDistribution(list(range(count)))
    return result


def _params(space: Space, genes: Genes) -> dict[str, int]:
    return {g.name: option for g, option in zip(space.genes, genes, strict=True) if len(g.options) > 1}


def _genes(space: Space, params: dict[str, Any]) -> Genes:
    return tuple(int(params.get(gene.name, 0)) for gene in space.genes)
