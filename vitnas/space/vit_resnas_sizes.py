"""The authors' supernet configurations of ViT-ResNAS by name, and `micro`, a parametric one for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitnas.errors import UserError, nearest
from vitnas.space.vit_resnas import StageSpace, ViTResNASSpace


def _stage(
    depth: int,
    embed_dims: Sequence[int],
    inner: Sequence[int],
    head_dim: int,
    mlp_hidden: Sequence[int],
    skip: Sequence[tuple[int, float]] = (),
) -> StageSpace:
    """Options as in the paper's table, falling; `inner` are attention widths, all heads together."""
    return StageSpace(
        depth=depth,
        embed_dims=tuple(embed_dims[::-1]),
        num_heads=tuple(width // head_dim for width in inner[::-1]),
        head_dim=head_dim,
        mlp_hidden=tuple(mlp_hidden[::-1]),
        skip=tuple(skip),
    )


def _every_second(chance: float, blocks: Sequence[int] = (1, 3, 5)) -> list[tuple[int, float]]:
    return [(block, chance) for block in blocks]


_HALF, _QUARTER = _every_second(1 / 2), _every_second(1 / 4)
_TINY_DIMS = ((256, 224, 192, 176, 160), (512, 448, 384, 352, 320), (1024, 896, 768, 704, 640))
_TINY_MLP = tuple(tuple(width * n // 12 for n in (12, 11, 10, 9, 8, 7, 6)) for width in (768, 1536, 3072))
_TINY_MLP_FOUR = tuple(tuple(width * n // 12 for n in (12, 10, 8, 6)) for width in (768, 1536, 3072))
_SMALL_DIMS = ((320, 280, 240, 220, 200), (640, 560, 480, 440, 400), (1280, 1120, 960, 880, 800))
_SMALL_MLP = tuple(tuple(width * n // 12 for n in (12, 11, 10, 9, 8, 7, 6)) for width in (960, 1920, 3840))
_MH_SMALL_INNER = ((256, 224, 192, 160), (768, 672, 576, 480), (1024, 896, 768, 640))
_MH_TINY_INNER = ((192, 160, 128, 96), (576, 480, 384, 288), (768, 640, 512, 384))
_HEADS = (32, 48, 64)
_DEEP = _every_second(1 / 4, (3, 5, 7, 9, 11, 13))
_CONV, _LINEAR = {"stem": "conv", "stem_width": 24}, {"stem": "linear", "stem_width": 0}

SIZES: dict[str, dict[str, Any]] = {
    "sr_tiny_mh": {
        **_CONV,
        "stages": tuple(
            _stage(6, *options, skip=_HALF)
            for options in zip(_TINY_DIMS, _MH_TINY_INNER, _HEADS, _TINY_MLP, strict=True)
        ),
    },
    "sr_small_mh": {
        **_CONV,
        "stages": tuple(
            _stage(7, *options, skip=_HALF)
            for options in zip(_SMALL_DIMS, _MH_SMALL_INNER, _HEADS, _SMALL_MLP, strict=True)
        ),
    },
    "sr_small": {
        "stem": "conv",
        "stem_width": 32,
        "stages": tuple(
            _stage(7, *options, skip=_HALF)
            for options in zip(
                _SMALL_DIMS, (_MH_SMALL_INNER[0], *_MH_TINY_INNER[1:]), _HEADS, _SMALL_MLP, strict=True
            )
        ),
    },
    "sr_tiny": {
        **_LINEAR,
        "stages": (
            _stage(7, _TINY_DIMS[0], (256, 192, 128), 64, _TINY_MLP_FOUR[0], _QUARTER),
            _stage(7, _TINY_DIMS[1], (512, 384, 256), 64, _TINY_MLP_FOUR[1], _QUARTER),
            _stage(4, _TINY_DIMS[2], (768, 640, 512), 64, _TINY_MLP_FOUR[2]),
        ),
    },
    "sr_tiny_666": {
        **_LINEAR,
        "stages": (
            _stage(6, _TINY_DIMS[0], (256, 192, 128), 64, _TINY_MLP[0], _HALF),
            _stage(6, _TINY_DIMS[1], (512, 384, 256), 64, _TINY_MLP[1], _HALF),
            _stage(6, _TINY_DIMS[2], (768, 640, 512, 384), 64, _TINY_MLP[2], _HALF),
        ),
    },
    "tiny": {
        **_LINEAR,
        "stages": (
            _stage(
                14,
                (240, 224, 208, 192),
                (512, 384, 256, 128),
                64,
                (1024, 768, 512, 256),
                [(3, 1 / 3), (4, 1 / 2), (7, 1 / 3), (8, 1 / 2), (11, 1 / 3), (12, 1 / 2)],
            ),
        ),
    },
    "tiny_deep": {
        **_LINEAR,
        "stages": (_stage(16, (240, 224, 208, 192), (384, 320, 256, 192), 64, (960, 800, 640, 480), _DEEP),),
    },
    "small_deep": {
        **_LINEAR,
        "stages": (
            _stage(16, (384, 352, 320, 288), (512, 448, 384, 320), 64, (1536, 1280, 1024, 768), _DEEP),
        ),
    },
}
MICRO: dict[str, Any] = {
    "embed_dims": (24, 32, 40, 48),
    "depths": (3, 3, 3),
    "num_heads": (1, 2, 3),
    "mlp_ratios": (1.0, 2.0, 3.0),
    "head_dim": 16,
    "stem_width": 12,
}
"""Ours, for images of 8 to 64 pixels: about a thirtieth of sr_tiny_mh's cost per token."""


def micro_stages(
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratios: Sequence[float],
    head_dim: int,
    skip: float,
) -> tuple[StageSpace, ...]:
    """Stages in the paper's proportions, from the options of the first.

    From stage to stage widths and hidden units double and heads grow by half; every second block may be left out with
    chance `skip` (0: none).

    Args:
        embed_dims, num_heads: options of the first stage.
        depths: blocks per stage.
        mlp_ratios: hidden units over the stage's widest embedding.
    """
    return tuple(
        StageSpace(
            depth=depth,
            embed_dims=tuple(dim << s for dim in embed_dims),
            num_heads=tuple(round(heads * 1.5**s) if s else heads for heads in num_heads),
            head_dim=head_dim,
            mlp_hidden=tuple(int((embed_dims[-1] << s) * ratio) for ratio in mlp_ratios),
            skip=tuple((block, skip) for block in range(1, depth, 2)) if skip else (),
        )
        for s, depth in enumerate(depths)
    )


def vit_resnas(
    size: str = "sr_tiny_mh",
    *,
    image_size: int = 224,
    patch_size: int | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    **options: Any,
) -> ViTResNASSpace:
    """The ViT-ResNAS space of that name (the authors' configurations), or `micro` (ours), for any images.

    Args:
        size: which space the options start from.
        image_size, patch_size: in pixels; the patch, and the grid's halvings, must divide the image. The authors' patch
            is 14, and 16 in the flat spaces.
        options: fields of `ViTResNASSpace`; for `micro` also `embed_dims`, `depths`, `num_heads`, `mlp_ratios`,
            `head_dim` and `skip` (see `micro_stages`).

    Raises:
        UserError: unknown size or option, sizes that do not fit.

    >>> f"{vit_resnas('sr_tiny_mh').size():.1e}"
    '1.9e+28'
    """
    known = (*SIZES, "micro")
    if size not in known:
        raise UserError(f"size is {size!r}; vit_resnas has {', '.join(known)}.{nearest(size, known)}")
    shaping = (*(name for name in MICRO if name != "stem_width"), "skip")
    fields = (*ViTResNASSpace.__dataclass_fields__, *shaping)
    for name in options:
        if name not in fields:
            raise UserError(f"the vit_resnas space has no option {name!r}.{nearest(name, fields)}")
    if size == "micro":
        chosen = {**MICRO, "skip": 0.5, **options}
        made: dict[str, Any] = {"stem": "conv", "stem_width": chosen["stem_width"]}
        made["stages"] = micro_stages(**{name: chosen[name] for name in shaping})
    elif given := [name for name in options if name in shaping]:
        raise UserError(
            f"{', '.join(given)} cannot be given with size {size!r}, which fixes its widths as published. Use size "
            "'micro', or give `stages`."
        )
    else:
        made = dict(SIZES[size])
    made |= {name: value for name, value in options.items() if name not in shaping}
    patch = 16 if len(made["stages"]) == 1 else 14
    return ViTResNASSpace(
        **{
            "name": f"vit_resnas_{size}",
            "image_size": image_size,
            "patch_size": patch_size or patch,
            "num_classes": num_classes,
            "in_chans": in_chans,
            **made,
        }
    )
