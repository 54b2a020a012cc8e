"""The ViTAS space: patch size, one embedding width, and per slot a block with its heads and widths, or the identity.

Source: Su et al., "ViTAS: Vision Transformer Architecture Search" (arXiv 2106.13700), section 3, and the authors'
configurations for the published sizes. Head counts divide a block's inner width anew, they do not change it. With
`shifted` blocks move up over identities, so that equal networks are one Arch and one set of weights (identity
shifting of the ECCV version); without it every kept block remembers its slot, as in the first version, whose
published nets these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vitnas.arch import Arch, AttnScale, Block, Stage
from vitnas.counting import BYTES, Frame, block_parts, head_part, stem_part
from vitnas.errors import UserError
from vitnas.space.space import Gene, Genes, Matrix, NotInSpace, Space, Term, field_reasons, option_reason


@dataclass(frozen=True, kw_only=True)
class VitasSpace(Space):
    """Genes: `patch_size` (coarse to fine), `embed_dim`, `depth` (identities, shifted), then for every slot `keep.i`
    (identities, not shifted), `num_heads.i`, `inner_dim.i` and `mlp_hidden.i`.

    Sizes are in pixels; options must rise. `inner_dims` are the widths of q, k and v each.
    """

    kind: ClassVar[str] = "vitas"
    merged: ClassVar[Mapping[str, tuple[str, ...]]] = {"inner": ("heads", "head_dim")}

    name: str = "vitas"
    image_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    patch_sizes: tuple[int, ...]
    embed_dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    inner_dims: tuple[int, ...]
    mlp_hiddens: tuple[int, ...]
    num_slots: int
    identity: bool = True
    shifted: bool = True
    attn_scale: AttnScale = "head_dim"

    def __post_init__(self) -> None:
        for name in ("patch_sizes", "embed_dims", "num_heads", "inner_dims", "mlp_hiddens"):
            options = tuple(getattr(self, name))
            object.__setattr__(self, name, options)  # lists, as they come from JSON and YAML, would not hash
            if not options or any(b <= a for a, b in pairwise(options)) or options[0] <= 0:
                raise UserError(
                    f"{name} is {options}; options must be positive and rise. Sort them, without repeats."
                )
        if self.num_slots < 1:
            raise UserError(f"num_slots is {self.num_slots}; a network has at least 1. Use 12.")
        for size in self.patch_sizes:
            if self.image_size % size:
                fits = [n for n in range(1, self.image_size + 1) if self.image_size % n == 0]
                near = min(fits, key=lambda n: abs(n - size))
                raise UserError(
                    f"patch_sizes has {size}; it must divide image_size {self.image_size}. Nearest: {near}."
                )
        step = int(np.lcm.reduce(self.num_heads))
        for width in self.inner_dims:
            if width % step:
                heads = ", ".join(map(str, self.num_heads))
                near = max(1, round(width / step)) * step
                raise UserError(
                    f"inner_dims has {width}; it must be a multiple of every num_heads ({heads}). Nearest: {near}."
                )
        self.arch_of((0,) * len(self.genes))  # an Arch checks its own sizes

    @property
    def genes(self) -> tuple[Gene, ...]:
        return self._genes

    @cached_property
    def _genes(self) -> tuple[Gene, ...]:
        found = [
            Gene("patch_size", self.patch_sizes[::-1], structural=True),
            Gene("embed_dim", self.embed_dims, structural=True),
        ]
        if self._has_depth:
            found.append(Gene("depth", tuple(range(1, self.num_slots + 1)), structural=True))
        for slot in range(self.num_slots):
            if self._has_keep:
                found.append(Gene(f"keep.{slot}", (False, True), structural=True))
            found += [
                Gene(f"num_heads.{slot}", self.num_heads),
                Gene(f"inner_dim.{slot}", self.inner_dims),
                Gene(f"mlp_hidden.{slot}", self.mlp_hiddens),
            ]
        return tuple(found)

    @property
    def _has_depth(self) -> bool:
        return self.identity and self.shifted

    @property
    def _has_keep(self) -> bool:
        return self.identity and not self.shifted

    def _columns(self) -> tuple[int, int]:
        """Where the genes of slot 0 begin, and how many a slot has."""
        return 2 + self._has_depth, 3 + self._has_keep

    def _kept(self, genes: Matrix) -> npt.NDArray[np.bool_]:
        """(n, num_slots): which slots hold a block."""
        first, step = self._columns()
        if self._has_keep:
            kept: npt.NDArray[np.bool_] = genes[:, first::step] == 1
            return kept
        depth = genes[:, 2:3] + 1 if self._has_depth else np.full((len(genes), 1), self.num_slots)
        return np.arange(self.num_slots)[None] < depth

    def settle_matrix(self, genes: Matrix) -> Matrix:
        """An Arch needs a block: where every slot holds the identity, the first gets one."""
        if not self._has_keep:
            return genes
        empty = ~self._kept(genes).any(axis=1)
        if empty.any():
            genes = genes.copy()
            genes[empty, self._columns()[0]] = 1
        return genes

    def active_matrix(self, genes: Matrix) -> npt.NDArray[np.bool_]:
        first, step = self._columns()
        active = np.ones(genes.shape, dtype=np.bool_)
        kept = self._kept(genes)
        for column in range(int(self._has_keep), step):
            active[:, first + column :: step] = kept
        return active

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
        first, step = self._columns()
        if self._has_keep:
            genes[:, first::step] = ~skipped
        else:
            genes[:, 2] = np.maximum(0, (~skipped).sum(axis=1) - 1)
        return self.canonical_matrix(genes)

    def arch_of(self, genes: Genes) -> Arch:
        first, step = self._columns()
        kept = self._kept(np.asarray([genes], dtype=np.int64))[0].tolist()
        if not any(kept):
            kept[0] = True
        slots = [slot for slot, is_kept in enumerate(kept) if is_kept]
        in_order = slots == list(range(len(slots)))
        blocks = []
        for slot in slots:
            at = first + step * slot + self._has_keep
            heads = self.num_heads[genes[at]]
            blocks.append(
                Block(
                    num_heads=heads,
                    head_dim=self.inner_dims[genes[at + 1]] // heads,
                    mlp_hidden=self.mlp_hiddens[genes[at + 2]],
                    slot=None if in_order else slot,
                )
            )
        return Arch(
            patch_size=self.patch_sizes[::-1][genes[0]],
            stages=(Stage(embed_dim=self.embed_dims[genes[1]], blocks=tuple(blocks)),),
            **self._fixed(),
        )

    def genes_of(self, arch: Arch) -> Genes:
        reasons = field_reasons(arch, self._fixed())
        if len(arch.stages) > 1:
            reasons.append(f"there are {len(arch.stages)} stages, must be 1")
        reasons += option_reason("patch_size", arch.patch_size, self.patch_sizes)
        reasons += option_reason("embed_dim", arch.embed_dim, self.embed_dims)
        slots = [index if block.slot is None else block.slot for index, block in enumerate(arch.blocks)]
        depths = range(1 if self.identity else self.num_slots, self.num_slots + 1)
        reasons += option_reason("depth", len(slots), depths)
        if slots[-1] >= self.num_slots:
            reasons.append(f"slot {slots[-1]} does not exist; there are {self.num_slots}")
        if not self._has_keep and slots != list(range(len(slots))):
            reasons.append(f"slots are {slots}; blocks follow each other here")
        for index, block in enumerate(arch.blocks):
            for name, value, options in self._block_options(block):
                reasons += option_reason(f"block {index}: {name}", value, options)
            if block.mixer != "softmax":
                reasons.append(f"block {index}: mixer is {block.mixer!r}, must be 'softmax'")
        if reasons:
            raise NotInSpace(self.name, arch, reasons)
        first, step = self._columns()
        genes = [0] * len(self.genes)
        genes[0] = self.patch_sizes[::-1].index(arch.patch_size)
        genes[1] = self.embed_dims.index(arch.embed_dim)
        if self._has_depth:
            genes[2] = len(slots) - 1
        for slot, block in zip(slots, arch.blocks, strict=True):
            chosen = [options.index(value) for _, value, options in self._block_options(block)]
            genes[first + step * slot : first + step * (slot + 1)] = [1] * self._has_keep + chosen
        return tuple(genes)

    def _block_options(self, block: Block) -> list[tuple[str, int, tuple[int, ...]]]:
        return [
            ("num_heads", block.num_heads, self.num_heads),
            ("inner width", block.num_heads * block.head_dim, self.inner_dims),
            ("mlp_hidden", block.mlp_hidden, self.mlp_hiddens),
        ]

    def size(self) -> int:
        per_slot = len(self.num_heads) * len(self.inner_dims) * len(self.mlp_hiddens)
        ends = len(self.patch_sizes) * len(self.embed_dims)
        if self._has_keep:
            return int(ends * ((1 + per_slot) ** self.num_slots - 1))
        least = 1 if self.identity else self.num_slots
        return int(ends * sum(per_slot**depth for depth in range(least, self.num_slots + 1)))

    def representatives(self) -> list[Arch]:
        """The largest, then one for every other patch size and head count (the two together, as few as can be)."""
        last = [n - 1 for n in self.num_options]
        first, step = self._columns()
        found = [self.largest()]
        for index in range(1, max(len(self.patch_sizes), len(self.num_heads))):
            genes = list(last)
            genes[0] = max(0, last[0] - index)
            for slot in range(self.num_slots):
                at = first + step * slot + self._has_keep
                genes[at] = max(0, last[at] - index)
            found.append(self.decode(genes))
        return found

    def cost_terms(self) -> list[Term]:
        likes = [
            self.arch_of((index, *(0,) * (len(self.genes) - 1))) for index in range(len(self.patch_sizes))
        ]
        ends = np.array(
            [
                [
                    (stem.macs + head.macs, stem.params + head.params, max(stem.memory, head.memory))
                    for dim in self.embed_dims
                    for stem, head in [(stem_part(like, dim), head_part(like, dim))]
                ]
                for like in likes
            ]
        )
        return [_term((0, 1), ends), *self._slot_terms([Frame.of(like) for like in likes])]

    def _slot_terms(self, frames: list[Frame]) -> Iterator[Term]:
        """Per slot one table for attention and one for the MLP, 0 where the slot holds the identity."""
        first, step = self._columns()
        attn = np.array(
            [[[self._part(frame, dim, heads, inner, 1)[0] for inner in self.inner_dims] for heads in self.num_heads]
             for frame in frames for dim in self.embed_dims]
        ).reshape(len(frames), len(self.embed_dims), 1, len(self.num_heads), len(self.inner_dims), 3)  # fmt: skip
        mlp = np.array(
            [[self._part(frame, dim, self.num_heads[0], self.inner_dims[0], hidden)[1] for hidden in self.mlp_hiddens]
             for frame in frames for dim in self.embed_dims]
        ).reshape(len(frames), len(self.embed_dims), 1, len(self.mlp_hiddens), 3)  # fmt: skip
        for slot in range(self.num_slots):
            at = first + step * slot + self._has_keep
            gene: tuple[int, ...] = ()
            alive = np.array([True])
            if self._has_keep:
                gene, alive = (at - 1,), np.array([False, True])
            elif self._has_depth:
                gene, alive = (2,), np.arange(1, self.num_slots + 1) > slot
            yield _term((0, 1, *gene, at, at + 1), attn * alive[:, None, None, None])
            yield _term((0, 1, *gene, at + 2), mlp * alive[:, None, None])

    def _part(
        self, frame: Frame, dim: int, heads: int, inner: int, hidden: int
    ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        block = Block(num_heads=heads, head_dim=inner // heads, mlp_hidden=hidden)
        return block_parts(block, dim, frame, "executed")

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "options": asdict(self)}

    def _fixed(self) -> dict[str, Any]:
        """The fields of an Arch that do not vary."""
        return {
            "image_size": self.image_size,
            "in_chans": self.in_chans,
            "num_classes": self.num_classes,
            "class_token": True,
            "position": "learned",
            "relative_position": 0,
            "global_pool": "token",
            "fc_norm": False,
            "qkv_bias": True,
            "norm_eps": 1e-6,
            "head_norm_eps": 1e-5,
            "attn_scale": self.attn_scale,
        }


def _term(genes: tuple[int, ...], table: npt.NDArray[np.int64]) -> Term:
    """A Term from a table whose last axis is (macs, params, memory in elements)."""
    return Term(genes=genes, macs=table[..., 0], params=table[..., 1], memory=table[..., 2] * BYTES)
