"""Arch: one concrete architecture, as a frozen value.

An Arch says everything that the shape of a Model depends on and nothing about training. It is hashable (a cache key),
validated when made, and written as JSON with a schema number. Widths are per block, so it can say what timm's own
classes cannot.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice, pairwise
from math import prod
from typing import Any, Literal, get_args

from vitnas.block import Block as Block
from vitnas.block import Stage as Stage
from vitnas.block import at_least
from vitnas.errors import UserError, check_word, nearest
from vitnas.grids import Grid, ImageSize, as_image_size, sides_of, size_text
from vitnas.layers.rotary import BASES, rotary_of
from vitnas.layers.select import Asked
from vitnas.layers.selectors import SELECTIONS
from vitnas.mixers import QkvBias
from vitnas.mixers.fitting import check_mixers, check_selections

SCHEMA = 1
# The first fields are part of an id whatever they hold, later ones where they differ from their defaults: a new field
# renames no Arch.
FIRST_FIELDS = frozenset(
    "image_size patch_size in_chans num_classes stages stem class_token position relative_position global_pool fc_norm "
    "qkv_bias norm_eps num_heads head_dim mlp_hidden mixer slot embed_dim blocks".split()
)

Stem = Literal["linear", "conv", "hybrid", "cct"]
Reduction = Literal["residual", "conv", "patch"]
Position = Literal["learned", "rotary", "rotary_2d", "rotary_dinov3", "learned_rotary_2d", "none"]
Pool = Literal["token", "avg", "seq", "map"]
RelPosBias = Literal["none", "table", "mlp"]
MlpNorm = Literal["branch", "stream"]
Act = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu", "swiglu_packed"]
AttnScale = Literal["head_dim", "embed_dim"]
WindowBias = Literal["step", "folded"]
WORDS: dict[str, tuple[str, ...]] = {
    "stem": get_args(Stem),
    "reduction": get_args(Reduction),
    "position": get_args(Position),
    "global_pool": get_args(Pool),
    "mlp_norm": get_args(MlpNorm),
    "act": get_args(Act),
    "rel_pos_bias": get_args(RelPosBias),
    "attn_scale": get_args(AttnScale),
    "window_bias": get_args(WindowBias),
}
"""Fields of an Arch that are one of a few words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arch:
    """One vision transformer: stem, stages of blocks, head. Sizes are in pixels.

    `image_size` is one number, or (height, width) of images that are not square. With a `work_size` images of that size
    are resized to this one first, and all else is as of these (None: they are not).

    Between stages the grid of patches halves and the width changes, by a `reduction` (layers/reduction.py). With
    "patch", which takes grids of odd sides too, each stage has a class token of its own, the last one only where
    `global_pool` "token" reads it. `patch_norm` norms the stem's patches. A "conv"
    stem has `stem_width` channels inside (layers/stem.py). Rotary positions turn queries and keys (layers/rotary.py).
    `global_pool` "seq" weighs the patches by a learned score, "map" by the attention of a learned query with
    `pool_num_heads` heads, and has an MLP of `pool_mlp_hidden` units behind it (SigLIP). `mlp_norm` "stream" norms what
    the MLP's result is added to, as well as its input (CCT's code). `distill_token` adds a second token with a head of
    its own; `patch_head` classifies every final patch too, in training only. `reg_tokens` are tokens without a head.
    With `no_embed_class` positions are learned for the patches alone. `pre_norm` norms what enters the blocks, instead
    of a bias of the stem (CLIP). `layer_scale` multiplies what each branch of a block adds by a learned factor per
    channel. `act` is the MLP's activation; "swiglu" gates it by a second projection, "swiglu_packed" by one twice as
    wide, and either has `mlp_hidden` gated units. `scale_mlp_norm` norms the MLP's hidden units.
    `rotary_base` is the number whose powers rotary angles fall by (None: the position's usual one), `rotary_grid` the
    side of the grid whose rows and columns "rotary_2d" stretches its own onto (EVA-02; 0: none).
    `qkv_bias` "qv" leaves keys without a bias (BEiT). `qk_norm` norms queries and keys, head by head.
    `rel_pos_bias` adds a learned number per head and step from patch to patch to the logits (layers/position_bias.py);
    long_short has its own within windows, as `window_bias` says (mixers/long_short.py).
    `relative_position` is the largest distance (in patches) of 2-D relative positions on keys and values, after which
    they are clipped; 0 means none (AutoFormer, section 4, uses 14). `fc_norm` moves the final norm behind pooling, as
    timm does for mean-pooled ViTs. `head_norm_eps` is the final norm's own epsilon (None: norm_eps). `attn_scale` is
    the factor of q k^T: head_dim^-0.5, or (embed_dim // num_heads)^-0.5 as in the published ViTAS nets, whose inner
    width is not their embed_dim. Where blocks `keep` fewer patches, `selector` chooses them (layers/select.py); it is
    None exactly where none does.
    """

    image_size: ImageSize
    patch_size: int
    in_chans: int = 3
    num_classes: int = 1000
    stages: tuple[Stage, ...]
    stem: Stem = "linear"
    stem_width: int = 0
    reduction: Reduction = "residual"
    class_token: bool = True
    distill_token: bool = False
    reg_tokens: int = 0
    no_embed_class: bool = False
    pre_norm: bool = False
    patch_head: bool = False
    position: Position = "learned"
    rotary_base: float | None = None
    rotary_grid: int = 0
    relative_position: int = 0
    global_pool: Pool = "token"
    pool_num_heads: int = 0
    pool_mlp_hidden: int = 0
    fc_norm: bool = False
    mlp_norm: MlpNorm = "branch"
    layer_scale: bool = False
    act: Act = "gelu"
    scale_mlp_norm: bool = False
    qkv_bias: QkvBias = True
    qk_norm: bool = False
    rel_pos_bias: RelPosBias = "none"
    norm_eps: float = 1e-6
    head_norm_eps: float | None = None
    attn_scale: AttnScale = "head_dim"
    selector: str | None = None
    patch_norm: bool = False
    window_bias: WindowBias = "step"
    work_size: ImageSize | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "image_size", as_image_size("image_size", self.image_size))
        if self.work_size is not None:
            size = as_image_size("work_size", self.work_size)
            object.__setattr__(self, "work_size", None if size == self.image_size else size)
        at_least(1, self, "patch_size", "in_chans")
        at_least(0, self, "num_classes", "relative_position", "stem_width", "reg_tokens")
        at_least(0, self, "pool_num_heads", "pool_mlp_hidden", "rotary_grid")
        for name in ("norm_eps", "head_norm_eps", "rotary_base"):
            n = getattr(self, name)
            if (n is not None or name == "norm_eps") and (not isinstance(n, int | float) or not n > 0):
                raise UserError(f"{name} is {n!r}; it must be a number above 0, for example 1e-6.")
        if self.qkv_bias not in (True, False, "qv"):
            raise UserError(f"qkv_bias is {self.qkv_bias!r}; it must be True, False or 'qv'. Choose one.")
        for name, words in WORDS.items():
            if getattr(self, name) not in words:  # Archs are made by the hundred thousand
                check_word(name, getattr(self, name), words)
        self._check_sizes()
        self._check_tokens()
        self._check_mixers()
        self._check_selections()

    def _check_sizes(self) -> None:
        if not self.stages:
            raise UserError("there are 0 stages; an Arch needs at least one. Give one.")
        patch, halvings = self.patch_size, len(self.stages) - 1
        if self.drops_prefix:
            self._check_last_grid()
            halvings = 0
        step = patch << halvings
        for side in sides_of(self.seen_size):
            if side % step:
                low = side // step * step
                near = f"{low} and {low + step}" if low else f"{step}"
                raise UserError(
                    f"{self._seen} is {size_text(self.seen_size)}; it must be a multiple of patch_size {patch}"
                    + (
                        f" times {1 << halvings} ({halvings} reductions), {step}. Nearest: {near}."
                        if halvings
                        else f". Nearest: {round_to(side, patch)}."
                    )
                )
        dims = [stage.embed_dim for stage in self.stages]
        if self.reduction == "residual" and any(b < a for a, b in pairwise(dims)):
            raise UserError(
                f"embed_dims of the stages are {dims}; a residual reduction cannot make them narrower. Let them rise, "
                "or use reduction='conv'."
            )
        if self.stem == "conv" and self.patch_size % 2:
            raise UserError(
                f"patch_size is {self.patch_size}; stem 'conv' halves the image first, so it must be even. "
                f"Nearest: {round_to(self.patch_size, 2)}."
            )
        if self.stem in ("hybrid", "cct") and self.patch_size not in (1, 2, 4, 8):
            raise UserError(
                f"patch_size is {self.patch_size}; stem {self.stem!r} halves the image up to three times, so it must "
                f"be 1, 2, 4 or 8. Nearest: {min((1, 2, 4, 8), key=lambda size: abs(size - self.patch_size))}."
            )
        if self.pre_norm and self.stem != "linear":
            raise UserError(
                f"pre_norm is True and stem {self.stem!r}; the norm stands instead of the bias of stem 'linear'. Use "
                "pre_norm=False or stem='linear'."
            )
        if (self.stem_width > 0) != (self.stem == "conv"):
            raise UserError(
                f"stem_width is {self.stem_width} and stem {self.stem!r}; stem 'conv' has a width of at least 1 and "
                "the others none. Use 24 with 'conv', else 0."
            )
        wide = [s for s in self.stages if any(block.num_heads > s.embed_dim for block in s.blocks)]
        if self.attn_scale == "embed_dim" and wide:
            raise UserError(
                f"attn_scale is 'embed_dim' but a block has more heads than the width {wide[0].embed_dim}; their "
                "quotient must be at least 1. Use attn_scale='head_dim'."
            )

    def _check_last_grid(self) -> None:
        """Cells of the last grid that lie half outside of the one before are left out; one must stay."""
        least = self.patch_size << (len(self.stages) - 1)
        if min(sides_of(self.seen_size)) < least:
            raise UserError(
                f"{self._seen} is {size_text(self.seen_size)}; patches of {self.patch_size} pixels and "
                f"{len(self.stages) - 1} reductions leave nothing of it. Nearest: {least}."
            )

    def _check_tokens(self) -> None:
        if self.drops_prefix and (self.distill_token or self.reg_tokens):
            raise UserError(
                "reduction is 'patch', which leaves tokens before the patches behind, but there is a distillation "
                "token or register tokens. Leave them out, or use reduction='conv'."
            )
        if self.global_pool == "token" and not self.class_token:
            raise UserError("global_pool is 'token' but class_token is False; use global_pool='avg'.")
        self._check_attention_pool()
        if self.distill_token and (self.global_pool != "token" or self.patch_head or self.fc_norm):
            raise UserError(
                "distill_token is True; it is read beside the class token, without a patch head or fc_norm. Use "
                "global_pool='token', patch_head=False and fc_norm=False."
            )
        if self.no_embed_class and not (self.has_positions and self.prefix_tokens[0]):
            raise UserError(
                f"no_embed_class is True with position {self.position!r} and {self.prefix_tokens[0]} tokens before "
                "the patches; it says that these have no learned position. Use no_embed_class=False."
            )
        if self.patch_head and self.fc_norm:
            raise UserError(
                "patch_head is True but fc_norm too; the final norm must lie before pooling. Use fc_norm=False."
            )

    def _check_attention_pool(self) -> None:
        heads, hidden = self.pool_num_heads, self.pool_mlp_hidden
        if (self.global_pool == "map") != (heads > 0) or (heads > 0) != (hidden > 0):
            raise UserError(
                f"pool_num_heads is {heads}, pool_mlp_hidden {hidden} and global_pool {self.global_pool!r}; 'map' has "
                "both and the others neither. Give both with global_pool='map', else 0."
            )
        if heads and self.embed_dim % heads:
            divisors = [n for n in range(1, self.embed_dim + 1) if not self.embed_dim % n]
            raise UserError(
                f"pool_num_heads is {heads}; it must divide the last stage's embed_dim {self.embed_dim}. Nearest: "
                f"{min(divisors, key=lambda n: abs(n - heads))}."
            )
        if heads and self.act in ("swiglu", "swiglu_packed"):
            raise UserError(
                f"global_pool is 'map' and act {self.act!r}; the MLP behind the pooling has no gate. Use another act."
            )

    def _check_mixers(self) -> None:
        """What positions and class tokens the mixers can take; sizes are checked by the mixers themselves."""
        kind = rotary_of(self.position)
        if self.rotary_base == BASES.get(kind):
            object.__setattr__(self, "rotary_base", None)  # equal Archs are equal values
        if (self.rotary_base is not None and kind == "none") or (self.rotary_grid and kind != "rotary_2d"):
            raise UserError(
                f"rotary_base is {self.rotary_base} and rotary_grid {self.rotary_grid} with position "
                f"{self.position!r}; a base goes with rotary positions, a grid with 'rotary_2d' and "
                "'learned_rotary_2d'. Leave them out."
            )
        parts = {
            "qk_norm": self.qk_norm,
            "qkv_bias 'qv'": self.qkv_bias == "qv",
            "rel_pos_bias": self.rel_pos_bias != "none",
        }
        firsts: dict[tuple[str, int], int] = {}
        for index, block in enumerate(self.blocks):
            firsts.setdefault((block.mixer, block.head_dim), index)
        check_mixers(
            firsts,
            position=self.position,
            relative_position=self.relative_position,
            rel_pos_bias=self.rel_pos_bias,
            num_prefix_tokens=self.prefix_tokens[0],
            parts=[name for name, is_asked in parts.items() if is_asked],
        )

    def _check_selections(self) -> None:
        if self.selector is None and all(block.keep is None for block in self.blocks):
            return
        keeps = [(block.mixer, block.keep) for block in self.blocks]
        first = self.depth - len(self.stages[-1].blocks)
        check_selections(
            self.selector,
            keeps,
            first=first,
            grid=self.grids[-1],
            class_token=self.ends_with_class,
            reads_patches=self.patch_head or self.global_pool != "token",
            relative_position=self.relative_position,
            rel_pos_bias=self.rel_pos_bias,
        )

    @property
    def embed_dim(self) -> int:
        """Width of the last stage, which is also the width of the features."""
        return self.stages[-1].embed_dim

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks of all stages, in order."""
        return tuple(block for stage in self.stages for block in stage.blocks)

    def with_blocks(self, blocks: Iterable[Block]) -> Arch:
        """The same with these blocks, in stages of as many as now."""
        given = iter(blocks)
        stages = [replace(stage, blocks=tuple(islice(given, len(stage.blocks)))) for stage in self.stages]
        return replace(self, stages=tuple(stages))

    @property
    def depth(self) -> int:
        return sum(len(stage.blocks) for stage in self.stages)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return (self.in_chans, *sides_of(self.image_size))

    @property
    def seen_size(self) -> ImageSize:
        """The size at which images are cut into patches."""
        return self.image_size if self.work_size is None else self.work_size

    @property
    def _seen(self) -> str:
        return "image_size" if self.work_size is None else "work_size"

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def first_grid(self) -> str:
        """Rows and columns of the first stage's patches, in words."""
        return size_text(self.grids[0])

    @property
    def stem_kind(self) -> str:
        """The stem and its patch, in words."""
        return f"{self.stem}_{self.patch_size}"

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of patches, per stage: each reduction halves them."""
        height, width = sides_of(self.seen_size)
        rows, columns = height // self.patch_size, width // self.patch_size
        return tuple([(rows >> index, columns >> index) for index in range(len(self.stages))])

    @property
    def asked(self) -> tuple[Asked, ...]:
        """What each block tells the selection behind it."""
        what: Asked = "none"
        if self.selector is not None:
            what = SELECTIONS[self.selector].asked(class_token=self.ends_with_class)
        behind = (*self.blocks[1:], None)
        return tuple([what if block is not None and block.keep else "none" for block in behind])

    @property
    def drops_prefix(self) -> bool:
        """Whether tokens before the patches do not go from stage to stage."""
        return self.reduction == "patch" and len(self.stages) > 1

    @property
    def ends_with_class(self) -> bool:
        """Whether the last stage has a class token."""
        return self.class_token and (self.global_pool == "token" or not self.drops_prefix)

    @property
    def prefix_tokens(self) -> tuple[int, ...]:
        """Class, distillation and register tokens, in this order, per stage."""
        others = int(self.distill_token) + self.reg_tokens
        before = (int(self.class_token) + others,) * (len(self.stages) - 1)
        return (*before, int(self.ends_with_class) + others)

    @property
    def num_prefix_tokens(self) -> int:
        """Those of the last stage."""
        return self.prefix_tokens[-1]

    @property
    def has_positions(self) -> bool:
        """Whether a table of learned positions is added to the tokens."""
        return self.position.startswith("learned")

    @property
    def num_prefix_positions(self) -> int:
        """Tokens before the patches that have a place in the table of learned positions."""
        return 0 if self.no_embed_class else self.prefix_tokens[0]

    @property
    def num_tokens(self) -> int:
        """Tokens that the first stage sees, class token included."""
        return prod(self.grids[0]) + self.prefix_tokens[0]

    @property
    def num_final_tokens(self) -> int:
        """Tokens that come to the end of the last stage, class token included."""
        patches = prod(self.grids[-1])
        if self.selector is not None:
            patches = min(patches if block.keep is None else block.keep for block in self.stages[-1].blocks)
        return patches + self.num_prefix_tokens

    @property
    def id(self) -> str:
        """Short stable name, safe in file names, for example `d192-l12-3f9a1c2b`."""
        digest = hashlib.sha256(json.dumps(_naming(self.to_json()), sort_keys=True).encode()).hexdigest()[:8]
        dims = "x".join(str(stage.embed_dim) for stage in self.stages)
        return f"d{dims}-l{self.depth}-{digest}"

    def describe(self) -> str:
        """One line for a person: `13 blocks, width 192, 3-4 heads, MLP 576-768, patch 16 of 224 px`."""
        widths = "/".join(str(stage.embed_dim) for stage in self.stages)
        heads = _span([block.num_heads for block in self.blocks])
        hidden = _span([block.mlp_hidden for block in self.blocks])
        mixers = Counter(block.mixer for block in self.blocks)
        mixed = "" if set(mixers) == {"softmax"} else "".join(f", {n} {name}" for name, n in mixers.items())
        keeps = [str(block.keep) for block in self.blocks if block.keep is not None]
        kept = (
            f", keeps {'/'.join(keeps)} of {prod(self.grids[-1])} patches ({self.selector})" if keeps else ""
        )
        return (
            f"{self.depth} blocks, width {widths}, {heads} heads, MLP {hidden}{mixed}, "
            f"patch {self.patch_size} of {size_text(self.image_size)} px{kept}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the schema number."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Arch:
        """Read what `to_json` wrote.

        Raises:
            UserError: another schema, unknown or missing fields, values that are not allowed.
        """
        if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:
            schema = value.get("schema") if isinstance(value, Mapping) else None
            why = "Update vitnas" if schema else "It holds no Arch"
            raise UserError(f"the Arch's schema is {schema!r}; this version reads schema {SCHEMA}. {why}.")
        plain = {key: item for key, item in value.items() if key != "schema"}
        try:
            stages = tuple(
                _make(Stage, {**stage, "blocks": tuple(_make(Block, block) for block in stage["blocks"])})
                for stage in plain.pop("stages")
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the Arch's stages cannot be read ({error!r}); each needs embed_dim and blocks."
            ) from error
        arch: Arch = _make(cls, {**plain, "stages": stages})
        return arch


def _naming(value: dict[str, Any]) -> dict[str, Any]:
    """What an id is made of: the first fields, and later ones where they differ from their defaults."""
    stages = [
        {**stage, "blocks": [_changed(Block, block) for block in stage["blocks"]]}
        for stage in value["stages"]
    ]
    return {"schema": value["schema"], **_changed(Arch, {**value, "stages": stages})}


def _changed(kind: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    return {
        field.name: value[field.name]
        for field in fields(kind)
        if field.name in FIRST_FIELDS or value[field.name] != field.default
    }


def round_to(value: int, step: int) -> int:
    """The multiple of `step` nearest to `value`, at least `step`."""
    return max(step, round(value / step) * step)


def _make(kind: Any, values: Mapping[str, Any]) -> Any:
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            raise UserError(
                f"{kind.__name__} has no field {name!r}; it has {', '.join(known)}.{nearest(name, known)}"
            )
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{kind.__name__} cannot be made from {dict(values)} ({error}).") from error


def _span(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"
