"""What a network's features are worth: nearest neighbours, a linear classifier, and how many directions they fill.

`probe` has the whole protocol; `features`, `knn_accuracy`, `linear_probe` and `effective_rank` are its parts.
"""

from __future__ import annotations

from vitnas.probing.features import Features, features
from vitnas.probing.knn import knn_accuracy, knn_votes
from vitnas.probing.linear import Linear, linear_probe
from vitnas.probing.pretrained import Look, Pretrained, PretrainForecast, looks_of
from vitnas.probing.protocol import Judged, Probed, images_seen, probe
from vitnas.probing.rank import effective_rank

__all__ = [
    "Features",
    "Judged",
    "Linear",
    "Look",
    "PretrainForecast",
    "Pretrained",
    "Probed",
    "effective_rank",
    "features",
    "images_seen",
    "knn_accuracy",
    "knn_votes",
    "linear_probe",
    "looks_of",
    "probe",
]
