"""Which Arch to try next: the Study, the Searchers, and what the Budget leaves. `SEARCHERS` lists them by name."""

from vitnas.search.evolution import Evolution
from vitnas.search.feasibility import Feasibility, FeasibilityRow, feasibility
from vitnas.search.latency import LatencyMeter
from vitnas.search.optuna_search import OPTUNA_SAMPLERS, OptunaSearch
from vitnas.search.pareto import hypervolume, rank_correlation
from vitnas.search.problem import DEFAULT_OBJECTIVES, Objective, Problem
from vitnas.search.random_search import RandomSearch
from vitnas.search.search import SEARCHERS, Evaluator, search
from vitnas.search.study import Study
from vitnas.search.trial import NothingLeftError, Searcher, Trial

__all__ = [
    "DEFAULT_OBJECTIVES",
    "OPTUNA_SAMPLERS",
    "SEARCHERS",
    "Evaluator",
    "Evolution",
    "Feasibility",
    "FeasibilityRow",
    "LatencyMeter",
    "NothingLeftError",
    "Objective",
    "OptunaSearch",
    "Problem",
    "RandomSearch",
    "Searcher",
    "Study",
    "Trial",
    "feasibility",
    "hypervolume",
    "rank_correlation",
    "search",
]
