"""Training: one visible loop for Supernets and Models."""

from vitnas.train.answers import StoredTeacher
from vitnas.train.config import TrainConfig
from vitnas.train.engine import Engine
from vitnas.train.esvit import EsViTConfig, SelfTeacher
from vitnas.train.evaluate import Score, evaluate
from vitnas.train.loop import Fitted, NonFiniteLossError, fit, step_rng
from vitnas.train.losses import (
    TASKS,
    Classification,
    ClassificationConfig,
    CombinedSides,
    Distillation,
    EsViT,
    Features,
    Hard,
    KeepRatio,
    KeepRatioConfig,
    Manifold,
    Soft,
    TokenMixup,
    TokenMixupConfig,
    Tokens,
)
from vitnas.train.monitor import Monitor, convergence_warning
from vitnas.train.progress import ConsoleProgress, Progress, Silent
from vitnas.train.rewiring import Rewiring
from vitnas.train.task import Batch, Task, TaskConfig, TaskGiven
from vitnas.train.teacher import AverageTeacher, Teacher, cosine
from vitnas.train.teaching import TeacherConfig

__all__ = [
    "TASKS",
    "AverageTeacher",
    "Batch",
    "Classification",
    "ClassificationConfig",
    "CombinedSides",
    "ConsoleProgress",
    "Distillation",
    "Engine",
    "EsViT",
    "EsViTConfig",
    "Features",
    "Fitted",
    "Hard",
    "KeepRatio",
    "KeepRatioConfig",
    "Manifold",
    "Monitor",
    "NonFiniteLossError",
    "Progress",
    "Rewiring",
    "Score",
    "SelfTeacher",
    "Silent",
    "Soft",
    "StoredTeacher",
    "Task",
    "TaskConfig",
    "TaskGiven",
    "Teacher",
    "TeacherConfig",
    "TokenMixup",
    "TokenMixupConfig",
    "Tokens",
    "TrainConfig",
    "convergence_warning",
    "cosine",
    "evaluate",
    "fit",
    "step_rng",
]
