"""The Tasks: what a network can learn by. Each is a pure function; `fit` runs the networks.

`TASKS` maps a run's word to the configuration that builds one. The imports of configurations below are the table: a new
Task is one file and one line.
"""

from vitnas.kinds import members
from vitnas.train.losses.combined_sides import CombinedSides as CombinedSides
from vitnas.train.losses.soft import Classification as Classification
from vitnas.train.losses.soft import ClassificationConfig as ClassificationConfig
from vitnas.train.losses.soft import HardDistillation as HardDistillation
from vitnas.train.losses.soft import HardDistillationConfig as HardDistillationConfig
from vitnas.train.losses.soft import Imitation as Imitation
from vitnas.train.losses.token_mixup import TokenMixup as TokenMixup
from vitnas.train.losses.token_mixup import TokenMixupConfig as TokenMixupConfig
from vitnas.train.task import TaskConfig

TASKS: dict[str, type[TaskConfig]] = members(TaskConfig, globals(), key="kind")
