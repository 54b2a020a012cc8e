"""Slimming a trained network: what matters, in which order, what may go, and how to make up for it. No training."""

from vitnas.slimming.agreement import Agreement, agreement
from vitnas.slimming.allocation import PredictedDamage, allocate
from vitnas.slimming.folding import fold
from vitnas.slimming.images import Images
from vitnas.slimming.importance import IMPORTANCE, Importance, Scores
from vitnas.slimming.ordering import ordered
from vitnas.slimming.patch_prediction import Prediction
from vitnas.slimming.patches import BlockTuning, Slimmed, slim_patches
from vitnas.slimming.sensitivity import Sensitivity, sensitivity

__all__ = [
    "IMPORTANCE",
    "Agreement",
    "BlockTuning",
    "Images",
    "Importance",
    "PredictedDamage",
    "Prediction",
    "Scores",
    "Sensitivity",
    "Slimmed",
    "agreement",
    "allocate",
    "fold",
    "ordered",
    "sensitivity",
    "slim_patches",
]
