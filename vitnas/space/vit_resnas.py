"""The ViT-ResNAS spaces: several stages with elastic widths, heads, hidden units and blocks that may be left out.

Source: Liao, Karaman, Sze, "Searching for Efficient Multi-Stage Vision Transformers" (arXiv 2109.00642), table 1, and
the authors' supernet configurations. A stage has one embedding width; heads and hidden units are chosen per block.
Where two blocks that may be left out follow each other, the second goes with the first. Deviations: PAPERS.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from vitnas.arch import Reduction, Stem
from vitnas.errors import UserError
from vitnas.grids import ImageSize
from vitnas.space.config import WidthsConfig, from_preset
from vitnas.space.gene import Gene
from vitnas.space.space import Space, check_blocks, rising


@dataclass(frozen=True, kw_only=True)
class StageSpace:
    """Options of one stage, rising. `skip` has (block number, chance of leaving it out), counted from 0."""

    depth: int
    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    head_dim: int
    mlp_hidden: tuple[int, ...]
    skip: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("embed_dims", "num_heads", "mlp_hidden"):
            object.__setattr__(self, name, rising(name, getattr(self, name)))
        check_blocks(self.depth)
        object.__setattr__(self, "skip", tuple((int(block), float(chance)) for block, chance in self.skip))
        blocks = [block for block, _ in self.skip]
        if sorted(set(blocks)) != blocks or any(not 0 <= block < self.depth for block in blocks):
            raise UserError(
                f"skip names blocks {blocks}; they must rise and lie in 0 to {self.depth - 1}. Mend them."
            )
        if len(blocks) >= self.depth or any(not 0 < chance < 1 for _, chance in self.skip):
            raise UserError(
                f"skip is {self.skip} for {self.depth} blocks; one block must stay, and chances lie between 0 and 1. "
                "Mend it."
            )


@dataclass(frozen=True, kw_only=True)
class ViTResNASSpace(Space):
    """Genes, stage by stage: `embed_dim.s`, and per block `exists.s.i` (if it may be left out), `num_heads.s.i` and
    `mlp_hidden.s.i`. Sizes are in pixels."""

    kind: ClassVar[str] = "vit_resnas"
    is_staged = True

    name: str = "vit_resnas"
    image_size: ImageSize = 224
    patch_size: int = 14
    stages: tuple[StageSpace, ...]
    stem: Stem = "conv"
    stem_width: int = 24
    reduction: Reduction = "residual"
    distill_token: bool = False
    patch_head: bool = False

    def _check(self) -> None:
        stages: list[Any] = list(self.stages)
        made = [stage if isinstance(stage, StageSpace) else StageSpace(**stage) for stage in stages]
        object.__setattr__(self, "stages", tuple(made))
        for before, behind in pairwise(made):
            if self.reduction == "residual" and behind.embed_dims[0] < before.embed_dims[-1]:
                raise UserError(
                    f"a stage may be {behind.embed_dims[0]} wide behind one of {before.embed_dims[-1]}; a residual "
                    "reduction cannot narrow. Raise its embed_dims, or use reduction='conv'."
                )

    def declared(self) -> Iterator[Gene]:
        for s, stage in enumerate(self.stages):
            yield Gene(f"embed_dim.{s}", stage.embed_dims, structural=True, scope="stage", stage=s)
            chances = dict(stage.skip)
            for i in range(stage.depth):
                place: dict[str, Any] = {"scope": "block", "stage": s, "slot": i}
                if i in chances:
                    yield Gene(
                        f"exists.{s}.{i}",
                        (False, True),
                        structural=True,
                        weights=(chances[i], 1 - chances[i]),
                        flips=True,
                        follows=i - 1 in chances,
                        **place,
                    )
                yield Gene(f"num_heads.{s}.{i}", stage.num_heads, **place)
                yield Gene(f"mlp_hidden.{s}.{i}", stage.mlp_hidden, **place)

    def fixed_blocks(self) -> Sequence[Sequence[dict[str, Any]]]:
        return [[{"head_dim": stage.head_dim}] * stage.depth for stage in self.stages]

    def fixed(self) -> dict[str, Any]:
        names = ("patch_size", "stem", "stem_width", "reduction", "distill_token", "patch_head")
        return {name: getattr(self, name) for name in names}


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
# Ours, for images of 8 to 64 pixels: about a thirtieth of sr_tiny_mh's cost per token.
_MICRO: dict[str, Any] = {
    "embed_dims": (24, 32, 40, 48),
    "depths": (3, 3, 3),
    "num_heads": (1, 2, 3),
    "mlp_ratios": (1.0, 2.0, 3.0),
    "head_dim": 16,
    "skip": 0.5,
}
SIZES["micro"] = {"stem": "conv", "stem_width": 12, "patch_size": 2}


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


def vit_resnas(size: str = "sr_tiny_mh", **options: Any) -> ViTResNASSpace:
    """The ViT-ResNAS space of that name (the authors' configurations), or `micro` (ours), for any images.

    Args:
        size: which space the options start from.
        options: fields of `ViTResNASSpace` (the authors' patch is 14, and 16 in the flat spaces); for `micro` also
            `embed_dims`, `depths`, `num_heads`, `mlp_ratios`, `head_dim` and `skip` (see `micro_stages`).

    Raises:
        UserError: unknown size or option, sizes that do not fit.

    >>> f"{vit_resnas('sr_tiny_mh').size():.1e}"
    '1.9e+28'
    """
    made = from_preset(ViTResNASSpace, SIZES, size, options, also=_MICRO)
    shaping = {name: made.pop(name) for name in _MICRO if name in made}
    if shaping and "stages" in made:
        raise UserError(
            f"{', '.join(shaping)} cannot be given with size {size!r}, which fixes its widths as published. Use size "
            "'micro', or give `stages`."
        )
    if size == "micro":
        made.setdefault("stages", micro_stages(**{**_MICRO, **shaping}))
    made.setdefault("patch_size", 16 if len(made["stages"]) == 1 else 14)
    return ViTResNASSpace(**made)


@dataclass(frozen=True, kw_only=True)
class ViTResNASConfig(WidthsConfig):
    """A ViT-ResNAS space by name; options left at None are the preset's.

    Widths, depths, heads, ratios and `skip` go with size `micro` (options of the first stage, see `micro_stages`).
    """

    kind = ViTResNASSpace.kind
    space = ViTResNASSpace
    sizes = SIZES
    make = staticmethod(vit_resnas)

    skip: float | None = None
