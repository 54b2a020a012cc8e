"""The unified Space: one over everything that an Arch's genes can say.

The stem and its patch, the size that images are worked at, the kind of positions, one to four stages with their
reduction; per stage a width, blocks that may go from any place, and per block the mixer, heads and hidden units; and
where `keep` is given, how many patches are left. The first stages are those that there are, so a stage sees the same
grid however many follow. Nets have no class token and take the mean over patches unless told otherwise, so that every
mixer fits. The Space is ours; its parts are the papers' (PAPERS.md).

A Supernet keeps apart what cannot be shared: the stem per kind and patch, whatever has a weight per patch or per step
from patch to patch, the reductions per kind, and the last norm and classifier per number of stages. What a mixer alone
owns has a name of its own. All else is shared by named axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from math import inf, prod
from typing import Any, ClassVar

from vitnas.arch import WORDS, Arch, AttnScale, Pool, RelPosBias
from vitnas.counting import parts
from vitnas.errors import UserError, check_word, check_words
from vitnas.grids import Grid, ImageSize, as_image_size, sides_of
from vitnas.layers.selectors import SELECTIONS
from vitnas.mixers import MIXERS
from vitnas.space.config import SpaceConfig, from_preset
from vitnas.space.gene import Gene, kind_of
from vitnas.space.layout import STAGES
from vitnas.space.private import Private
from vitnas.space.space import Space, check_blocks, rising

STEM_WIDTH = 16  # of a convolutional stem, as ViT-ResNAS has 24 for four times the channels


@dataclass(frozen=True, kw_only=True)
class UnifiedStage:
    """Options of one stage. `depth` blocks at most, of which `stays` (numbers from 0) are always there; `mixers` are in
    order; `mlp_ratios` are shares of the width."""

    depth: int
    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    mixers: tuple[str, ...]
    head_dim: int = 16
    stays: tuple[int, ...] = ()
    mixer_sizes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("embed_dims", "num_heads", "mlp_ratios"):
            object.__setattr__(self, name, rising(name, getattr(self, name)))
        object.__setattr__(self, "mixers", _words("mixers", self.mixers))
        object.__setattr__(self, "stays", tuple(sorted(set(self.stays))))
        object.__setattr__(self, "mixer_sizes", tuple((str(word), size) for word, size in self.mixer_sizes))
        check_words("mixers", self.mixers, MIXERS)
        check_words("mixer_sizes", dict(self.mixer_sizes), MIXERS)
        check_blocks(self.depth)
        if self.depth < 1 or any(not 0 <= slot < self.depth for slot in self.stays):
            raise UserError(
                f"depth is {self.depth} and stays {self.stays}; a stage has at least one block, and those that stay "
                "are some of them, counted from 0. Mend it."
            )


@dataclass(frozen=True, kw_only=True)
class UnifiedSpace(Space):
    """Genes: `stem`, `patch_size` (coarse to fine), `work_size`, `position`, `reduction`, `num_stages`; then per stage
    `embed_dim.s`, and per block `exists.s.i` (if it may go), `mixer.s.i`, `num_heads.s.i`, `mlp_ratio.s.i`.

    Heads do not matter to mixers without heads, nor a reduction where there is one stage. Other fields are those of
    every Arch (see `Arch`).
    """

    kind: ClassVar[str] = "unified"
    private: ClassVar[tuple[Private, ...]] = (
        Private((), by="stem_kind", starts=("patch_embed.",)),
        Private((), by="first_grid", having=("tokens", "steps")),
        Private((), by="reduction", starts=("reductions.",)),
        Private((), by=STAGES, starts=("norm.", "fc_norm.", "head.")),
    )
    rising: ClassVar[tuple[str, ...]] = ("patch_sizes", STAGES)

    name: str = "unified"
    image_size: ImageSize = 32
    num_classes: int = 10
    stems: tuple[str, ...]
    patch_sizes: tuple[int, ...]
    work_sizes: tuple[ImageSize, ...] = ()
    positions: tuple[str, ...]
    reductions: tuple[str, ...]
    num_stages: tuple[int, ...]
    stages: tuple[UnifiedStage, ...]
    stem_width: int = STEM_WIDTH
    class_token: bool = False
    global_pool: Pool = "avg"
    relative_position: int = 0
    rel_pos_bias: RelPosBias = "none"
    patch_norm: bool = False
    norm_eps: float = 1e-5
    head_norm_eps: float | None = None
    attn_scale: AttnScale = "head_dim"

    def __post_init__(self) -> None:
        super().__post_init__()
        last = {gene.field: len(gene.options) - 1 for gene in self.genes if gene.scope == "arch"}
        # An Arch checks its own sizes; which of them meet is a matter of a few genes.
        for mixer in range(max(len(stage.mixers) for stage in self.stages)):
            for names in (
                ("stem", "patch_size"),
                ("patch_size", "seen_size", STAGES, "reduction"),
                ("position",),
            ):
                for options in product(*(range(last.get(name, 0) + 1) for name in names)):
                    parts(self._with(dict(zip(names, options, strict=True)), mixer=mixer))
            for genes in self.layout.selecting(self._genes({}, mixer=mixer)):
                self.decode(genes)

    def _check(self) -> None:
        for name, words in (("stems", "stem"), ("positions", "position"), ("reductions", "reduction")):
            object.__setattr__(self, name, _words(name, getattr(self, name)))
            for word in getattr(self, name):
                check_word(name, word, WORDS[words])
        made = [stage if isinstance(stage, UnifiedStage) else UnifiedStage(**stage) for stage in self.stages]
        object.__setattr__(self, "stages", tuple(made))
        sizes = tuple(as_image_size("work_sizes", size) for size in self.work_sizes or (self.image_size,))
        object.__setattr__(
            self, "work_sizes", tuple(sorted(set(sizes), key=lambda size: prod(sides_of(size))))
        )
        if not self.num_stages or self.num_stages[-1] != len(made):
            raise UserError(
                f"num_stages is {self.num_stages} and there are {len(made)} stages; the most is all of them. Use "
                f"{', '.join(map(str, range(1, len(made) + 1)))}."
            )
        several = len(self.num_stages) > 1 or len(self.reductions) > 1
        if self.class_token and "patch" in self.reductions and several:
            raise UserError(
                "class_token is True with reductions 'patch' and others, or several numbers of stages; which stages "
                "have a class token would go by them. Use class_token=False, or one reduction and one number of stages."
            )
        for before, behind in pairwise(made):
            if "residual" in self.reductions and behind.embed_dims[0] < before.embed_dims[-1]:
                raise UserError(
                    f"a stage may be {behind.embed_dims[0]} wide behind one of {before.embed_dims[-1]}; a residual "
                    "reduction cannot narrow. Raise its embed_dims, or use reductions 'patch' or 'conv'."
                )

    def declared(self) -> Iterator[Gene]:
        yield Gene("stem", self.stems, structural=True, apart=True)
        yield Gene("patch_size", self.patch_sizes[::-1], structural=True, apart=True)
        yield Gene("work_size", self.work_sizes, structural=True, apart=True, field="seen_size")
        yield Gene("position", self.positions, structural=True, apart=True)
        yield Gene(STAGES, self.num_stages, structural=True, apart=True)
        if len(self.stages) > 1:
            yield Gene("reduction", self.reductions, structural=True, apart=True, stage=1)
        for s, stage in enumerate(self.stages):
            yield Gene(f"embed_dim.{s}", stage.embed_dims, structural=True, scope="stage", stage=s)
            headed = tuple(word for word in stage.mixers if MIXERS[word].has_heads)
            for i in range(stage.depth):
                place: dict[str, Any] = {"scope": "block", "stage": s, "slot": i}
                if i not in stage.stays:
                    yield Gene(f"exists.{s}.{i}", (False, True), structural=True, flips=True, **place)
                yield Gene(f"mixer.{s}.{i}", stage.mixers, apart=True, **place)
                yield Gene(f"num_heads.{s}.{i}", stage.num_heads, when=("mixer", headed), **place)
                yield Gene(f"mlp_ratio.{s}.{i}", stage.mlp_ratios, field="mlp_hidden", shares=True, **place)

    @property
    def is_staged(self) -> bool:
        return True

    def fixed_blocks(self) -> Sequence[Sequence[dict[str, Any]]]:
        return [
            [{"head_dim": stage.head_dim, "mixer_sizes": stage.mixer_sizes}] * stage.depth
            for stage in self.stages
        ]

    def block_fields(self, told: dict[str, Any]) -> dict[str, Any]:
        sizes = dict(told.pop("mixer_sizes"))
        return {**told, "mixer_size": sizes.get(told["mixer"])}

    def fixed(self) -> dict[str, Any]:
        names = ("class_token", "global_pool", "relative_position", "rel_pos_bias", "patch_norm")
        of_numbers = ("norm_eps", "head_norm_eps", "attn_scale")
        return {name: getattr(self, name) for name in (*names, *of_numbers)}

    def arch_fields(self, told: dict[str, Any], num_stages: int) -> dict[str, Any]:
        size = told.pop("seen_size")
        fields = {**told, "work_size": None if size == self.image_size else size}
        if told["stem"] == "conv":
            fields["stem_width"] = self.stem_width
        if num_stages == 1:
            fields.pop("reduction", None)
        return fields

    def _with(self, options: dict[str, int], **kinds: int) -> Arch:
        """The largest with other options of some of the Arch's genes (by field), and of block genes (by field)."""
        return self.decode(self._genes(options, **kinds))

    def _genes(self, options: dict[str, int], **kinds: int) -> list[int]:
        genes = []
        for gene in self.genes:
            asked = options.get(gene.field) if gene.scope == "arch" else kinds.get(gene.field)
            last = len(gene.options) - 1
            genes.append(last if asked is None else min(asked, last))
        return genes

    @cached_property
    def _representatives(self) -> list[Arch]:
        counts = {gene.field: len(gene.options) for gene in self.genes if gene.scope == "arch"}
        mixers = range(max(len(stage.mixers) for stage in self.stages))
        places = list(product(range(counts["patch_size"]), range(counts["seen_size"])))
        names = ("stem", "patch_size")
        stems = product(*(range(counts[name]) for name in names))
        learned = next((i for i, word in enumerate(self.positions) if word.startswith("learned")), 0)
        found = [self._with({})]
        found += [self._with(dict(zip(names, pair, strict=True))) for pair in stems]
        for patch, size in places:
            here = {"patch_size": patch, "seen_size": size, "position": learned}
            found += [
                self._with({**here, "reduction": kind}, mixer=mixer)
                for mixer in mixers
                for kind in range(counts.get("reduction", 1))
            ]
        for name in ("position", STAGES):
            found += [self._with({name: option}) for option in range(counts[name])]
        found += [self.decode(each) for each in self.layout.selecting(self._genes({}))]
        return list(dict.fromkeys(found))

    def representatives(self) -> list[Arch]:
        return self._representatives

    def corners(self) -> list[Arch]:
        """The largest and the smallest, and each of them with one kind of genes (all heads, all mixers) at its other
        end."""
        ends = [[len(gene.options) - 1 for gene in self.genes], [0] * len(self.genes)]
        found = [self.decode(end) for end in ends]
        for kind in dict.fromkeys(kind_of(gene) for gene in self.genes):
            for here, other in (ends, ends[::-1]):
                pairs = zip(self.genes, here, other, strict=True)
                found.append(self.decode([b if kind_of(gene) == kind else a for gene, a, b in pairs]))
        return list(dict.fromkeys(found))


def _words(name: str, options: Iterable[str]) -> tuple[str, ...]:
    given = tuple(options)
    if not given or len(set(given)) < len(given):
        raise UserError(f"{name} is {given}; it needs at least one option, none twice. Mend it.")
    return given


def _stage(
    depth: int, embed_dims: Sequence[int], num_heads: Sequence[int], head_dim: int, **options: Any
) -> dict[str, Any]:
    sizes = {"depth": depth, "embed_dims": tuple(embed_dims), "num_heads": tuple(num_heads)}
    return {**sizes, "head_dim": head_dim, "mlp_ratios": (1.0, 2.0, 3.0), **options}


_ALL = ("linear", "conv", "hybrid", "cct")
_POSITIONS = ("none", "learned", "rotary_2d")
DEFAULT_MIXERS = ("token_mlp", "performer", "long_short", "softmax")
SIZES: dict[str, dict[str, Any]] = {
    # For images of 8 to 16 pixels.
    "micro": {
        "stems": ("linear", "hybrid"),
        "patch_sizes": (2,),
        "positions": _POSITIONS,
        "reductions": ("patch", "residual"),
        "num_stages": (1, 2),
        "stages": (
            _stage(4, (32, 48, 64), (1, 2, 3), 16),
            _stage(2, (64, 80, 96), (2, 3, 4), 16),
        ),
    },
    # Around 10 M multiply-accumulates at 32 pixels.
    "px32": {
        "stems": _ALL,
        "patch_sizes": (2, 4),
        "positions": _POSITIONS,
        "reductions": ("patch", "residual"),
        "num_stages": (1, 2, 3),
        "stages": (
            _stage(6, (24, 32, 48, 64, 80), (2, 3, 4), 16),
            _stage(4, (80, 96, 112, 128), (3, 4, 6), 16),
            _stage(4, (128, 144, 160, 192), (4, 6, 8), 16),
        ),
    },
    "px64": {
        "stems": _ALL,
        "patch_sizes": (4, 8),
        "positions": _POSITIONS,
        "reductions": ("patch",),
        "num_stages": (1, 2, 3),
        "scales": (0.75, 1.0),
        "stages": (
            _stage(6, (32, 48, 64, 96), (2, 3, 4), 16),
            _stage(4, (96, 128, 160), (3, 4, 6), 24),
            _stage(4, (160, 192, 256), (4, 6, 8), 32),
        ),
    },
    "px96": {
        "stems": ("linear", "conv"),
        "patch_sizes": (8, 16),
        "positions": _POSITIONS,
        "reductions": ("patch",),
        "num_stages": (1, 2, 3),
        "scales": (0.75, 1.0),
        "stages": (
            _stage(6, (48, 64, 96, 128), (2, 3, 4), 24),
            _stage(4, (128, 160, 192), (3, 4, 6), 32),
            _stage(4, (192, 256, 320), (4, 6, 8), 32),
        ),
    },
    "px224": {
        "stems": ("linear", "conv"),
        "patch_sizes": (8, 16),
        "positions": _POSITIONS,
        "reductions": ("patch",),
        "num_stages": (1, 2, 3, 4),
        "scales": (0.75, 1.0),
        "stages": (
            _stage(8, (96, 128, 192, 256), (2, 3, 4), 32),
            _stage(6, (256, 320, 384), (4, 6, 8), 32),
            _stage(6, (384, 448, 512), (6, 8), 64),
            _stage(2, (512, 640, 768), (8, 10, 12), 64),
        ),
        "stem_width": 24,
    },
}


def unified(
    size: str = "micro",
    *,
    mixers: Sequence[str] | None = None,
    depths: Sequence[int] | None = None,
    embed_dims: Sequence[Sequence[int]] | None = None,
    scales: Sequence[float] | None = None,
    **options: Any,
) -> UnifiedSpace:
    """The unified Space `micro`, `px32`, `px64`, `px96` or `px224`, for any images.

    Args:
        size: which preset the options start from; its name says for which images it is made.
        mixers: for all stages; each stage puts them in the order of their multiply-accumulates at its largest. Where
            patches are dropped (`keep`), the last stage has those of the usual ones that can do without them.
        depths: blocks at most, per stage; there are as many stages as are named, of the preset's.
        embed_dims: options of the width, likewise.
        scales: sizes at which images are worked, as shares of theirs.
        options: fields of `UnifiedSpace` (image_size, num_classes, stems, patch_sizes, positions, ...).

    Raises:
        UserError: unknown size, option or word, sizes that do not fit.

    >>> f"{unified('px32').size():.1e}"
    '2.9e+24'
    """
    made = from_preset(UnifiedSpace, SIZES, size, options, also=("scales",))
    usual = made.pop("scales", (1.0,))
    shares = tuple(scales or usual)
    if not all(0 < share < inf for share in shares):
        raise UserError(f"scales is {shares}; they are shares of the images' sides, above 0. Use 0.75, 1.0.")
    for name in UnifiedSpace.rising:
        rising(name, made[name])
    image_size = as_image_size("image_size", made.get("image_size", UnifiedSpace.image_size))
    stages = [stage if isinstance(stage, dict) else vars(stage) for stage in made["stages"]]
    for name, field, given in (("depths", "depth", depths), ("embed_dims", "embed_dims", embed_dims)):
        if given is not None:
            if not 0 < len(given) <= len(stages):
                raise UserError(
                    f"{name} is {given}; there are {len(stages)} stages. Name 1 to {len(stages)}."
                )
            stages = [{**stage, field: value} for stage, value in zip(stages, given, strict=False)]
    if options.get("num_stages") is None:
        made["num_stages"] = tuple(n for n in made["num_stages"] if n <= len(stages))
    stages = stages[: max(made["num_stages"])]
    if made.get("keep"):  # a selection needs a block before it
        stays = tuple({*stages[-1].get("stays", ()), 0})
        stages[-1] = {"mixers": _of_selected(made.get("selector")), **stages[-1], "stays": stays}
    if "work_sizes" not in made:
        halvings = 0 if set(made["reductions"]) == {"patch"} else len(stages) - 1
        cell = max(made["patch_sizes"]) << halvings
        made["work_sizes"] = tuple(_scaled(image_size, share, cell) for share in shares)
    grids = [
        (sides_of(work)[0] // patch, sides_of(work)[1] // patch)
        for work in made["work_sizes"]
        for patch in made["patch_sizes"]
    ]
    made["stages"] = tuple(
        UnifiedStage(**_with_mixers(stage, mixers, [(r >> s, c >> s) for r, c in grids]))
        for s, stage in enumerate(stages)
    )
    space = UnifiedSpace(**made)
    return replace(space, stages=tuple(_in_order(space, s) for s in range(len(space.stages))))


def _scaled(image_size: ImageSize, share: float, cell: int) -> ImageSize:
    """A share of a size, in whole cells."""
    height, width = (max(cell, int(side * share) // cell * cell) for side in sides_of(image_size))
    return image_size if share == 1 else (height, width)


def _of_selected(selector: str | None) -> tuple[str, ...]:
    """Of the usual mixers those that can stand before and behind a selection."""
    asks = selector in SELECTIONS and SELECTIONS[selector].asks != "nothing"
    able = (word for word in DEFAULT_MIXERS if MIXERS[word].takes_selection)
    return tuple(word for word in able if MIXERS[word].gives_attention or not asks)


def _with_mixers(
    stage: dict[str, Any], mixers: Sequence[str] | None, grids: Sequence[Grid]
) -> dict[str, Any]:
    """The stage's options with mixers that its grids can have, and their sizes."""
    words = tuple(mixers or stage.get("mixers") or DEFAULT_MIXERS)
    tokens = max(1, min(rows * cols for rows, cols in grids))
    sizes = {word: size for word in words if word in MIXERS and (size := MIXERS[word].size_for(tokens))}
    return {
        **stage,
        "mixers": words,
        "mixer_sizes": tuple({**sizes, **dict(stage.get("mixer_sizes", ()))}.items()),
    }


def _in_order(space: UnifiedSpace, number: int) -> UnifiedStage:
    """A stage with its mixers by their multiply-accumulates at the largest sizes."""
    stage = space.stages[number]
    first = sum(each.depth for each in space.stages[:number])

    def macs(word: str) -> int:
        arch = space._with({}, mixer=stage.mixers.index(word))
        return next(part.macs for part in parts(arch) if part.name == f"blocks.{first}.attn")

    return replace(stage, mixers=tuple(sorted(stage.mixers, key=macs)))


@dataclass(frozen=True, kw_only=True)
class UnifiedConfig(SpaceConfig):
    """The unified space: stem, patches, image size, positions, stages, blocks and mixers. Options left at None are the
    preset's; `depths` and `embed_dims` are per stage."""

    kind = UnifiedSpace.kind
    space = UnifiedSpace
    sizes = SIZES
    make = staticmethod(unified)

    stems: tuple[str, ...] | None = None
    patch_sizes: tuple[int, ...] | None = None
    scales: tuple[float, ...] | None = None
    positions: tuple[str, ...] | None = None
    reductions: tuple[str, ...] | None = None
    num_stages: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    embed_dims: tuple[tuple[int, ...], ...] | None = None
    mixers: tuple[str, ...] | None = None
