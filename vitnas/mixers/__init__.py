"""Token mixers, one file each. `MIXERS` maps an Arch's word to its class."""

from __future__ import annotations

from vitnas.mixers.softmax import Softmax

MIXERS: dict[str, type[Softmax]] = {"softmax": Softmax}

__all__ = ["MIXERS", "Softmax"]
