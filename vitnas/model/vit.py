"""Model: the static vision transformer of one Arch. It knows nothing of search.

It speaks timm: same parameter names as `timm.models.VisionTransformer` wherever timm can express the Arch, same
methods, same feature extraction for dense tasks. Every module names the axes of its parameters (`layers/axes.py`).

Shapes: B images, N tokens (class token first), D embed_dim, CHW image, Y classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.layers import DropPath, Mlp, PatchEmbed, global_pool_nlc, resample_abs_pos_embed
from timm.models import checkpoint, checkpoint_seq
from torch import Tensor, nn

from vitnas.arch import Arch, Block
from vitnas.errors import UserError
from vitnas.layers.axes import Axes
from vitnas.layers.relative_position import RelativePosition2d
from vitnas.mixers import MIXERS


class TransformerBlock(nn.Module):
    """Pre-norm block: x + mixer(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self, dim: int, mixer: nn.Module, mlp_hidden: int, *, norm_eps: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = mixer
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, mlp_hidden)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def axes(self) -> dict[str, Axes]:
        dim: Axes = (("dim", self.norm1.normalized_shape[0]),)
        hidden: Axes = (("hidden", self.mlp.fc1.out_features),)
        norms = {f"norm{i}.{name}": dim for i in (1, 2) for name in ("weight", "bias")}
        return norms | {
            "mlp.fc1.weight": hidden + dim,
            "mlp.fc1.bias": hidden,
            "mlp.fc2.weight": dim + hidden,
            "mlp.fc2.bias": dim,
        }

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.drop_path1(self.attn(self.norm1(x_BND)))
        return x_BND + self.drop_path2(self.mlp(self.norm2(x_BND)))


class Model(nn.Module):
    """The network of one Arch, with timm's interface.

    Use `build(arch)`, which also initialises the weights. `arch` is what was built; `drop_path` gives the rate of
    stochastic depth per block (or its end value, rising linearly from 0). `blocks` are ready-made ones for `arch`,
    which a Supernet keeps, as making them is most of the work.
    """

    def __init__(
        self,
        arch: Arch,
        *,
        drop_path: float | Sequence[float] = 0.0,
        blocks: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.arch = arch
        self.in_chans, self.num_classes = arch.in_chans, arch.num_classes
        self.global_pool: str = arch.global_pool  # or "", which an Arch does not say: see reset_classifier
        self.embed_dim = self.num_features = self.head_hidden_size = arch.embed_dim
        self.num_prefix_tokens = arch.num_prefix_tokens
        self.grad_checkpointing = False
        dim = arch.embed_dim
        self.patch_embed = PatchEmbed(
            arch.image_size, arch.patch_size, arch.in_chans, dim, output_fmt="NHWC", flatten=False
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if arch.class_token else None
        self.pos_embed = (
            nn.Parameter(torch.empty(1, arch.num_tokens, dim)) if arch.position == "learned" else None
        )
        if blocks is None:
            rates = drop_path_rates(drop_path, arch.depth)
            blocks = [
                make_block(arch, dim, block, rate) for block, rate in zip(arch.blocks, rates, strict=True)
            ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity() if arch.fc_norm else nn.LayerNorm(dim, eps=arch.norm_eps)
        self.fc_norm = nn.LayerNorm(dim, eps=arch.norm_eps) if arch.fc_norm else nn.Identity()
        self.head = nn.Linear(dim, arch.num_classes) if arch.num_classes else nn.Identity()
        self.feature_info = feature_info(arch)
        self.pretrained_cfg = self.default_cfg = default_cfg(arch)

    def axes(self) -> dict[str, Axes]:
        dim: Axes = (("dim", self.embed_dim),)
        one: Axes = (("one", 1),)
        conv = self.patch_embed.proj
        patch: Axes = (
            ("in_chans", conv.in_channels),
            ("patch_h", conv.kernel_size[0]),
            ("patch_w", conv.kernel_size[1]),
        )
        axes = {"patch_embed.proj.weight": dim + patch, "patch_embed.proj.bias": dim}
        if self.cls_token is not None:
            axes["cls_token"] = one + one + dim
        if self.pos_embed is not None:
            axes["pos_embed"] = (*one, ("tokens", self.pos_embed.shape[1]), *dim)
        norm = "fc_norm" if self.arch.fc_norm else "norm"
        axes |= {f"{norm}.weight": dim, f"{norm}.bias": dim}
        if isinstance(self.head, nn.Linear):
            classes: Axes = (("classes", self.head.out_features),)
            axes |= {"head.weight": classes + dim, "head.bias": classes}
        return axes

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, Y) logits."""
        return self.forward_head(self.forward_features(images_BCHW))

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, N, D) tokens, after the final norm."""
        x_BND = self.embed(images_BCHW)
        if self.grad_checkpointing:
            x_BND = checkpoint_seq(self.blocks, x_BND)
        else:
            for block in self.blocks:  # calling `blocks` itself would keep the first block's input to the end
                x_BND = block(x_BND)
        normed: Tensor = self.norm(x_BND)
        return normed

    def forward_head(self, x_BND: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, N, D) tokens to (B, Y) logits, or to (B, D) pooled features with `pre_logits`.

        With `global_pool` "" nothing is pooled and the tokens' axis stays.
        """
        pooled: Tensor = self.fc_norm(
            global_pool_nlc(x_BND, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        )
        return pooled if pre_logits else self.head(pooled)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Patches, class token and positions: (B, C, H, W) to (B, N, D)."""
        x_BND = self.patch_embed(images_BCHW).flatten(1, 2)
        if self.cls_token is not None:
            x_BND = torch.cat([self.cls_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1)
        return x_BND if self.pos_embed is None else x_BND + self.pos_embed

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features after chosen blocks, as timm's method of this name: (B, D, H, W) maps or (B, N, D) tokens.

        Args:
            x: (B, C, H, W) images.
            indices: the last n blocks, or block numbers; None for all.
            return_prefix_tokens: give (features, class token) pairs, if there is a class token.
            norm: apply the final norm to each.
            stop_early: do not run blocks behind the last one asked for.
            output_fmt: "NCHW" maps or "NLC" tokens without the class token.
            intermediates_only: leave out the final features.
            output_dict: give `image_features`, `image_intermediates` and `image_intermediates_prefix` by name.

        Raises:
            UserError: blocks that do not exist, or an unknown format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'. Choose one.")
        take, last = take_indices(len(self.blocks), indices)
        tokens = self.embed(x)
        kept: list[Tensor] = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            tokens = checkpoint(block, tokens) if self.grad_checkpointing else block(tokens)
            if index in take:
                kept.append(self.norm(tokens) if norm else tokens)
        prefix = [item[:, : self.num_prefix_tokens] for item in kept] if self.num_prefix_tokens else []
        maps = [item[:, self.num_prefix_tokens :] for item in kept]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            maps = [item.transpose(1, 2).unflatten(2, grid).contiguous() for item in maps]
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": maps}
            if prefix and return_prefix_tokens:
                named["image_intermediates_prefix"] = prefix
            return named if intermediates_only else named | {"image_features": self.norm(tokens)}
        features = list(zip(maps, prefix, strict=True)) if prefix and return_prefix_tokens else maps
        return features if intermediates_only else (self.norm(tokens), features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last one asked for, and the head; returns the block numbers kept.

        `arch` follows, except that it cannot say that the final norm is gone.
        """
        take, last = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        stage = self.arch.stages[0]
        self.arch = replace(self.arch, stages=(replace(stage, blocks=stage.blocks[: last + 1]),))
        self.feature_info = feature_info(self.arch)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: Literal["token", "avg", ""] | None = None
    ) -> None:
        """Give the model a fresh head for `num_classes` (0: none), and optionally another pooling.

        `global_pool` "" pools nothing, for dense tasks; the Arch then keeps the pooling it had.

        Raises:
            UserError: an unknown pooling, or "token" without a class token.
        """
        arch = replace(self.arch, num_classes=num_classes, global_pool=global_pool or self.arch.global_pool)
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        old = self.patch_embed.proj.weight
        self.head = nn.Identity()
        if num_classes:
            self.head = head = nn.Linear(self.embed_dim, num_classes).to(old)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.record_arch(arch)

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Change the image or patch size, in pixels; positions and patch weights are resampled as timm does.

        Tables of relative positions stay: they go by distance in patches.

        Raises:
            UserError: sides that differ, or a patch that does not divide the image.
        """
        old = self.arch
        arch = replace(
            old,
            image_size=old.image_size if img_size is None else square("img_size", img_size),
            patch_size=old.patch_size if patch_size is None else square("patch_size", patch_size),
        )
        self.patch_embed.set_input_size(img_size=arch.image_size, patch_size=arch.patch_size)
        grid = arch.grid_size
        if self.pos_embed is not None and grid != old.grid_size:
            table = resample_abs_pos_embed(
                self.pos_embed, [grid, grid], [old.grid_size] * 2, num_prefix_tokens=self.num_prefix_tokens
            )
            self.pos_embed = nn.Parameter(table.detach(), requires_grad=self.pos_embed.requires_grad)
        for module in self.modules():
            if isinstance(module, RelativePosition2d):
                module.grid_size = grid
        self.feature_info = feature_info(arch)
        noted = getattr(self, "_model_args", None)
        if noted is not None:  # timm's factory made this Model, and its savers read what it noted
            size = (arch.image_size, arch.image_size)
            self._model_args: dict[str, Any] = {**noted, "img_size": size, "patch_size": arch.patch_size}
            self._traits: dict[str, Any] = {**getattr(self, "_traits", {}), "img_size": size}
        self.record_arch(arch)

    def record_arch(self, arch: Arch) -> None:
        """Take `arch` as what this Model now is, in timm's description of it too."""
        self.arch = arch
        cfg = {**self.pretrained_cfg}
        cfg |= {key: default_cfg(arch)[key] for key in ("num_classes", "input_size")}
        for key in ("mean", "std"):
            if (
                len(cfg[key]) != arch.in_chans
            ):  # other channels than the published ones: their mean, as timm does
                cfg[key] = (sum(cfg[key]) / len(cfg[key]),) * arch.in_chans
        self.pretrained_cfg = self.default_cfg = cfg

    def no_weight_decay(self) -> set[str]:
        """Parameters besides biases and norms that are not decayed, as in timm's VisionTransformer."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates, as in timm."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable


def make_block(arch: Arch, dim: int, block: Block, drop_path: float) -> TransformerBlock:
    """One block of `arch`; the only place where a Block is read into layers."""
    mixer = MIXERS[block.mixer](
        dim,
        block.num_heads,
        head_dim=block.head_dim,
        qkv_bias=arch.qkv_bias,
        relative_position=arch.relative_position,
        grid_size=arch.grid_size,
        num_prefix_tokens=arch.num_prefix_tokens,
    )
    return TransformerBlock(dim, mixer, block.mlp_hidden, norm_eps=arch.norm_eps, drop_path=drop_path)


def drop_path_rates(rate: float | Sequence[float], depth: int) -> Sequence[float]:
    """Rate per block: as given, or rising linearly from 0 to `rate` at the last of `depth` blocks."""
    if not isinstance(rate, int | float):
        return rate
    return [rate * index / max(1, depth - 1) for index in range(depth)]


def take_indices(depth: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Block numbers to take (None: all; n: the last n; negative numbers count from the end) and the last of them."""
    if indices is None or isinstance(indices, int):
        take = list(range(depth - (depth if indices is None else indices), depth))
    else:
        take = [index + depth if index < 0 else index for index in indices]
    if not take or min(take) < 0 or max(take) >= depth:
        raise UserError(
            f"indices is {indices}; the model has blocks 0 to {depth - 1}. Ask for some of these."
        )
    return take, max(take)


def square(name: str, size: int | Sequence[int]) -> int:
    """The side of a size given as one number or as two equal ones."""
    sides = (size,) if isinstance(size, int) else tuple(size)
    if len(set(sides)) != 1 or len(sides) > 2:
        raise UserError(f"{name} is {size}; both sides must be the same number of pixels. Give one number.")
    return int(sides[0])


def feature_info(arch: Arch) -> list[dict[str, Any]]:
    """Per block what timm's feature extraction asks for: module, channels, pixels per feature."""
    widths = [stage.embed_dim for stage in arch.stages for _ in stage.blocks]
    return [
        {"module": f"blocks.{index}", "num_chs": width, "reduction": arch.patch_size}
        for index, width in enumerate(widths)
    ]


def default_cfg(arch: Arch) -> dict[str, Any]:
    """timm's description of a model: what makes it, the input that it expects, its first and last layer."""
    return {
        "architecture": "vitnas_arch",
        "url": "",
        "num_classes": arch.num_classes,
        "input_size": (arch.in_chans, arch.image_size, arch.image_size),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5,) * arch.in_chans,
        "std": (0.5,) * arch.in_chans,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
