"""One set of weights for a whole Space: shared tensors, and one rule that says whose weights an Arch uses."""

from vitnas.supernet.pretrained import start_from_timm
from vitnas.supernet.sharing import (
    AUTOFORMER_OFFICIAL,
    PRIVATE_HEADS,
    PRIVATE_TOKENS,
    Bilateral,
    Coupled,
    Coupling,
    Cyclic,
    Place,
    Prefix,
    Private,
    Sharing,
    cyclic_axes,
    make_sharing,
)
from vitnas.supernet.supernet import Supernet, select

__all__ = [
    "AUTOFORMER_OFFICIAL",
    "PRIVATE_HEADS",
    "PRIVATE_TOKENS",
    "Bilateral",
    "Coupled",
    "Coupling",
    "Cyclic",
    "Place",
    "Prefix",
    "Private",
    "Sharing",
    "Supernet",
    "cyclic_axes",
    "make_sharing",
    "select",
    "start_from_timm",
]
