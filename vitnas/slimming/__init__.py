"""Slimming a trained network: what matters, in which order, what may go, and how to make up for it: in closed form, and
then, where there is time, by training (`recover`)."""

from vitnas.slimming.agreement import Agreement, Standing, agreement, standings
from vitnas.slimming.allocation import PredictedDamage, allocate
from vitnas.slimming.elastic import elastic_task, train_elastic
from vitnas.slimming.folding import fold
from vitnas.slimming.images import Images
from vitnas.slimming.importance import IMPORTANCE, Importance, Scores
from vitnas.slimming.ordering import ordered
from vitnas.slimming.patch_prediction import Prediction
from vitnas.slimming.patches import BlockTuning, Slimmed, slim_patches
from vitnas.slimming.recovery import RECOVERY, Recovery, recover, recovery_task, step_seconds
from vitnas.slimming.sensitivity import Sensitivity, sensitivity

__all__ = [
    "IMPORTANCE",
    "RECOVERY",
    "Agreement",
    "BlockTuning",
    "Images",
    "Importance",
    "PredictedDamage",
    "Prediction",
    "Recovery",
    "Scores",
    "Sensitivity",
    "Slimmed",
    "Standing",
    "agreement",
    "allocate",
    "elastic_task",
    "fold",
    "ordered",
    "recover",
    "recovery_task",
    "sensitivity",
    "slim_patches",
    "standings",
    "step_seconds",
    "train_elastic",
]
