"""The ViTAS space: patch size, one embedding width, and per slot a block with its heads and widths, or the identity.

Source: Su et al., "ViTAS: Vision Transformer Architecture Search" (arXiv 2106.13700), section 3, and the authors'
configurations for the published sizes. Head counts divide a block's inner width anew, they do not change it. With
`shifted` blocks move up over identities, so that equal networks are one Arch and one set of weights (identity
shifting of the ECCV version); without it every kept block remembers its slot, as in the first version, whose
published nets these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vitnas.arch import AttnScale
from vitnas.errors import UserError
from vitnas.grids import ImageSize, sides_of, size_text
from vitnas.model.net_id import NUM_HEADS, TENTHS
from vitnas.space.config import SpaceConfig, from_preset
from vitnas.space.gene import Gene, Matrix
from vitnas.space.space import Space, check_blocks


@dataclass(frozen=True, kw_only=True)
class VitasSpace(Space):
    """Genes: `patch_size` (coarse to fine), `embed_dim`, `depth` (identities, shifted), then for every slot `keep.i`
    (identities, not shifted), `num_heads.i`, `inner_dim.i` and `mlp_hidden.i`.

    Sizes are in pixels; options must rise. `inner_dims` are the widths of q, k and v each.
    """

    kind: ClassVar[str] = "vitas"
    merged: ClassVar[Mapping[str, tuple[str, ...]]] = {"inner": ("heads", "head_dim")}
    rising: ClassVar[tuple[str, ...]] = (
        "patch_sizes",
        "embed_dims",
        "num_heads",
        "inner_dims",
        "mlp_hiddens",
    )

    name: str = "vitas"
    image_size: ImageSize = 224
    patch_sizes: tuple[int, ...]
    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    inner_dims: tuple[int, ...]
    mlp_hiddens: tuple[int, ...]
    num_slots: int
    identity: bool = True
    shifted: bool = True
    attn_scale: AttnScale = "head_dim"

    def _check(self) -> None:
        check_blocks(self.num_slots)
        if self.num_slots < 1:
            raise UserError(f"num_slots is {self.num_slots}; a network has at least 1. Use 12.")
        for size in self.patch_sizes:
            sides = sides_of(self.image_size)
            if any(side % size for side in sides):
                fits = [n for n in range(1, min(sides) + 1) if not any(side % n for side in sides)]
                near = min(fits, key=lambda n: abs(n - size))
                raise UserError(
                    f"patch_sizes has {size}; it must divide image_size {size_text(self.image_size)}. Nearest: {near}."
                )
        step = int(np.lcm.reduce(self.num_heads))
        for width in self.inner_dims:
            if width % step:
                heads = ", ".join(map(str, self.num_heads))
                near = max(1, round(width / step)) * step
                raise UserError(
                    f"inner_dims has {width}; it must be a multiple of every num_heads ({heads}). Nearest: {near}."
                )

    def declared(self) -> Iterator[Gene]:
        yield Gene("patch_size", self.patch_sizes[::-1], structural=True, apart=True)
        yield Gene("embed_dim", self.embed_dims, structural=True, scope="stage")
        if self.identity and self.shifted:
            yield Gene("depth", tuple(range(1, self.num_slots + 1)), structural=True, scope="stage")
        for i in range(self.num_slots):
            if self._has_keep:
                yield Gene(f"keep.{i}", (False, True), structural=True, scope="block", field="exists", slot=i)
            yield Gene(f"num_heads.{i}", self.num_heads, scope="block", slot=i, apart=True)
            yield Gene(f"inner_dim.{i}", self.inner_dims, scope="block", slot=i)
            yield Gene(f"mlp_hidden.{i}", self.mlp_hiddens, scope="block", slot=i)

    @property
    def _has_keep(self) -> bool:
        return self.identity and not self.shifted

    def fixed_blocks(self) -> Sequence[Sequence[dict[str, Any]]]:
        return [[{}] * self.num_slots]

    def fixed(self) -> dict[str, Any]:
        return {"head_norm_eps": 1e-5, "attn_scale": self.attn_scale}

    def with_identities(self, genes: Matrix, skipped: npt.NDArray[np.bool_]) -> Matrix:
        """Canonical genes in which the slots of `skipped` (n, num_slots) hold the identity, and only these.

        Raises:
            UserError: the space has no identity.
        """
        if not self.identity:
            raise UserError(
                f"{self.name} has no identity; nothing can be skipped. Use a space with identity=true."
            )
        genes = genes.copy()
        if self._has_keep:
            genes[:, 2 : 2 + 4 * self.num_slots : 4] = ~skipped
        else:
            genes[:, 2] = np.maximum(0, (~skipped).sum(axis=1) - 1)
        return self.canonical_matrix(genes)


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


def vitas(size: str = "1g", *, patch_size: int | None = None, **options: Any) -> VitasSpace:
    """The ViTAS space `1g`, `1.3g` or `4.9g` (the authors'), or `mini` and `micro` (ours), for any images.

    Args:
        size: where the options start from.
        patch_size: in pixels; one patch size instead of the size's several (`patch_sizes` gives others).
        options: fields of `VitasSpace` (image_size, num_classes, embed_dims, num_slots, shifted, ...); also `widest`,
            the largest embedding, inner (q, k and v each) and MLP width, and `ratios`, the options of all three as
            shares of it.

    Raises:
        UserError: unknown size or option, sizes that do not fit.

    >>> f"{vitas('1g').size():.1e}"
    '1.3e+43'
    """
    if patch_size is not None:
        options.setdefault("patch_sizes", (patch_size,))
    made = from_preset(VitasSpace, SIZES, size, options, also=("widest", "ratios"))
    most, shares = tuple(made.pop("widest")), tuple(made.pop("ratios"))
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
    return VitasSpace(**{**widths, **made})


@dataclass(frozen=True, kw_only=True)
class VitasConfig(SpaceConfig):
    """A ViTAS space, `1g`, `1.3g`, `4.9g`, `mini` or `micro`; options left at None are the preset's.

    `patch_size` is short for one of `patch_sizes`, `widest` and `ratios` for all three widths; `inner_dims` are of q, k
    and v each.
    """

    kind = VitasSpace.kind
    space = VitasSpace
    sizes = SIZES
    make = staticmethod(vitas)

    patch_size: int | None = None
    patch_sizes: tuple[int, ...] | None = None
    widest: tuple[int, int, int] | None = None
    ratios: tuple[float, ...] | None = None
    embed_dims: tuple[int, ...] | None = None
    num_heads: tuple[int, ...] | None = None
    inner_dims: tuple[int, ...] | None = None
    mlp_hiddens: tuple[int, ...] | None = None
    num_slots: int | None = None
    identity: bool | None = None
    shifted: bool | None = None
