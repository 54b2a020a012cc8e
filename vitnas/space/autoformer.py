"""The AutoFormer space: a plain ViT with elastic width, depth, heads and MLP ratio, and 2-D relative positions.

Source: Chen et al., "AutoFormer: Searching Transformers for Visual Recognition" (arXiv 2107.00651), table 1 and the
authors' supernet configurations. Base allows 8, 9 and 10 heads as the paper does (their YAML leaves 8 out). One
embedding width for all blocks; heads are 64 wide whatever the width. Deviations are listed in PAPERS.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import BYTES, Frame, block_cost, head_part, stem_part
from vitnas.errors import UserError, nearest
from vitnas.space.space import Gene, Genes, Matrix, NotInSpace, Space, Term, field_reasons, option_reason


@dataclass(frozen=True, kw_only=True)
class AutoFormerSpace(Space):
    """Genes: `embed_dim`, `depth`, then `num_heads.i` and `mlp_ratio.i` for each block of the deepest Arch.

    Sizes are in pixels; options must rise.
    """

    kind: ClassVar[str] = "autoformer"

    name: str = "autoformer"
    image_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    head_dim: int = 64
    relative_position: int = 14

    def __post_init__(self) -> None:
        for name in ("embed_dims", "depths", "num_heads", "mlp_ratios"):
            options = tuple(getattr(self, name))
            object.__setattr__(self, name, options)  # lists, as they come from JSON and YAML, would not hash
            if not options or any(b <= a for a, b in pairwise(options)) or options[0] <= 0:
                raise UserError(
                    f"{name} is {options}; options must be positive and rise. Sort them, without repeats."
                )
        self.arch_of((0,) * len(self.genes))  # an Arch checks its own sizes

    @property
    def genes(self) -> tuple[Gene, ...]:
        return self._genes

    @cached_property
    def _genes(self) -> tuple[Gene, ...]:
        per_block = (
            gene
            for index in range(self.depths[-1])
            for gene in (
                Gene(f"num_heads.{index}", self.num_heads),
                Gene(f"mlp_ratio.{index}", self.mlp_ratios),
            )
        )
        head = (
            Gene("embed_dim", self.embed_dims, structural=True),
            Gene("depth", self.depths, structural=True),
        )
        return (*head, *per_block)

    def arch_of(self, genes: Genes) -> Arch:
        dim, depth = self.embed_dims[genes[0]], self.depths[genes[1]]
        blocks = tuple(
            Block(
                num_heads=self.num_heads[genes[2 + 2 * index]],
                head_dim=self.head_dim,
                mlp_hidden=int(dim * self.mlp_ratios[genes[3 + 2 * index]]),
            )
            for index in range(depth)
        )
        return Arch(stages=(Stage(embed_dim=dim, blocks=blocks),), **self._fixed())

    def genes_of(self, arch: Arch) -> Genes:
        reasons = field_reasons(arch, self._fixed())
        if len(arch.stages) > 1:
            reasons.append(f"there are {len(arch.stages)} stages, must be 1")
        dim, depth = arch.embed_dim, arch.depth
        reasons += option_reason("embed_dim", dim, self.embed_dims) + option_reason(
            "depth", depth, self.depths
        )
        hidden = [int(dim * ratio) for ratio in self.mlp_ratios]
        for index, block in enumerate(arch.blocks):
            reasons += option_reason(f"block {index}: num_heads", block.num_heads, self.num_heads)
            reasons += option_reason(f"block {index}: mlp_hidden", block.mlp_hidden, hidden)
            if (block.head_dim, block.mixer, block.slot) != (self.head_dim, "softmax", None):
                reasons.append(f"block {index}: head_dim must be {self.head_dim}, mixer softmax, slot unset")
        if reasons:
            raise NotInSpace(self.name, arch, reasons)
        genes = [self.embed_dims.index(dim), self.depths.index(depth)]
        for block in arch.blocks:
            genes += [self.num_heads.index(block.num_heads), hidden.index(block.mlp_hidden)]
        return tuple(genes) + (0,) * (len(self.genes) - len(genes))

    def active_matrix(self, genes: Matrix) -> npt.NDArray[np.bool_]:
        depth = np.asarray(self.depths)[genes[:, 1]]
        active = np.ones(genes.shape, dtype=np.bool_)
        active[:, 2:] = np.repeat(np.arange(self.depths[-1])[None] < depth[:, None], 2, axis=1)
        return active

    def size(self) -> int:
        per_block = len(self.num_heads) * len(self.mlp_ratios)
        return len(self.embed_dims) * sum(per_block**depth for depth in self.depths)

    def cost_terms(self) -> list[Term]:
        arch = self.smallest()
        ends = [(stem_part(arch, dim), head_part(arch, dim)) for dim in self.embed_dims]
        fixed = Term(
            genes=(0,),
            macs=np.array([stem.macs + head.macs for stem, head in ends]),
            params=np.array([stem.params + head.params for stem, head in ends]),
            memory=np.array([max(stem.memory, head.memory) for stem, head in ends]) * BYTES,
        )
        return [fixed, *self._block_terms(Frame.of(arch))]

    def _block_terms(self, frame: Frame) -> Iterator[Term]:
        """Per block: a table over (embed_dim, depth, num_heads, mlp_ratio), 0 where the depth leaves the block out."""
        table = np.array(
            [
                [
                    [
                        block_cost("softmax", heads, self.head_dim, int(dim * ratio), dim, frame)
                        for ratio in self.mlp_ratios
                    ]
                    for heads in self.num_heads
                ]
                for dim in self.embed_dims
            ],
            dtype=np.int64,
        )  # (embed_dim, num_heads, mlp_ratio, 3)
        for index in range(self.depths[-1]):
            alive = np.array([index < depth for depth in self.depths])
            macs, params, memory = np.moveaxis(table[:, None] * alive[None, :, None, None, None], -1, 0)
            yield Term(
                genes=(0, 1, 2 + 2 * index, 3 + 2 * index), macs=macs, params=params, memory=memory * BYTES
            )

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "options": asdict(self)}

    def _fixed(self) -> dict[str, Any]:
        """The fields of an Arch that do not vary."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "num_classes": self.num_classes,
            "class_token": True,
            "position": "learned",
            "relative_position": self.relative_position,
            "global_pool": "avg",
            "fc_norm": False,
            "qkv_bias": True,
            "norm_eps": 1e-5,
        }


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
    },
}


def autoformer(
    size: str = "tiny",
    *,
    image_size: int = 224,
    patch_size: int = 16,
    num_classes: int = 1000,
    in_chans: int = 3,
    **options: Any,
) -> AutoFormerSpace:
    """The AutoFormer space `tiny`, `small` or `base` (the paper's), or `micro` (ours), for any images.

    Args:
        size: which published space the options start from.
        image_size, patch_size: in pixels; the patch must divide the image.
        options: other fields of `AutoFormerSpace` (embed_dims, depths, num_heads, mlp_ratios, head_dim, ...).

    Raises:
        UserError: unknown size or option, sizes that do not fit.

    >>> autoformer("tiny").size()
    1073565696
    """
    if size not in SIZES:
        raise UserError(f"size is {size!r}; autoformer has {', '.join(SIZES)}.{nearest(size, SIZES)}")
    known = AutoFormerSpace.__dataclass_fields__
    for name in options:
        if name not in known:
            raise UserError(f"the autoformer space has no option {name!r}.{nearest(name, known)}")
    return AutoFormerSpace(
        **{
            "name": f"autoformer_{size}",
            "image_size": image_size,
            "patch_size": patch_size,
            "num_classes": num_classes,
            "in_chans": in_chans,
            **SIZES[size],
            **options,
        }
    )
