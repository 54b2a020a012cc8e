"""Data: dataset strings in, deterministic batches out; the test split stays behind a logged door."""

from vitnas.data.batches import TrainBatches
from vitnas.data.config import AUGMENTS, Augment, DataConfig
from vitnas.data.given import as_data
from vitnas.data.images import (
    EvalBatches,
    Images,
    are_numbers,
    has_labels,
    has_one_class,
    require_labels,
    require_not_test,
    require_one_class,
)
from vitnas.data.open import Data, Fingerprint, Readings, open_data
from vitnas.data.synthetic import synthetic

__all__ = [
    "AUGMENTS",
    "Augment",
    "Data",
    "DataConfig",
    "EvalBatches",
    "Fingerprint",
    "Images",
    "Readings",
    "TrainBatches",
    "are_numbers",
    "as_data",
    "has_labels",
    "has_one_class",
    "open_data",
    "require_labels",
    "require_not_test",
    "require_one_class",
    "synthetic",
]
