"""The space of mixers: a ViT in which each block's token mixer is a gene, beside its heads and MLP, and the stem and
the kind of positions of the whole net.

Source of the parts: Vision X-formers (arXiv 2107.02239) and the mixers' papers (`vitnas/mixers`). The space is ours.
Nets have no class token and take the mean over patches, so that every mixer fits. A Supernet shares `qkv` and `proj`
across mixers; what a mixer alone owns has a name of its own and so is private to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import BYTES, Frame, block_cost, head_part, stem_part
from vitnas.errors import UserError, check_word, check_words, nearest
from vitnas.mixers import MIXERS
from vitnas.space.space import Gene, Genes, Matrix, NotInSpace, Space, Term, field_reasons, option_reason

STRUCTURE = ("stem", "position", "embed_dim", "depth")
PER_BLOCK = ("mixer", "num_heads", "mlp_ratio")


@dataclass(frozen=True, kw_only=True)
class MixerSpace(Space):
    """Genes: `stem`, `position`, `embed_dim`, `depth`, then `mixer.i`, `num_heads.i`, `mlp_ratio.i` per block.

    Heads do not matter to mixers without heads. `mixer_sizes` are pairs of a mixer's word and its own number; mixers
    that are left out take their default.
    """

    kind: ClassVar[str] = "mixers"

    name: str = "mixers"
    image_size: int = 32
    patch_size: int = 4
    in_chans: int = 3
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
        for name in ("stems", "positions", "mixers"):
            options = tuple(getattr(self, name))
            object.__setattr__(self, name, options)
            if not options or len(set(options)) < len(options):
                raise UserError(f"{name} is {options}; it needs at least one option, none twice. Mend it.")
        for name in ("embed_dims", "depths", "num_heads", "mlp_ratios"):
            numbers = tuple(getattr(self, name))
            object.__setattr__(self, name, numbers)
            if not numbers or any(b <= a for a, b in pairwise(numbers)) or numbers[0] <= 0:
                raise UserError(
                    f"{name} is {numbers}; options must be positive and rise. Sort them, without repeats."
                )
        object.__setattr__(self, "mixer_sizes", tuple((str(word), size) for word, size in self.mixer_sizes))
        check_words("mixer_sizes", dict(self.mixer_sizes), MIXERS)
        last = self.arch_of(self.canonical([len(gene.options) - 1 for gene in self.genes]))
        for position in self.positions:  # of which the representatives have the first and the last
            self._arch(last.stem, position, last.embed_dim, last.blocks)
        for arch in self.representatives():  # an Arch checks its own sizes, and counting those of its mixers
            stage = arch.stages[0]
            for block in stage.blocks:
                self._block_cost(block, stage.embed_dim, Frame.of(arch))

    @property
    def genes(self) -> tuple[Gene, ...]:
        per_block = (
            gene
            for index in range(self.depths[-1])
            for gene in (
                Gene(f"mixer.{index}", self.mixers),
                Gene(f"num_heads.{index}", self.num_heads),
                Gene(f"mlp_ratio.{index}", self.mlp_ratios),
            )
        )
        return (
            Gene("stem", self.stems, structural=True),
            Gene("position", self.positions, structural=True),
            Gene("embed_dim", self.embed_dims, structural=True),
            Gene("depth", self.depths, structural=True),
            *per_block,
        )

    def arch_of(self, genes: Genes) -> Arch:
        stem, position, dim = self.stems[genes[0]], self.positions[genes[1]], self.embed_dims[genes[2]]
        blocks = tuple(
            self._block(dim, *genes[start : start + 3])
            for start in range(4, 4 + 3 * self.depths[genes[3]], 3)
        )
        return self._arch(stem, position, dim, blocks)

    def genes_of(self, arch: Arch) -> Genes:
        reasons = field_reasons(arch, self._fixed(), varied=("stem", "position"))
        dim, depth = arch.embed_dim, arch.depth
        reasons += _word_reason("stem", arch.stem, self.stems)
        reasons += _word_reason("position", arch.position, self.positions)
        reasons += option_reason("embed_dim", dim, self.embed_dims)
        reasons += option_reason("depth", depth, self.depths)
        if len(arch.stages) > 1:
            reasons.append(f"there are {len(arch.stages)} stages, must be 1")
        hidden = [int(dim * ratio) for ratio in self.mlp_ratios]
        for index, block in enumerate(arch.blocks):
            reasons += [f"block {index}: {reason}" for reason in self._block_reasons(block, hidden)]
        if reasons:
            raise NotInSpace(self.name, arch, reasons)
        genes = [self.stems.index(arch.stem), self.positions.index(arch.position)]
        genes += [self.embed_dims.index(dim), self.depths.index(depth)]
        for block in arch.blocks:
            genes += [
                self.mixers.index(block.mixer),
                self.num_heads.index(block.num_heads),
                hidden.index(block.mlp_hidden),
            ]
        return tuple(genes) + (0,) * (len(self.genes) - len(genes))

    def active_matrix(self, genes: Matrix) -> npt.NDArray[np.bool_]:
        depth = np.asarray(self.depths)[genes[:, 3]]
        alive = np.arange(self.depths[-1])[None] < depth[:, None]  # (n, blocks)
        mixers = genes[:, 4::3]
        heads = alive & np.array([MIXERS[word].has_heads for word in self.mixers])[mixers]
        active = np.ones(genes.shape, dtype=np.bool_)
        active[:, 4::3], active[:, 5::3], active[:, 6::3] = alive, heads, alive
        return active

    def size(self) -> int:
        heads = [len(self.num_heads) if MIXERS[word].has_heads else 1 for word in self.mixers]
        every = len(self.mlp_ratios) * sum(heads)
        ends = len(self.stems) * len(self.positions) * len(self.embed_dims)
        return ends * sum(every**depth for depth in self.depths)

    def representatives(self) -> list[Arch]:
        """The largest; and, at the largest sizes, each mixer in every block and each stem, with the first positions."""
        last = [len(gene.options) - 1 for gene in self.genes]
        stems, mixers = range(len(self.stems)), range(len(self.mixers))
        found = [self.arch_of(self.canonical(last))]
        for stem, mixer in [(len(stems) - 1, mixer) for mixer in mixers] + [(stem, 0) for stem in stems]:
            genes = [stem, 0, *last[2:]]
            genes[4::3] = [mixer] * self.depths[-1]
            found.append(self.arch_of(self.canonical(genes)))
        return list(dict.fromkeys(found))

    def cost_terms(self) -> list[Term]:
        ends = np.array(
            [
                [[self._ends(stem, position, dim) for dim in self.embed_dims] for position in self.positions]
                for stem in self.stems
            ],
            dtype=np.int64,
        )
        macs, params, memory = np.moveaxis(ends, -1, 0)
        fixed = Term(genes=(0, 1, 2), macs=macs, params=params, memory=memory * BYTES)
        return [fixed, *self._block_terms()]

    def _block_terms(self) -> Iterator[Term]:
        """Per block: a table over (position, embed_dim, depth, mixer, num_heads, mlp_ratio), 0 beyond the depth."""
        sizes: tuple[tuple[Any, ...], ...] = (
            self.positions,
            self.embed_dims,
            self.mixers,
            self.num_heads,
            self.mlp_ratios,
        )
        table = np.zeros((*(len(options) for options in sizes), 3), dtype=np.int64)
        for index in product(*(range(len(options)) for options in sizes)):
            position, dim, mixer, heads, ratio = index
            word, width = self.mixers[mixer], self.embed_dims[dim]
            if not MIXERS[word].has_heads and heads:
                continue  # such genes are 0
            frame = Frame.of(
                self._arch(self.stems[0], self.positions[position], width, (self._block(width),))
            )
            table[index] = self._block_cost(self._block(width, mixer, heads, ratio), width, frame)
        for number in range(self.depths[-1]):
            alive = np.array([number < depth for depth in self.depths])
            shaped = alive[None, None, :, None, None, None, None]
            macs, params, memory = np.moveaxis(table[:, :, None] * shaped, -1, 0)
            first = 4 + 3 * number
            yield Term(
                genes=(1, 2, 3, first, first + 1, first + 2),
                macs=macs,
                params=params,
                memory=memory * BYTES,
            )

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "options": asdict(self)}

    def _block(self, dim: int, mixer: int | None = None, heads: int = 0, ratio: int = 0) -> Block:
        """A block of these options; of softmax where no mixer is given, for what does not depend on one."""
        word: Any = "softmax" if mixer is None else self.mixers[mixer]
        return Block(
            num_heads=self.num_heads[heads],
            head_dim=self.head_dim,
            mlp_hidden=int(dim * self.mlp_ratios[ratio]),
            mixer=word,
            mixer_size=dict(self.mixer_sizes).get(word),
        )

    @staticmethod
    def _block_cost(block: Block, dim: int, frame: Frame) -> tuple[int, int, int]:
        return block_cost(
            block.mixer,
            block.num_heads,
            block.head_dim,
            block.mlp_hidden,
            dim,
            frame,
            mixer_size=block.mixer_size,
        )

    def _block_reasons(self, block: Block, hidden: Sequence[int]) -> list[str]:
        reasons = _word_reason("mixer", block.mixer, self.mixers)
        size = dict(self.mixer_sizes).get(block.mixer)
        if block.mixer_size != size:
            reasons.append(f"mixer_size is {block.mixer_size}, must be {size}")
        if MIXERS[block.mixer].has_heads:
            reasons += option_reason("num_heads", block.num_heads, self.num_heads)
        elif block.num_heads != self.num_heads[0]:
            reasons.append(
                f"num_heads is {block.num_heads}, must be {self.num_heads[0]} where it does not matter"
            )
        reasons += option_reason("mlp_hidden", block.mlp_hidden, hidden)
        if (block.head_dim, block.slot) != (self.head_dim, None):
            reasons.append(f"head_dim must be {self.head_dim}, slot unset")
        return reasons

    def _ends(self, stem: str, position: str, dim: int) -> tuple[int, int, int]:
        """Costs of stem and head."""
        arch = self._arch(stem, position, dim, (self._block(dim),))
        first, last = stem_part(arch, dim), head_part(arch, dim)
        return first.macs + last.macs, first.params + last.params, max(first.memory, last.memory)

    def _arch(self, stem: str, position: str, dim: int, blocks: tuple[Block, ...]) -> Arch:
        fields: dict[str, Any] = {"stem": stem, "position": position}
        return Arch(stages=(Stage(embed_dim=dim, blocks=blocks),), **fields, **self._fixed())

    def _fixed(self) -> dict[str, Any]:
        """The fields of an Arch that do not vary."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "num_classes": self.num_classes,
            "class_token": False,
            "relative_position": 0,
            "global_pool": "avg",
            "fc_norm": False,
            "mlp_norm": "branch",
            "qkv_bias": True,
            "norm_eps": 1e-5,
        }


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


def mixer_space(
    size: str = "micro",
    *,
    image_size: int = 32,
    patch_size: int = 4,
    num_classes: int = 10,
    in_chans: int = 3,
    **options: Any,
) -> MixerSpace:
    """The space of mixers, `micro` or `small`, for any images.

    Mixers are put in the order of their multiply-accumulates at the largest sizes. Ranks and landmarks are a quarter of
    the tokens and hidden units as many as the tokens (from 4 to 64) unless `mixer_sizes` says otherwise.

    Args:
        size: which preset the options start from.
        image_size, patch_size: in pixels; the patch must divide the image.
        options: fields of `MixerSpace` (mixers, stems, positions, embed_dims, ...).

    Raises:
        UserError: unknown size, option or mixer, sizes that do not fit.
    """
    check_word("size", size, SIZES)
    known = MixerSpace.__dataclass_fields__
    for name in options:
        if name not in known:
            raise UserError(f"the mixers space has no option {name!r}.{nearest(name, known)}")
    tokens = (image_size // max(1, patch_size)) ** 2  # an Arch refuses a patch of 0
    given = {
        "name": f"mixers_{size}",
        "image_size": image_size,
        "patch_size": patch_size,
        "num_classes": num_classes,
        "in_chans": in_chans,
        "stems": ("linear", "hybrid") if patch_size in (1, 2, 4, 8) else ("linear",),
        "positions": ("learned", "rotary", "rotary_2d"),
        "mixers": DEFAULT_MIXERS,
        "mixer_sizes": tuple((word, n) for word, kind in MIXERS.items() if (n := kind.size_for(tokens))),
        **SIZES[size],
        **options,
    }
    words = tuple(given["mixers"])
    check_words("mixers", words, MIXERS)
    given["mixer_sizes"] = tuple((word, n) for word, n in given["mixer_sizes"] if word in words)
    space = MixerSpace(**given)
    return replace(space, mixers=tuple(sorted(words, key=lambda word: _largest_macs(space, word))))


def _largest_macs(space: MixerSpace, word: str) -> int:
    dim = space.embed_dims[-1]
    block = space._block(dim, space.mixers.index(word), len(space.num_heads) - 1, len(space.mlp_ratios) - 1)
    frame = Frame.of(space._arch(space.stems[0], space.positions[0], dim, (block,)))
    return space._block_cost(block, dim, frame)[0]


def _word_reason(what: str, value: str, options: Sequence[str]) -> list[str]:
    """A reason if `value` is not one of `options`."""
    return [] if value in options else [f"{what} is {value!r}; allowed are {', '.join(options)}"]
