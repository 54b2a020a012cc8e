"""The Tasks: what a network can learn by. Each is a pure function; `fit` runs the networks."""

from vitnas.train.losses.combined_sides import CombinedSides
from vitnas.train.losses.soft import Classification, HardDistillation, Imitation
from vitnas.train.losses.token_mixup import TokenMixup

__all__ = ["Classification", "CombinedSides", "HardDistillation", "Imitation", "TokenMixup"]
