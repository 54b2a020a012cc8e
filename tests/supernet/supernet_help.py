"""A small Space that the Supernet tests share."""

from __future__ import annotations

from vitnas.space import vitas

# Views cut to these widths are not aligned, and kernels may be chosen by that.
ODD_WIDTHS = vitas(
    "micro",
    image_size=8,
    num_classes=5,
    in_chans=1,
    num_slots=2,
    ratios=(0.25, 0.5, 1.0),
    widest=(12, 16, 20),
)
