"""What a layer costs."""

from __future__ import annotations

from typing import NamedTuple


class LayerCost(NamedTuple):
    """Multiply-accumulates of one image, parameters, and elements alive at the peak; each layer says whether its input
    is among these."""

    macs: int
    params: int
    memory: int
