"""The AutoFormer space: a plain ViT with elastic width, depth, heads and MLP ratio, and 2-D relative positions.

Source: Chen et al., "AutoFormer: Searching Transformers for Visual Recognition" (arXiv 2107.00651), table 1 and the
authors' supernet configurations. Base allows 8, 9 and 10 heads as the paper does (their YAML leaves 8 out). One
embedding width for all blocks; heads are 64 wide whatever the width. Deviations are listed in PAPERS.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vitnas.grids import ImageSize
from vitnas.space.config import WidthsConfig, from_preset
from vitnas.space.gene import Gene
from vitnas.space.space import Space


@dataclass(frozen=True, kw_only=True)
class AutoFormerSpace(Space):
    """Genes: `embed_dim`, `depth`, then `num_heads.i` and `mlp_ratio.i` for each block of the deepest Arch.

    Sizes are in pixels; options must rise.
    """

    kind: ClassVar[str] = "autoformer"
    rising: ClassVar[tuple[str, ...]] = ("embed_dims", "depths", "num_heads", "mlp_ratios")

    name: str = "autoformer"
    image_size: ImageSize = 224
    patch_size: int = 16
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    head_dim: int = 64
    relative_position: int = 14

    def declared(self) -> Iterator[Gene]:
        yield Gene("embed_dim", self.embed_dims, structural=True, scope="stage")
        yield Gene("depth", self.depths, structural=True, scope="stage")
        for slot in range(self.depths[-1]):
            yield Gene(f"num_heads.{slot}", self.num_heads, scope="block", slot=slot)
            yield mlp_ratio(slot, self.mlp_ratios)

    def fixed_blocks(self) -> Sequence[Sequence[dict[str, Any]]]:
        return [[{"head_dim": self.head_dim}] * self.depths[-1]]

    def fixed(self) -> dict[str, Any]:
        return {
            "patch_size": self.patch_size,
            "relative_position": self.relative_position,
            "global_pool": "avg",
            "norm_eps": 1e-5,
        }


def mlp_ratio(slot: int, ratios: tuple[float, ...]) -> Gene:
    """The gene of a block's hidden units, as shares of its stage's width."""
    return Gene(f"mlp_ratio.{slot}", ratios, scope="block", field="mlp_hidden", slot=slot, shares=True)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dims": (192, 216, 240),
        "depths": (12, 13, 14),
        "num_heads": (3, 4),
        "mlp_ratios": (3.5, 4.0),
    },
    "small": {
        "embed_dims": (320, 384, 448),
        "depths": (12, 13, 14),
        "num_heads": (5, 6, 7),
        "mlp_ratios": (3.0, 3.5, 4.0),
    },
    "base": {
        "embed_dims": (528, 576, 624),
        "depths": (14, 15, 16),
        "num_heads": (8, 9, 10),
        "mlp_ratios": (3.0, 3.5, 4.0),
    },
    # Ours, for images of 8 to 64 pixels: the same genes around a sixth of tiny's cost per token.
    "micro": {
        "embed_dims": (48, 64, 80),
        "depths": (4, 5, 6),
        "num_heads": (2, 3, 4),
        "mlp_ratios": (2.0, 3.0, 4.0),
        "head_dim": 16,
        "patch_size": 2,
    },
}


def autoformer(size: str = "tiny", **options: Any) -> AutoFormerSpace:
    """The AutoFormer space `tiny`, `small` or `base` (the paper's), or `micro` (ours), for any images.

    Args:
        size: which published space the options start from.
        options: fields of `AutoFormerSpace` (image_size, num_classes, embed_dims, depths, ...).

    Raises:
        UserError: unknown size or option, sizes that do not fit.

    >>> autoformer("tiny").size()
    1056964608
    """
    return AutoFormerSpace(**from_preset(AutoFormerSpace, SIZES, size, options))


@dataclass(frozen=True, kw_only=True)
class AutoFormerConfig(WidthsConfig):
    """An AutoFormer space, `tiny`, `small`, `base` or `micro`; options left at None are the preset's."""

    kind = AutoFormerSpace.kind
    space = AutoFormerSpace
    sizes = SIZES
    make = staticmethod(autoformer)

    relative_position: int | None = None
