"""The ViT-ResNAS spaces: several stages with elastic widths, heads, hidden units and blocks that may be left out.

Source: Liao, Karaman, Sze, "Searching for Efficient Multi-Stage Vision Transformers" (arXiv 2109.00642), table 1, and
the authors' supernet configurations. A stage has one embedding width; heads and hidden units are chosen per block.
Where two blocks that may be left out follow each other, the second goes with the first. Deviations: PAPERS.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vitnas.arch import Arch, Block, Reduction, Stage, Stem
from vitnas.counting import BYTES, Frame, block_cost, head_part, reduction_part, stem_part
from vitnas.errors import UserError
from vitnas.space.space import Gene, Genes, Matrix, NotInSpace, Space, Term, field_reasons, option_reason


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
            options = tuple(getattr(self, name))
            object.__setattr__(self, name, options)  # lists, as they come from JSON and YAML, would not hash
            if not options or any(b <= a for a, b in pairwise(options)) or options[0] <= 0:
                raise UserError(
                    f"{name} is {options}; options must be positive and rise. Sort them, without repeats."
                )
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

    def follows(self, block: int) -> bool:
        """Whether `block` can only exist where the one before it does."""
        skippable = {number for number, _ in self.skip}
        return block in skippable and block - 1 in skippable


@dataclass(frozen=True, kw_only=True)
class ViTResNASSpace(Space):
    """Genes, stage by stage: `embed_dim.s`, and per block `exists.s.i` (if it may be left out), `num_heads.s.i` and
    `mlp_hidden.s.i`. Sizes are in pixels."""

    kind: ClassVar[str] = "vit_resnas"

    name: str = "vit_resnas"
    image_size: int = 224
    patch_size: int = 14
    in_chans: int = 3
    num_classes: int = 1000
    stages: tuple[StageSpace, ...]
    stem: Stem = "conv"
    stem_width: int = 24
    reduction: Reduction = "residual"
    distill_token: bool = False
    patch_head: bool = False

    def __post_init__(self) -> None:
        stages: list[Any] = list(self.stages)
        made = [stage if isinstance(stage, StageSpace) else StageSpace(**stage) for stage in stages]
        object.__setattr__(self, "stages", tuple(made))
        for before, behind in pairwise(made):
            if self.reduction == "residual" and behind.embed_dims[0] < before.embed_dims[-1]:
                raise UserError(
                    f"a stage may be {behind.embed_dims[0]} wide behind one of {before.embed_dims[-1]}; a residual "
                    "reduction cannot narrow. Raise its embed_dims, or use reduction='conv'."
                )
        self.arch_of((0,) * len(self.genes))  # an Arch checks its own sizes

    @cached_property
    def _places(self) -> tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...]:
        """Per stage: the number of its width's gene, and per block those of existence (-1: always), heads, hidden."""
        places, count = [], 0
        for stage in self.stages:
            skippable = {block for block, _ in stage.skip}
            width, blocks = count, []
            count += 1
            for block in range(stage.depth):
                exists = count if block in skippable else -1
                count += block in skippable
                blocks.append((exists, count, count + 1))
                count += 2
            places.append((width, tuple(blocks)))
        return tuple(places)

    @property
    def genes(self) -> tuple[Gene, ...]:
        return self._genes

    @cached_property
    def _genes(self) -> tuple[Gene, ...]:
        genes = []
        for s, stage in enumerate(self.stages):
            genes.append(Gene(f"embed_dim.{s}", stage.embed_dims, structural=True))
            chances = dict(stage.skip)
            for i in range(stage.depth):
                if i in chances:
                    weights = (chances[i], 1 - chances[i])
                    genes.append(
                        Gene(f"exists.{s}.{i}", (False, True), structural=True, weights=weights, flips=True)
                    )
                genes += [
                    Gene(f"num_heads.{s}.{i}", stage.num_heads),
                    Gene(f"mlp_hidden.{s}.{i}", stage.mlp_hidden),
                ]
        return tuple(genes)

    def arch_of(self, genes: Genes) -> Arch:
        stages = []
        for stage, (width, blocks) in zip(self.stages, self._places, strict=True):
            kept = [i for i, (exists, _, _) in enumerate(blocks) if exists < 0 or genes[exists]]
            in_order = kept == list(range(len(kept)))
            made = tuple(
                Block(
                    num_heads=stage.num_heads[genes[blocks[i][1]]],
                    head_dim=stage.head_dim,
                    mlp_hidden=stage.mlp_hidden[genes[blocks[i][2]]],
                    slot=None if in_order else i,
                )
                for i in kept
            )
            stages.append(Stage(embed_dim=stage.embed_dims[genes[width]], blocks=made))
        return Arch(stages=tuple(stages), **self._fixed())

    def genes_of(self, arch: Arch) -> Genes:
        reasons = field_reasons(arch, self._fixed())
        if len(arch.stages) != len(self.stages):
            reasons.append(f"it has {len(arch.stages)} stages, must have {len(self.stages)}")
        genes = [0] * len(self.genes)
        for s, (stage, given) in enumerate(zip(self.stages, arch.stages, strict=False)):
            found = self._stage_reasons(s, stage, given)
            reasons += found
            if not found:
                self._write_stage(genes, s, given)
        if reasons:
            raise NotInSpace(self.name, arch, reasons)
        return tuple(genes)

    def _stage_reasons(self, s: int, stage: StageSpace, given: Stage) -> list[str]:
        reasons = option_reason(f"stage {s}: embed_dim", given.embed_dim, stage.embed_dims)
        slots = [i if block.slot is None else block.slot for i, block in enumerate(given.blocks)]
        for slot, block in zip(slots, given.blocks, strict=True):
            what = f"stage {s}, block {slot}"
            reasons += option_reason(f"{what}: num_heads", block.num_heads, stage.num_heads)
            reasons += option_reason(f"{what}: mlp_hidden", block.mlp_hidden, stage.mlp_hidden)
            if (block.head_dim, block.mixer) != (stage.head_dim, "softmax"):
                reasons.append(f"{what}: head_dim must be {stage.head_dim}, mixer softmax")
        if slots[-1] >= stage.depth:
            return [*reasons, f"stage {s} has a block {slots[-1]}; it has {stage.depth}, counted from 0"]
        skippable, missing = dict(stage.skip), sorted(set(range(stage.depth)) - set(slots))
        reasons += [
            f"stage {s}, block {slot} is left out; only {', '.join(map(str, skippable)) or 'none'} may be"
            for slot in missing
            if slot not in skippable
        ]
        reasons += [
            f"stage {s}, block {slot} exists without the one before it"
            for slot in slots
            if stage.follows(slot) and slot - 1 in missing
        ]
        if slots == list(range(len(slots))) and given.blocks[0].slot is not None:
            reasons.append(f"stage {s}: slots must be left out where they say nothing")
        return reasons

    def _write_stage(self, genes: list[int], s: int, given: Stage) -> None:
        stage, (width, blocks) = self.stages[s], self._places[s]
        genes[width] = stage.embed_dims.index(given.embed_dim)
        for i, block in enumerate(given.blocks):
            exists, heads, hidden = blocks[i if block.slot is None else block.slot]
            if exists >= 0:
                genes[exists] = 1
            genes[heads] = stage.num_heads.index(block.num_heads)
            genes[hidden] = stage.mlp_hidden.index(block.mlp_hidden)

    def active_matrix(self, genes: Matrix) -> npt.NDArray[np.bool_]:
        active = np.ones(genes.shape, dtype=np.bool_)
        for stage, (_, blocks) in zip(self.stages, self._places, strict=True):
            alive = np.ones(len(genes), dtype=np.bool_)
            for i, (exists, heads, hidden) in enumerate(blocks):
                possible = alive if stage.follows(i) else np.ones(len(genes), dtype=np.bool_)
                alive = possible
                if exists >= 0:
                    active[:, exists] = possible
                    alive = possible & (genes[:, exists] > 0)
                active[:, heads] = active[:, hidden] = alive
        return active

    def size(self) -> int:
        total = 1
        for stage in self.stages:
            skippable, per_block = (
                {block for block, _ in stage.skip},
                len(stage.num_heads) * len(stage.mlp_hidden),
            )
            total *= len(stage.embed_dims)
            run = 0  # blocks in a row that may be left out: any number of the first ones exists
            for block in range(stage.depth + 1):
                if block in skippable:
                    run += 1
                    continue
                total *= sum(per_block**n for n in range(run + 1))
                run = 0
                total *= per_block if block < stage.depth else 1
        return total

    def cost_terms(self) -> list[Term]:
        arch = self.smallest()
        first, last = self._places[0][0], self._places[-1][0]
        stems = [stem_part(arch, dim) for dim in self.stages[0].embed_dims]
        heads = [head_part(arch, dim) for dim in self.stages[-1].embed_dims]
        terms = [_term((first,), stems, (-1,)), _term((last,), heads, (-1,))]
        for s, ((before, _), (behind, _)) in enumerate(pairwise(self._places)):
            dims = [
                reduction_part(arch, s, dim, out)
                for dim in self.stages[s].embed_dims
                for out in self.stages[s + 1].embed_dims
            ]
            terms.append(_term((before, behind), dims, (len(self.stages[s].embed_dims), -1)))
        return [*terms, *self._block_terms(arch)]

    def _block_terms(self, arch: Arch) -> Iterator[Term]:
        """Per block: a table over (embed_dim, existence if it may be left out, num_heads, mlp_hidden)."""
        for s, (stage, (width, blocks)) in enumerate(zip(self.stages, self._places, strict=True)):
            frame = Frame.of(arch, s)
            table = np.array(
                [
                    [
                        [
                            block_cost("softmax", heads, stage.head_dim, hidden, dim, frame)
                            for hidden in stage.mlp_hidden
                        ]
                        for heads in stage.num_heads
                    ]
                    for dim in stage.embed_dims
                ],
                dtype=np.int64,
            )
            removable = np.stack([np.zeros_like(table), table], axis=1)
            for exists, heads, hidden in blocks:
                costs = np.moveaxis(table if exists < 0 else removable, -1, 0)
                genes = (width, heads, hidden) if exists < 0 else (width, exists, heads, hidden)
                yield Term(genes=genes, macs=costs[0], params=costs[1], memory=costs[2] * BYTES)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "options": asdict(self)}

    def _fixed(self) -> dict[str, Any]:
        """The fields of an Arch that do not vary."""
        names = ("image_size", "patch_size", "in_chans", "num_classes", "stem", "stem_width", "reduction")
        same = {name: getattr(self, name) for name in (*names, "distill_token", "patch_head")}
        return same | {
            "class_token": True,
            "position": "learned",
            "relative_position": 0,
            "global_pool": "token",
            "fc_norm": False,
            "qkv_bias": True,
            "norm_eps": 1e-6,
        }


def _term(genes: tuple[int, ...], parts: list[Any], shape: tuple[int, ...]) -> Term:
    costs = np.array([(part.macs, part.params, part.memory * BYTES) for part in parts], dtype=np.int64)
    macs, params, memory = (column.reshape(shape) for column in costs.T)
    return Term(genes=genes, macs=macs, params=params, memory=memory)
