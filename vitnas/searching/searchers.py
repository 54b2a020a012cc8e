"""`SEARCHERS`: Searchers by their words.

The imports below are the table: a new Searcher is one file and one line.
"""

from __future__ import annotations

from vitnas.kinds import members
from vitnas.searching.evolution import AutoFormerEvolution as AutoFormerEvolution
from vitnas.searching.evolution import Evolution as Evolution
from vitnas.searching.evolution import VitasEvolution as VitasEvolution
from vitnas.searching.evolution import ViTResNASEvolution as ViTResNASEvolution
from vitnas.searching.halving import GuidedHalving as GuidedHalving
from vitnas.searching.halving import Halving as Halving
from vitnas.searching.optuna_search import GaussianProcess as GaussianProcess
from vitnas.searching.optuna_search import Nsga2 as Nsga2
from vitnas.searching.optuna_search import Nsga3 as Nsga3
from vitnas.searching.optuna_search import Tpe as Tpe
from vitnas.searching.policy_search import PolicySearch as PolicySearch
from vitnas.searching.predictor_search import PredictorSearch as PredictorSearch
from vitnas.searching.random_search import RandomSearch as RandomSearch
from vitnas.searching.trial import NamedSearcher

SEARCHERS: dict[str, type[NamedSearcher]] = members(NamedSearcher, globals())
