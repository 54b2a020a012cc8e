"""The blocks of a Model and what lies between its stages; the only place where they are read out of an Arch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from vitnas.arch import Act, Arch, Block, MlpNorm, Pool, round_to
from vitnas.errors import UserError
from vitnas.grids import Grid, ImageSize, sides_of
from vitnas.layers.axes import Axes
from vitnas.layers.mlp import make_mlp, mlp_axes
from vitnas.layers.reduction import PatchReduction, Reduction, SpatialReduction
from vitnas.layers.rotary import rotary_of
from vitnas.layers.select import Asked, Kept, Picked, Selection
from vitnas.layers.selectors import selection_of
from vitnas.mixers import MIXERS, Mixer


class TransformerBlock(nn.Module):
    """Pre-norm block: x + mixer(norm1(x)), then x + mlp(norm2(x)).

    With `mlp_norm` "stream" the second step is norm2(x) + mlp(norm2(x)), as in the code of CCT. With `layer_scale` what
    a step adds is multiplied by a factor per channel.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_hidden: int,
        *,
        norm_eps: float,
        drop_path: float,
        mlp_norm: MlpNorm = "branch",
        act: Act = "gelu",
        scale_mlp_norm: bool = False,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.norms_stream = mlp_norm == "stream"
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn: Any = mixer
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = make_mlp(dim, mlp_hidden, act, norm_eps=norm_eps if scale_mlp_norm else None)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.set_drop_path(drop_path)

    def set_drop_path(self, rate: float) -> None:
        """Change the rate of stochastic depth of both branches."""
        self.drop_path1 = DropPath(rate) if rate else nn.Identity()
        self.drop_path2 = DropPath(rate) if rate else nn.Identity()

    def axes(self) -> dict[str, Axes]:
        dim: Axes = (("dim", self.norm1.normalized_shape[0]),)
        axes = {f"norm{i}.{name}": dim for i in (1, 2) for name in ("weight", "bias")}
        if isinstance(self.ls1, LayerScale):
            axes |= {"ls1.gamma": dim, "ls2.gamma": dim}
        return axes | {f"mlp.{name}": found for name, found in mlp_axes(self.mlp).items()}

    def forward(
        self,
        x_BND: Tensor,
        kept: Kept | None = None,
        asked: Asked = "none",
        picked: Picked | None = None,
    ) -> Any:
        """(B, N, D) to (B, N, D); with `asked` also what the selection behind goes by.

        `kept` says which tokens selections left; `picked` which of them the block gives, by keys and values of all.
        """
        told = None
        if picked is not None:
            mixed_BND = self.drop_path1(self.ls1(self.attn.mix_picked(self.norm1(x_BND), kept, picked)))
            x_BND = picked.of(x_BND) + mixed_BND
            del mixed_BND
        elif asked != "none":
            mixed_BND, told = self.attn.look(self.norm1(x_BND), kept, asked)
            x_BND = x_BND + self.drop_path1(self.ls1(mixed_BND))
            del mixed_BND
        elif kept is None:
            x_BND = x_BND + self.drop_path1(self.ls1(self.attn(self.norm1(x_BND))))
        else:
            x_BND = x_BND + self.drop_path1(self.ls1(self.attn(self.norm1(x_BND), kept=kept)))
        if self.norms_stream:
            x_BND = self.norm2(x_BND)
            x_BND = x_BND + self.drop_path2(self.ls2(self.mlp(x_BND)))
        else:
            x_BND = x_BND + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BND))))
        return x_BND if asked == "none" else (x_BND, told)


def make_block(arch: Arch, stage: int, block: Block, drop_path: float) -> TransformerBlock:
    """One block of `arch`, in its stage of that number."""
    dim = arch.stages[stage].embed_dim
    options: dict[str, Any] = {
        "head_dim": block.head_dim,
        "size": block.mixer_size,
        "qkv_bias": arch.qkv_bias,
        "rotary": rotary_of(arch.position),
        "rotary_base": arch.rotary_base,
        "rotary_grid": arch.rotary_grid,
        "grid": arch.grids[stage],
        "num_prefix_tokens": arch.prefix_tokens[stage],
        "scale": (dim // block.num_heads) ** -0.5 if arch.attn_scale == "embed_dim" else None,
    }
    kind = MIXERS[block.mixer]
    if kind.takes_relative_position:
        options["relative_position"] = arch.relative_position
    if arch.qk_norm:
        options["qk_norm_eps"] = arch.norm_eps
    if kind.takes_attention_parts:
        options["rel_pos_bias"] = arch.rel_pos_bias
    if kind.default_window:
        options |= {"window": block.window, "window_bias": arch.window_bias}
    mixer = kind(dim, block.num_heads, **options)
    return TransformerBlock(
        dim,
        mixer,
        block.mlp_hidden,
        norm_eps=arch.norm_eps,
        drop_path=drop_path,
        mlp_norm=arch.mlp_norm,
        act=arch.act,
        scale_mlp_norm=arch.scale_mlp_norm,
        layer_scale=arch.layer_scale,
    )


def make_reduction(arch: Arch, index: int) -> Reduction:
    """The reduction behind the stage of that number."""
    if arch.reduction == "patch":
        return PatchReduction(
            arch.stages[index].embed_dim,
            arch.stages[index + 1].embed_dim,
            grid=arch.grids[index],
            prefix_tokens=arch.prefix_tokens[index : index + 2],
            norm_eps=arch.norm_eps,
            has_positions=arch.has_positions,
        )
    return SpatialReduction(
        arch.stages[index].embed_dim,
        arch.stages[index + 1].embed_dim,
        grid=arch.grids[index],
        num_prefix_tokens=arch.num_prefix_tokens,
        norm_eps=arch.norm_eps,
        has_positions=arch.has_positions,
        residual=arch.reduction == "residual",
    )


def make_selections(arch: Arch) -> nn.ModuleDict:
    """The selections of `arch`, by the number of the block that each stands in front of."""
    made = nn.ModuleDict()
    if arch.selector is None:
        return made
    prefix = arch.num_prefix_tokens
    for index, block in enumerate(arch.blocks):
        if block.keep is not None:  # in the last stage alone
            kind = selection_of(arch.selector, block.keep)
            made[str(index)] = kind(arch.embed_dim, block.keep, grid=arch.grids[-1], num_prefix_tokens=prefix)
    return made


def resized(arch: Arch, image_size: ImageSize, patch_size: int) -> Arch:
    """`arch` for images and patches of other sizes; its blocks keep the same share of the patches, rounded."""
    *others, last = arch.stages
    before, work_size = prod(arch.grids[-1]), None
    if arch.work_size is not None:  # the same share of the image's, in whole cells
        cell = patch_size << (0 if arch.drops_prefix else len(others))
        works, olds, news = sides_of(arch.work_size), sides_of(arch.image_size), sides_of(image_size)
        height, width = (
            round_to(round(work * new / old), cell) for work, old, new in zip(works, olds, news, strict=True)
        )
        work_size = (height, width)
    after = prod(side // patch_size >> len(others) for side in sides_of(work_size or image_size))
    blocks = [
        replace(block, keep=max(1, round(block.keep * after / before))) if block.keep else block
        for block in last.blocks
    ]
    stages = (*others, replace(last, blocks=tuple(blocks)))
    return replace(arch, image_size=image_size, work_size=work_size, patch_size=patch_size, stages=stages)


def pruned(arch: Arch, last: int) -> Arch:
    """`arch` up to its block of that number."""
    stages, first = [], 0
    for stage in arch.stages:
        if blocks := stage.blocks[: max(0, last + 1 - first)]:
            stages.append(replace(stage, blocks=blocks))
        first += len(stage.blocks)
    options: dict[str, Any] = {"stages": tuple(stages)}
    if all(block.keep is None for stage in stages for block in stage.blocks):
        options["selector"] = None
    if len(stages) < len(arch.stages) and arch.drops_prefix and arch.class_token:
        # The last stage that is left has a class token, which such an Arch has for reading alone.
        options |= {"global_pool": "token", "pool_num_heads": 0, "pool_mlp_hidden": 0}
    return replace(arch, **options)


def reheaded(arch: Arch, num_classes: int, global_pool: Pool) -> Arch:
    """`arch` with another classifier.

    Raises:
        UserError: a pooling for which it lacks a class token, or in a last stage has one too many.
    """
    changed: dict[str, Any] = {"num_classes": num_classes}
    if global_pool != arch.global_pool:
        changed |= {"global_pool": global_pool, "pool_num_heads": 0, "pool_mlp_hidden": 0}
    made = replace(arch, **changed)
    if made.prefix_tokens != arch.prefix_tokens:
        raise UserError(
            f"global_pool is {global_pool!r}; the last stage of {arch.id} has {arch.num_prefix_tokens} class tokens "
            f"and would have {made.num_prefix_tokens}. Keep {arch.global_pool!r}, or build a model of an Arch with the "
            "other."
        )
    return made


def drop_path_rates(rate: float | Sequence[float], depth: int) -> Sequence[float]:
    """Rate per block: as given, or rising linearly from 0 to `rate` at the last of `depth` blocks."""
    if not isinstance(rate, int | float):
        return rate
    return [rate * index / max(1, depth - 1) for index in range(depth)]


def check_mixer_sizes(arch: Arch) -> None:
    """Raise UserError where the `mixer_size` of a block of `arch` cannot work at its number of tokens."""
    for grid, prefix, stage in zip(arch.grids, arch.prefix_tokens, arch.stages, strict=True):
        for block in stage.blocks:
            tokens = prod(grid) + prefix
            MIXERS[block.mixer].resolve_size(block.mixer_size, block.head_dim, tokens)


def block_grids(arch: Arch) -> list[Grid]:
    """Rows and columns of patches that each block of `arch` sees."""
    return [grid for grid, stage in zip(arch.grids, arch.stages, strict=True) for _ in stage.blocks]


def block_prefixes(arch: Arch) -> list[int]:
    """Tokens before the patches that each block of `arch` sees."""
    return [n for n, stage in zip(arch.prefix_tokens, arch.stages, strict=True) for _ in stage.blocks]


def set_block_grids(blocks: Iterable[nn.Module], arch: Arch) -> None:
    """Tell the blocks of `arch`, which were made for another image size, their grids."""
    for block, grid in zip(blocks, block_grids(arch), strict=True):
        for module in block.modules():
            if isinstance(module, Mixer):
                module.set_grid(grid)


def set_grids_between(reductions: nn.ModuleList, selections: nn.ModuleDict, arch: Arch) -> None:
    """The same for what lies between the blocks."""
    for reduction, grid in zip(reductions, arch.grids, strict=False):
        assert isinstance(reduction, Reduction)
        reduction.set_grid(grid)
    for name, selection in selections.items():
        assert isinstance(selection, Selection)
        selection.set_grid(arch.grids[-1], arch.blocks[int(name)].keep or 0)


def see_grids(blocks: Iterable[nn.Module], reductions: nn.ModuleList, arch: Arch) -> None:
    """Let blocks and what lies between the stages take the images of `arch`, with the weights as they are.

    Raises:
        UserError: a mixer with weights per token.
    """
    for block, grid in zip(blocks, block_grids(arch), strict=True):
        for module in block.modules():
            if isinstance(module, Mixer):
                module.see_grid(grid)
    for reduction, grid in zip(reductions, arch.grids, strict=False):
        assert isinstance(reduction, Reduction)
        reduction.see_grid(grid)
