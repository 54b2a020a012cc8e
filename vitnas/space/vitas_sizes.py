"""ViTAS spaces by name: the published ones, and two of ours for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitnas.errors import UserError, nearest
from vitnas.model.net_id import NUM_HEADS, TENTHS
from vitnas.space.vitas import VitasSpace

PERCENTAGES = tuple((index + 1) / TENTHS for index in range(TENTHS))
_PUBLISHED: dict[str, Any] = {
    "ratios": PERCENTAGES,
    "num_heads": NUM_HEADS,
    "shifted": False,
    "attn_scale": "embed_dim",
}

# `widest` are the largest embedding, inner (q, k and v each) and MLP widths, of which `ratios` give the options.
SIZES: dict[str, dict[str, Any]] = {
    # behind ViTAS-A, -B and -E (the authors' 858M, 1G and 2.7G)
    "1g": {**_PUBLISHED, "widest": (384, 480, 1440), "patch_sizes": (14, 16, 32), "num_slots": 16},
    # behind ViTAS-C
    "1.3g": {
        **_PUBLISHED,
        "widest": (384, 480, 1440),
        "patch_sizes": (16,),
        "num_slots": 12,
        "identity": False,
    },
    # behind ViTAS-F
    "4.9g": {
        **_PUBLISHED,
        "widest": (768, 960, 2880),
        "patch_sizes": (14, 16, 32),
        "num_slots": 13,
        "identity": False,
    },
    # ours, for images of about 32 pixels
    "mini": {
        "widest": (192, 192, 576),
        "ratios": (0.25, 0.5, 0.75, 1.0),
        "patch_sizes": (4, 8),
        "num_heads": (3, 6),
        "num_slots": 8,
    },
    # ours, for images of about 8 pixels
    "micro": {
        "widest": (64, 64, 192),
        "ratios": (0.25, 0.5, 0.75, 1.0),
        "patch_sizes": (2, 4),
        "num_heads": (2, 4),
        "num_slots": 5,
    },
}


def vitas(
    size: str = "1g",
    *,
    image_size: int = 224,
    patch_size: int | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    widest: Sequence[int] | None = None,
    ratios: Sequence[float] | None = None,
    **options: Any,
) -> VitasSpace:
    """The ViTAS space `1g`, `1.3g` or `4.9g` (the authors'), or `mini` and `micro` (ours), for any images.

    Args:
        size: where the options start from.
        image_size: in pixels.
        patch_size: in pixels; one patch size instead of the size's several (`patch_sizes` gives others).
        widest: largest embedding, inner (q, k and v each) and MLP width.
        ratios: options of all three widths, as shares of `widest`.
        options: other fields of `VitasSpace` (patch_sizes, embed_dims, num_heads, inner_dims, num_slots, shifted, ...).

    Raises:
        UserError: unknown size or option, sizes that do not fit.

    >>> f"{vitas('1g').size():.1e}"
    '1.3e+43'
    """
    if size not in SIZES:
        raise UserError(f"size is {size!r}; vitas has {', '.join(SIZES)}.{nearest(size, SIZES)}")
    known = VitasSpace.__dataclass_fields__
    for name in options:
        if name not in known:
            raise UserError(f"the vitas space has no option {name!r}.{nearest(name, known)}")
    preset = dict(SIZES[size])
    most = tuple(preset.pop("widest") if widest is None else widest)
    shares = tuple(preset.pop("ratios") if ratios is None else ratios)
    preset.pop("ratios", None)
    preset.pop("widest", None)
    if len(most) != 3:
        raise UserError(
            f"widest is {most}; it must be three widths: of the embedding, of q, k and v each, of the MLP. Give three."
        )
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UserError(
            f"ratios is {shares}; shares of the widest lie above 0 and up to 1. Use 0.25, 0.5, 1.0."
        )
    widths = {
        name: tuple(dict.fromkeys(round(share * width) for share in shares))
        for name, width in zip(("embed_dims", "inner_dims", "mlp_hiddens"), most, strict=True)
    }
    if patch_size is not None:
        options.setdefault("patch_sizes", (patch_size,))
    return VitasSpace(
        **{
            "name": f"vitas_{size}",
            "image_size": image_size,
            "num_classes": num_classes,
            "in_chans": in_chans,
            **preset,
            **widths,
            **options,
        }
    )
