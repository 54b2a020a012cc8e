"""What an Arch costs, counted from the Arch alone: multiply-accumulates, parameters, peak activation memory.

**MACs** are of one image. 1 MAC = 2 FLOPs. Counted: convolutions, linear layers and the matrix products of attention,
with the class token, the classifier once. Not counted: biases, norms, softmax, activations, pooling. Conventions:

- `executed` (the default, used everywhere unless another is named): what the Model really multiplies; equal to
  `torch.utils.flop_counter / 2`.
- `plain`: without the cost of relative positions (AutoFormer's published T and B).
- `dense_relative`: with relative positions as two N x N x head_dim products per layer, as the authors' AutoFormer code
  computes them (its published S).
- `patch_tokens`: patches alone, without the class token and relative positions, and the classifier once per patch, as
  the authors' ViTAS code counts (its published A, B, C, E and F).

**Parameters** are elements, unused ones (the class token under mean pooling, a patch head outside of training)
included, as AutoFormer, ViT-ResNAS and timm count.

**Memory** is the largest number of bytes of activations that are alive at once in a float32 forward pass of one image
without gradients; weights and the image itself are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from vitnas.arch import Act, Arch, Block, MlpNorm
from vitnas.budget import Cost
from vitnas.grids import Grid, sides_of
from vitnas.layers.mlp import mlp_cost
from vitnas.layers.pool import AttentionPool
from vitnas.layers.reduction import PatchReduction, SpatialReduction
from vitnas.layers.rotary import RotaryKind, rotary_of
from vitnas.layers.select import Asked, SelectionFrame
from vitnas.layers.selectors import selection_of
from vitnas.layers.stem import STEMS
from vitnas.mixers import MIXERS, Convention, MixerShape, QkvBias

BYTES = 4  # float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of a Model. `memory` is the elements alive at the part's own peak."""

    name: str
    macs: int
    params: int
    memory: int


class Frame(NamedTuple):
    """What a block's cost depends on besides its widths. A tuple, as it is hashed in the fastest path.

    `keep` patches are left of the grid (None: all), `came` patches give keys and values (None: those left), and
    with `sized` these stand for different numbers of patches. `asked`: what the block tells the selection behind it.
    """

    grid: Grid
    num_prefix_tokens: int
    relative_position: int
    qkv_bias: QkvBias
    rotary: RotaryKind = "none"
    mlp_norm: MlpNorm = "branch"
    act: Act = "gelu"
    scale_mlp_norm: bool = False
    layer_scale: bool = False
    qk_norm: bool = False
    rel_pos_bias: str = "none"
    keep: int | None = None
    asked: Asked = "none"
    came: int | None = None
    sized: bool = False
    window_bias: str = "step"

    @property
    def patches(self) -> int:
        return prod(self.grid) if self.keep is None else self.keep

    @classmethod
    def of(cls, arch: Arch, stage: int = 0) -> Frame:
        """Of a stage's blocks before any selection."""
        return cls(
            arch.grids[stage],
            arch.prefix_tokens[stage],
            arch.relative_position,
            arch.qkv_bias,
            rotary_of(arch.position),
            arch.mlp_norm,
            arch.act,
            arch.scale_mlp_norm,
            arch.layer_scale,
            arch.qk_norm,
            arch.rel_pos_bias,
            window_bias=arch.window_bias,
        )


def count(arch: Arch, *, convention: Convention = "executed") -> Cost:
    """Cost of `arch`, in some 20 microseconds."""
    first, last = stem_part(arch, arch.stages[0].embed_dim), head_part(arch, arch.embed_dim, convention)
    macs, params = first.macs + last.macs, first.params + last.params
    memory = max(first.memory, last.memory)
    for block, dim, frame, part in framed(arch):
        if part is not None:
            macs, params, memory = macs + part.macs, params + part.params, max(memory, part.memory)
        cost = block_cost(
            block.mixer,
            block.num_heads,
            block.head_dim,
            block.mlp_hidden,
            dim,
            frame,
            convention,
            block.mixer_size,
            block.window,
        )
        macs += cost[0]
        params += cost[1]
        memory = max(memory, cost[2])
    return Cost(macs=macs, params=params, memory_bytes=memory * BYTES)


def parts(arch: Arch, *, convention: Convention = "executed") -> list[Part]:
    """Cost of each part, in order: stem, `blocks.i.attn` and `blocks.i.mlp` (each with its norm), head.

    In front of each stage but the first, `reductions.s`; in front of a block that fewer patches enter, `selections.i`.
    """
    found = [stem_part(arch, arch.stages[0].embed_dim)]
    for index, (block, dim, frame, part) in enumerate(framed(arch)):
        if part is not None:
            found.append(part if block.keep is None else replace(part, name=f"selections.{index}"))
        attn, mlp = block_parts(block, dim, frame, convention)
        found.append(Part(name=f"blocks.{index}.attn", macs=attn[0], params=attn[1], memory=attn[2]))
        found.append(Part(name=f"blocks.{index}.mlp", macs=mlp[0], params=mlp[1], memory=mlp[2]))
    return [*found, head_part(arch, arch.embed_dim, convention)]


def framed(arch: Arch) -> Iterator[tuple[Block, int, Frame, Part | None]]:
    """Each block with its width, its frame, and the reduction or the selection in front of it."""
    before, part, selector, head_dim = 0, None, arch.selector, 0
    asked = iter(()) if selector is None else iter(arch.asked)
    for number, stage in enumerate(arch.stages):
        dim, frame = stage.embed_dim, Frame.of(arch, number)
        if number:
            part = reduction_part(arch, number - 1, before, dim)
        for block in stage.blocks:
            if selector is not None:
                if block.keep is not None:
                    part = selection_part(selector, dim, frame, block.keep, head_dim)
                frame = behind(selector, frame, block.keep)._replace(asked=next(asked))
            yield block, dim, frame, part
            part, head_dim = None, block.head_dim
        before = dim


def behind(selector: str, frame: Frame, keep: int | None) -> Frame:
    """Of the block behind one of `frame`, which keeps so many patches (None: all that come)."""
    if keep is None:
        return frame._replace(came=None, sized=frame.sized and frame.keep != 0)
    kind = selection_of(selector, keep)
    came = frame.patches if kind.keeps_keys else None
    return frame._replace(keep=keep, came=came, sized=frame.sized or kind.has_sizes)


@lru_cache(maxsize=100_000)
def selection_part(selector: str, dim: int, frame: Frame, keep: int, head_dim: int) -> Part:
    """The selection of `keep` patches behind a block of `frame` whose heads are `head_dim` wide, or where frame is the
    stage's own in front of all."""
    cost = selection_of(selector, keep).cost(
        dim,
        before=frame.patches,
        keep=keep,
        frame=SelectionFrame(
            frame.grid, frame.num_prefix_tokens, head_dim, frame.keep is not None, frame.sized
        ),
    )
    return Part(name="selection", macs=cost.macs, params=cost.params, memory=cost.memory)


@lru_cache(maxsize=100_000)
def block_cost(
    mixer: str,
    num_heads: int,
    head_dim: int,
    mlp_hidden: int,
    dim: int,
    frame: Frame,
    convention: Convention = "executed",
    mixer_size: int | None = None,
    window: int | None = None,
) -> tuple[int, int, int]:
    """(macs, params, memory in elements) of one block of width `dim`."""
    block = Block(
        num_heads=num_heads,
        head_dim=head_dim,
        mlp_hidden=mlp_hidden,
        mixer=mixer,
        mixer_size=mixer_size,
        window=window,
    )
    attn, mlp = block_parts(block, dim, frame, convention)
    return attn[0] + mlp[0], attn[1] + mlp[1], max(attn[2], mlp[2])


def block_parts(
    block: Block, dim: int, frame: Frame, convention: Convention
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(macs, params, memory in elements) of attention and of the MLP, each with its norm."""
    shape, kind = shape_of(block, dim, frame), MIXERS[block.mixer]
    inner = mlp_cost(dim, block.mlp_hidden, frame.act, has_norm=frame.scale_mlp_norm)
    tokens, keys, scale = shape.tokens, shape.keys, dim if frame.layer_scale else 0
    rows = _rows_memory(shape)
    told = {"none": 0, "keys": tokens * block.head_dim}.get(frame.asked, tokens)
    # The authors of ViTAS count patches alone.
    counted = shape._replace(num_prefix_tokens=0) if convention == "patch_tokens" else shape
    attn = (
        kind.macs(counted, convention),
        kind.params(shape) + 2 * dim + scale,
        # The residual and the normed input stay alive while the mixer runs.
        2 * keys * dim + kind.memory(shape) + rows,
    )
    # The block's input and the residual after attention, and the normed input if it is another tensor, stay alive.
    held = 2 if frame.mlp_norm == "stream" else 3
    beside = rows + told  # which stays alive too
    mlp = (
        counted.tokens * inner.macs,
        inner.params + 2 * dim + scale,
        # The last sum beside its terms and the block's input is the most where the MLP is narrow.
        (keys - tokens) * dim + tokens * max(held * dim + inner.memory, 4 * dim) + beside,
    )
    return attn, mlp


def _rows_memory(shape: MixerShape) -> int:
    """Elements of the numbers of a block's tokens, which are 64-bit integers, and of their sizes, where some of the
    grid's are gone."""
    if shape.keep is None:
        return 0
    rows, sizes = 2 * shape.tokens, shape.keys if shape.sized else 0
    if shape.came is None or shape.came == prod(shape.grid):
        return rows + sizes
    # Those that came, and which of them are picked.
    return rows + sizes + 2 * shape.keys + (rows if shape.keep else 0)


def shape_of(block: Block, dim: int, frame: Frame) -> MixerShape:
    """What the cost of a block's mixer depends on.

    Raises:
        UserError: a mixer_size that cannot work.
    """
    tokens = frame.patches + frame.num_prefix_tokens
    size = MIXERS[block.mixer].resolve_size(block.mixer_size, block.head_dim, tokens)
    return MixerShape(
        dim,
        block.num_heads,
        block.head_dim,
        size,
        frame.grid,
        frame.num_prefix_tokens,
        frame.relative_position,
        frame.rotary,
        frame.qkv_bias,
        frame.qk_norm,
        frame.rel_pos_bias,
        frame.keep,
        frame.asked,
        frame.came,
        frame.sized,
        block.window,
        frame.window_bias,
    )


def stem_part(arch: Arch, dim: int) -> Part:
    """Patch embedding, class token and positions, for an embedding of width `dim`."""
    patches, prefix = prod(arch.grids[0]), arch.prefix_tokens[0]
    tokens = patches + prefix
    positions = (patches + arch.num_prefix_positions) * dim if arch.has_positions else 0
    # Patches beside all tokens as they are joined, then each sum or norm beside what it is made of.
    joining = (patches + tokens) * dim if prefix else 0
    norming = 2 * tokens * dim + 2 * tokens if arch.pre_norm else 0
    patch_norming = 2 * patches * dim + 2 * patches if arch.patch_norm else 0
    resized = 0 if arch.work_size is None else arch.in_chans * prod(sides_of(arch.work_size))
    cost = STEMS[arch.stem].cost(
        sides_of(arch.seen_size), arch.patch_size, arch.in_chans, dim, arch.stem_width
    )
    return Part(
        name="stem",
        macs=cost.macs,
        # A norm in front of the blocks stands instead of a bias of the stem.
        params=cost.params
        + prefix * dim
        + positions
        + (dim if arch.pre_norm else 0)
        + (2 * dim if arch.patch_norm else 0),
        memory=max(resized + cost.memory, patch_norming, joining, 2 * positions, norming),
    )


def reduction_part(arch: Arch, index: int, dim: int, out_dim: int) -> Part:
    """The reduction behind stage `index`, from width `dim` to `out_dim`."""
    if arch.reduction == "patch":
        cost = PatchReduction.cost(
            dim,
            out_dim,
            grid=arch.grids[index],
            prefix_tokens=arch.prefix_tokens[index : index + 2],
            has_positions=arch.has_positions,
        )
    else:
        cost = SpatialReduction.cost(
            dim,
            out_dim,
            grid=arch.grids[index],
            num_prefix_tokens=arch.num_prefix_tokens,
            has_positions=arch.has_positions,
            residual=arch.reduction == "residual",
        )
    return Part(name=f"reductions.{index}", macs=cost.macs, params=cost.params, memory=cost.memory)


def head_part(
    arch: Arch,
    dim: int,
    convention: Convention = "executed",
    *,
    keep: int | None = None,
    selector: str | None = None,
) -> Part:
    """Final norm and classifiers, for features of width `dim`; where `keep` patches are given that `selector` left, of
    these instead of what `arch` keeps."""
    patches = arch.num_final_tokens - arch.num_prefix_tokens
    if keep is None:
        selector = arch.selector
    else:
        patches = keep
    left, classes = patches + arch.num_prefix_tokens, arch.num_classes
    tokens, used = left * dim, 1 + arch.distill_token
    macs, params, pooling = 0, 0, 0
    sized = selector is not None and selection_of(selector, patches).has_sizes
    sizes = patches if sized and arch.global_pool in ("avg", "seq") else 0
    if arch.global_pool == "avg" and sized:
        pooling = sizes + max(patches * dim + dim, 2 * dim + 1)
    elif arch.global_pool == "seq":
        macs, params = 2 * patches * dim, dim + 1
        pooling = sizes + 4 * patches + 1 if sized else 0
    elif arch.global_pool == "map":
        of_pool = (dim, arch.pool_num_heads, arch.pool_mlp_hidden, arch.act)
        cost = AttentionPool.cost(*of_pool, patches=patches)
        macs, params, pooling = cost.macs, cost.params, cost.memory
    pooled = 0 if arch.global_pool == "token" else dim  # the class token alone is a view
    normed = dim if arch.fc_norm else 0
    # With a distillation token, both heads' logits and their sum; or the two tokens' sum and mean.
    logits = (3 * classes if classes else 2 * dim) if arch.distill_token else classes
    heads = (used + arch.patch_head) * (dim * classes + classes)
    return Part(
        name="head",
        macs=used * dim * classes * (patches if convention == "patch_tokens" else 1) + macs,
        params=2 * dim + heads + params,
        # The tokens stay alive to the end.
        memory=tokens
        + (0 if selector is None else 3 * left if sized else 2 * left)
        + max(tokens, pooling, sizes + pooled + normed, (normed or pooled) + logits),
    )
