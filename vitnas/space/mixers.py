"""The space of mixers: a ViT in which each block's token mixer is a gene, beside its heads and MLP, and the stem and
the kind of positions of the whole net.

Source of the parts: Vision X-formers (arXiv 2107.02239) and the mixers' papers (`vitnas/mixers`). The space is ours.
Nets have no class token and take the mean over patches, so that every mixer fits. A Supernet shares `qkv` and `proj`
across mixers; what a mixer alone owns has a name of its own and so is private to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, ClassVar

from vitnas.counting import parts
from vitnas.errors import UserError, check_words
from vitnas.grids import ImageSize, as_image_size, sides_of
from vitnas.mixers import MIXERS
from vitnas.space.autoformer import mlp_ratio
from vitnas.space.config import WidthsConfig, from_preset
from vitnas.space.gene import Gene
from vitnas.space.space import Space


@dataclass(frozen=True, kw_only=True)
class MixerSpace(Space):
    """Genes: `stem`, `position`, `embed_dim`, `depth`, then `mixer.i`, `num_heads.i`, `mlp_ratio.i` per block.

    Heads do not matter to mixers without heads. `mixer_sizes` are pairs of a mixer's word and its own number; mixers
    that are left out take their default.
    """

    kind: ClassVar[str] = "mixers"
    rising: ClassVar[tuple[str, ...]] = ("embed_dims", "depths", "num_heads", "mlp_ratios")

    name: str = "mixers"
    image_size: ImageSize = 32
    patch_size: int = 4
    num_classes: int = 10
    stems: tuple[str, ...]
    positions: tuple[str, ...]
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    mixers: tuple[str, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    head_dim: int = 16
    mixer_sizes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for position, mixer in product(range(len(self.positions)), self.mixers):
            self.largest_macs(mixer, position)  # counting checks the sizes of mixers

    def _check(self) -> None:
        for name in ("stems", "positions", "mixers"):
            options = tuple(getattr(self, name))
            object.__setattr__(self, name, options)
            if not options or len(set(options)) < len(options):
                raise UserError(f"{name} is {options}; it needs at least one option, none twice. Mend it.")
        object.__setattr__(self, "mixer_sizes", tuple((str(word), size) for word, size in self.mixer_sizes))
        check_words("mixers", self.mixers, MIXERS)
        check_words("mixer_sizes", dict(self.mixer_sizes), MIXERS)

    def declared(self) -> Iterator[Gene]:
        yield Gene("stem", self.stems, structural=True, apart=True)
        yield Gene("position", self.positions, structural=True, apart=True)
        yield Gene("embed_dim", self.embed_dims, structural=True, scope="stage")
        yield Gene("depth", self.depths, structural=True, scope="stage")
        headed = tuple(word for word in self.mixers if MIXERS[word].has_heads)
        for i in range(self.depths[-1]):
            yield Gene(f"mixer.{i}", self.mixers, scope="block", slot=i, apart=True)
            yield Gene(f"num_heads.{i}", self.num_heads, scope="block", slot=i, when=("mixer", headed))
            yield mlp_ratio(i, self.mlp_ratios)

    def fixed_blocks(self) -> Sequence[Sequence[dict[str, Any]]]:
        return [[{"head_dim": self.head_dim}] * self.depths[-1]]

    def block_fields(self, told: dict[str, Any]) -> dict[str, Any]:
        return {**told, "mixer_size": dict(self.mixer_sizes).get(told["mixer"])}

    def fixed(self) -> dict[str, Any]:
        return {"patch_size": self.patch_size, "class_token": False, "global_pool": "avg", "norm_eps": 1e-5}

    def largest_macs(self, mixer: str, position: int = 0) -> int:
        """Multiply-accumulates of a block of that mixer, at the largest sizes."""
        genes = [0, position, *(n - 1 for n in self.num_options[2:])]
        genes[4 : 4 + 3 * self.depths[-1] : 3] = [self.mixers.index(mixer)] * self.depths[-1]
        return sum(part.macs for part in parts(self.decode(genes)) if part.name.startswith("blocks.0."))


SIZES: dict[str, dict[str, Any]] = {
    # For images of 8 to 64 pixels, with AutoFormer-micro's widths.
    "micro": {
        "embed_dims": (48, 64, 80),
        "depths": (4, 5, 6),
        "num_heads": (2, 3, 4),
        "mlp_ratios": (2.0, 3.0, 4.0),
        "head_dim": 16,
    },
    # Around the paper's CIFAR nets (width 128, 4 blocks, 4 heads, MLP 256).
    "small": {
        "embed_dims": (96, 128, 160),
        "depths": (3, 4, 5, 6),
        "num_heads": (3, 4, 5),
        "mlp_ratios": (1.0, 2.0, 3.0),
        "head_dim": 32,
    },
}
DEFAULT_MIXERS = ("fourier", "token_mlp", "linformer", "nystrom", "performer", "long_short", "softmax")


def mixer_space(size: str = "micro", **options: Any) -> MixerSpace:
    """The space of mixers, `micro` or `small`, for any images.

    Mixers are put in the order of their multiply-accumulates at the largest sizes. Ranks and landmarks are a quarter of
    the tokens and hidden units as many as the tokens (from 4 to 64) unless `mixer_sizes` says otherwise.

    Args:
        size: which preset the options start from.
        options: fields of `MixerSpace` (image_size, num_classes, mixers, stems, positions, embed_dims, ...).

    Raises:
        UserError: unknown size, option or mixer, sizes that do not fit.
    """
    made = from_preset(MixerSpace, SIZES, size, options)
    patch = made.get("patch_size", MixerSpace.patch_size)
    sides = sides_of(as_image_size("image_size", made.get("image_size", MixerSpace.image_size)))
    tokens = prod(side // max(1, patch) for side in sides)  # an Arch refuses a patch of 0
    made.setdefault("stems", ("linear", "hybrid") if patch in (1, 2, 4, 8) else ("linear",))
    made.setdefault("positions", ("learned", "rotary", "rotary_2d"))
    words = made.setdefault("mixers", DEFAULT_MIXERS)
    sizes = [(word, n) for word, kind in MIXERS.items() if (n := kind.size_for(tokens))]
    made["mixer_sizes"] = [pair for pair in made.get("mixer_sizes", sizes) if pair[0] in words]
    space = MixerSpace(**made)
    return replace(space, mixers=tuple(sorted(words, key=space.largest_macs)))


@dataclass(frozen=True, kw_only=True)
class MixerConfig(WidthsConfig):
    """The space of mixers, `micro` or `small`; options left at None are the preset's."""

    kind = MixerSpace.kind
    space = MixerSpace
    sizes = SIZES
    make = staticmethod(mixer_space)

    stems: tuple[str, ...] | None = None
    positions: tuple[str, ...] | None = None
    mixers: tuple[str, ...] | None = None
