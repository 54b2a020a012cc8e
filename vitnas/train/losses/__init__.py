"""The Tasks: what a network can learn by. Each is a pure function; `fit` runs the networks.

`TASKS` maps a run's word to the configuration that builds one, `TAUGHT_LOSSES` a word of `teacher.losses` to its Task.
The imports of these below are the tables: a new one is one file and one line.
"""

from vitnas.kinds import members
from vitnas.train.losses.combined_sides import CombinedSides as CombinedSides
from vitnas.train.losses.distillation import Distillation as Distillation
from vitnas.train.losses.distillation import TaughtLoss
from vitnas.train.losses.esvit import EsViT as EsViT
from vitnas.train.losses.features import Features as Features
from vitnas.train.losses.keep_ratio import KeepRatio as KeepRatio
from vitnas.train.losses.keep_ratio import KeepRatioConfig as KeepRatioConfig
from vitnas.train.losses.manifold import Manifold as Manifold
from vitnas.train.losses.soft import Classification as Classification
from vitnas.train.losses.soft import ClassificationConfig as ClassificationConfig
from vitnas.train.losses.soft import Hard as Hard
from vitnas.train.losses.soft import Soft as Soft
from vitnas.train.losses.token_mixup import TokenMixup as TokenMixup
from vitnas.train.losses.token_mixup import TokenMixupConfig as TokenMixupConfig
from vitnas.train.losses.tokens import Tokens as Tokens
from vitnas.train.task import TaskConfig

TASKS: dict[str, type[TaskConfig]] = members(TaskConfig, globals(), key="kind")
TAUGHT_LOSSES: dict[str, type[TaughtLoss]] = members(TaughtLoss, globals())
