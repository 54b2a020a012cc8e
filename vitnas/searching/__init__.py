"""Which Arch to try next: the Study, the Searchers, and what the Budget leaves. `SEARCHERS` lists them by name."""

from vitnas.searching.evolution import Evolution
from vitnas.searching.feasibility import Feasibility, FeasibilityRow, feasibility
from vitnas.searching.latency import LatencyMeter
from vitnas.searching.optuna_search import OPTUNA_SAMPLERS, OptunaSearch
from vitnas.searching.pareto import hypervolume, rank_correlation
from vitnas.searching.problem import DEFAULT_OBJECTIVES, Objective, Problem
from vitnas.searching.random_search import RandomSearch
from vitnas.searching.search import SEARCHERS, Evaluator, search
from vitnas.searching.study import Study
from vitnas.searching.trial import NothingLeftError, Searcher, Trial

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
