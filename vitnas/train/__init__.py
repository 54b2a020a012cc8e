"""Training: one visible loop for Supernets and Models."""

from vitnas.train.config import TrainConfig
from vitnas.train.engine import Engine
from vitnas.train.evaluate import Score, evaluate
from vitnas.train.hard_distillation import HardDistillation
from vitnas.train.loop import Fitted, NonFiniteLossError, fit, step_rng
from vitnas.train.monitor import Monitor, convergence_warning
from vitnas.train.progress import ConsoleProgress, Progress, Silent
from vitnas.train.rewiring import Rewiring
from vitnas.train.sides import AllSides, all_sides
from vitnas.train.task import Batch, Classification, Mixes, Task
from vitnas.train.token_mixup import TokenMixup

__all__ = [
    "AllSides",
    "Batch",
    "Classification",
    "ConsoleProgress",
    "Engine",
    "Fitted",
    "HardDistillation",
    "Mixes",
    "Monitor",
    "NonFiniteLossError",
    "Progress",
    "Rewiring",
    "Score",
    "Silent",
    "Task",
    "TokenMixup",
    "TrainConfig",
    "all_sides",
    "convergence_warning",
    "evaluate",
    "fit",
    "step_rng",
]
