"""Which Arch to try next: the Study, the Searchers, and what the Budget leaves. `SEARCHERS` lists them by name."""

from vitnas.searching.evolution import AutoFormerEvolution, Evolution, VitasEvolution, ViTResNASEvolution
from vitnas.searching.feasibility import Feasibility, FeasibilityRow, feasibility
from vitnas.searching.goal import DEFAULT_OBJECTIVES, Goal, Objective
from vitnas.searching.latency import LatencyMeter
from vitnas.searching.optuna_search import Nsga2, OptunaSearch, Tpe
from vitnas.searching.pareto import hypervolume, kendall_interval, rank_correlation
from vitnas.searching.random_search import RandomSearch
from vitnas.searching.search import Evaluator, search
from vitnas.searching.searchers import SEARCHERS
from vitnas.searching.study import Study
from vitnas.searching.tokens import TokenClock, TokenSpeed, TokenSpeeds, token_speeds, withdraw_slower
from vitnas.searching.trial import NothingLeftError, Searcher, SearchRecord, Trial, TrialRecord, tried

__all__ = [
    "DEFAULT_OBJECTIVES",
    "SEARCHERS",
    "AutoFormerEvolution",
    "Evaluator",
    "Evolution",
    "Feasibility",
    "FeasibilityRow",
    "Goal",
    "LatencyMeter",
    "NothingLeftError",
    "Nsga2",
    "Objective",
    "OptunaSearch",
    "RandomSearch",
    "SearchRecord",
    "Searcher",
    "Study",
    "TokenClock",
    "TokenSpeed",
    "TokenSpeeds",
    "Tpe",
    "Trial",
    "TrialRecord",
    "ViTResNASEvolution",
    "VitasEvolution",
    "feasibility",
    "hypervolume",
    "kendall_interval",
    "rank_correlation",
    "search",
    "token_speeds",
    "tried",
    "withdraw_slower",
]
