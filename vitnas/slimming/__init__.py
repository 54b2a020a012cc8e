"""Slimming a trained network: what matters, in which order, what may go, and how to make up for it. No training."""

from vitnas.slimming.agreement import Agreement, agreement
from vitnas.slimming.allocation import PredictedDamage, allocate
from vitnas.slimming.folding import fold
from vitnas.slimming.images import Images
from vitnas.slimming.importance import IMPORTANCE, Importance, Scores
from vitnas.slimming.ordering import ordered
from vitnas.slimming.sensitivity import Sensitivity, sensitivity

__all__ = [
    "IMPORTANCE",
    "Agreement",
    "Images",
    "Importance",
    "PredictedDamage",
    "Scores",
    "Sensitivity",
    "agreement",
    "allocate",
    "fold",
    "ordered",
    "sensitivity",
]
