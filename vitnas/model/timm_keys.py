"""Plain ViT and DeiT: from timm to a Model, and back. Weight names are the same on both sides, so tensors are copied.

Only what an Arch can say is taken; anything else is refused with every reason. Dropout rates other than stochastic
depth are left behind, as they change nothing outside of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.model.build import build
from vitnas.model.described import default_cfg
from vitnas.model.vit import Model

DATA_KEYS = (
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
)  # how images are prepared, in timm's words


def arch_of_timm(model: Any) -> Arch:
    """The Arch of a timm VisionTransformer.

    Raises:
        UserError: it has parts that an Arch cannot say; all are named.
    """
    reasons = list(_not_plain(model))
    if not reasons:
        reasons = [
            f"blocks.{index}: {reason}"
            for index, block in enumerate(model.blocks)
            for reason in _not_plain_block(block)
        ]
    if not reasons:
        reasons = list(_not_uniform(model))
    if reasons:
        raise UserError(
            f"this {type(model).__name__} cannot be written as an Arch: {'; '.join(reasons)}. "
            "Use a plain ViT or DeiT, for example vit_tiny_patch16_224."
        )
    blocks = tuple(
        Block(
            num_heads=block.attn.num_heads,
            head_dim=block.attn.qkv.out_features // (3 * block.attn.num_heads),
            mlp_hidden=block.mlp.fc1.out_features,
        )
        for block in model.blocks
    )
    return Arch(
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        stages=(Stage(embed_dim=model.embed_dim, blocks=blocks),),
        class_token=model.cls_token is not None,
        position="none" if model.pos_embed is None else "learned",
        global_pool=model.global_pool,
        fc_norm=not _is_identity(model.fc_norm),
        qkv_bias=model.blocks[0].attn.qkv.bias is not None,
        norm_eps=model.blocks[0].norm1.eps,
    )


def from_timm(model: Any) -> Model:
    """The Model of a timm VisionTransformer, with a copy of its weights; the same images give the same logits.

    Raises:
        UserError: it has parts that an Arch cannot say; all are named.

    >>> import timm
    >>> from_timm(timm.create_model("vit_tiny_patch16_224")).arch.embed_dim
    192
    """
    arch = arch_of_timm(model)
    rates = [float(getattr(block.drop_path1, "drop_prob", 0.0) or 0.0) for block in model.blocks]
    weight = model.head.weight if arch.num_classes else model.patch_embed.proj.weight
    made = build(arch, drop_path=rates, device="meta").to(weight.dtype).to_empty(device=weight.device)
    made.load_state_dict(model.state_dict())
    _copy_cfg(model, made)
    return made.train(model.training)


def to_timm(model: Model) -> Any:
    """The timm VisionTransformer of a Model, with a copy of its weights; the same images give the same logits.

    Raises:
        UserError: the Arch has what timm's class cannot say; all reasons are given.
    """
    arch = model.arch
    reasons = list(_not_timm(arch))
    if reasons:
        raise UserError(
            f"{arch.id} is not a timm VisionTransformer: {'; '.join(reasons)}. Keep it as a Model, which timm loads "
            "by the name vitnas_arch."
        )
    first, dim = arch.blocks[0], arch.embed_dim
    ratio = first.mlp_hidden / dim
    made = VisionTransformer(
        img_size=arch.image_size,
        patch_size=arch.patch_size,
        in_chans=arch.in_chans,
        num_classes=arch.num_classes,
        global_pool=arch.global_pool,
        embed_dim=dim,
        depth=arch.depth,
        num_heads=first.num_heads,
        # timm rounds width times ratio down; half a unit more keeps the quotient's error out of it
        mlp_ratio=ratio if int(dim * ratio) == first.mlp_hidden else (first.mlp_hidden + 0.5) / dim,
        qkv_bias=arch.qkv_bias,
        class_token=arch.class_token,
        pos_embed="learn" if arch.position == "learned" else "none",
        fc_norm=arch.fc_norm,
        norm_layer=partial(nn.LayerNorm, eps=arch.norm_eps),
    ).to(model.head_like)
    made.load_state_dict(model.state_dict())
    made.pretrained_cfg = made.default_cfg = {**default_cfg(arch), "architecture": "vision_transformer"}
    _copy_cfg(model, made)
    return made.train(model.training)


def _not_plain(model: Any) -> Iterator[str]:
    """Why the parts around the blocks are not those of a plain ViT."""
    if type(model) is not VisionTransformer:
        yield f"it is a {type(model).__name__}, not timm's VisionTransformer itself"
        return
    stem = model.patch_embed
    if type(stem) is not PatchEmbed or not _is_identity(stem.norm) or stem.proj.bias is None:
        yield "its patches are not embedded by one convolution with a bias"
    elif stem.img_size is None or len({*stem.img_size}) > 1 or len({*stem.patch_size}) > 1:
        yield f"its images {stem.img_size} or patches {stem.patch_size} are not square"
    elif stem.img_size[0] % stem.patch_size[0] or stem.dynamic_img_pad:
        yield "its patches do not divide its images"
    if model.num_prefix_tokens != int(model.cls_token is not None):
        yield f"it has {model.num_prefix_tokens} tokens before the patches (reg_tokens)"
    if model.cls_token is not None and model.pos_embed is not None and model.no_embed_class:
        yield "its class token has no position (no_embed_class)"
    if not _is_identity(model.norm_pre):
        yield "it has a norm before the blocks (pre_norm)"
    if model.attn_pool is not None or model.global_pool not in ("token", "avg") or model.pool_include_prefix:
        yield f"it pools by {model.global_pool!r}, not by 'token' or by 'avg' over the patches"
    if _is_identity(model.norm) == _is_identity(model.fc_norm):
        yield "it has not exactly one final norm"
    if isinstance(model.head, nn.Linear) and model.head.bias is None:
        yield "its head has no bias"
    if len(model.blocks) == 0:
        yield "it has no blocks"


def _not_plain_block(block: Any) -> Iterator[str]:
    if type(block) is not TimmBlock:
        yield f"it is a {type(block).__name__}"
        return
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention:
        yield f"its attention is a {type(attn).__name__}"
    else:
        if not (_is_identity(attn.q_norm) and _is_identity(attn.k_norm)):
            yield "queries and keys are normalised (qk_norm)"
        if not _is_identity(getattr(attn, "norm", None)) or getattr(attn, "gate", None) is not None:
            yield "the output of attention is normalised or gated (scale_attn_norm)"
        if attn.proj.bias is None:
            yield "the output projection has no bias (proj_bias)"
    if not (_is_identity(block.ls1) and _is_identity(block.ls2)):
        yield "it has layer scale (init_values)"
    if type(mlp) is not Mlp:
        yield f"its MLP is a {type(mlp).__name__}"
    elif not _is_identity(mlp.norm) or mlp.fc1.bias is None or mlp.fc2.bias is None:
        yield "its MLP has a norm or lacks biases (scale_mlp_norm, proj_bias)"
    elif not isinstance(mlp.act, nn.GELU) or getattr(mlp.act, "approximate", "none") != "none":
        yield f"its MLP's activation is {type(mlp.act).__name__}, not exact GELU (act_layer)"


def _not_uniform(model: Any) -> Iterator[str]:
    """Why what an Arch says once is not the same everywhere."""
    norms = [norm for block in model.blocks for norm in (block.norm1, block.norm2)]
    norms.append(model.fc_norm if _is_identity(model.norm) else model.norm)
    if not all(isinstance(norm, nn.LayerNorm) and norm.elementwise_affine for norm in norms):
        yield "not every norm is a LayerNorm with weight and bias (norm_layer)"
    elif len({norm.eps for norm in norms}) > 1 or any(norm.bias is None for norm in norms):
        yield "its norms differ in eps or lack a bias"
    if len({block.attn.qkv.bias is None for block in model.blocks}) > 1:
        yield "some of its blocks have a qkv bias and some have none"


def _not_timm(arch: Arch) -> Iterator[str]:
    first = arch.blocks[0]
    if len({(block.num_heads, block.head_dim, block.mlp_hidden, block.mixer) for block in arch.blocks}) > 1:
        yield "its blocks differ in heads, MLP or mixer"
    if any(block.mixer != "softmax" for block in arch.blocks):
        yield "not every mixer is softmax"
    if first.num_heads * first.head_dim != arch.embed_dim:
        yield f"{first.num_heads} heads of {first.head_dim} are not as wide as its embed_dim {arch.embed_dim}"
    if arch.head_norm_eps not in (None, arch.norm_eps):
        yield f"its final norm has its own epsilon {arch.head_norm_eps}"
    if arch.attn_scale == "embed_dim" and any(
        arch.embed_dim // b.num_heads != b.head_dim for b in arch.blocks
    ):
        yield "its attention is not scaled by head_dim ** -0.5"
    if arch.relative_position:
        yield f"it has relative positions (up to {arch.relative_position} patches)"
    if arch.stem != "linear" or len(arch.stages) > 1:
        yield "its stem is not one convolution, or it has several stages"
    if arch.distill_token or arch.patch_head:
        yield "it has a distillation token or a patch head"


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _copy_cfg(source: Any, target: Any) -> None:
    """Keep how images are prepared."""
    cfg = getattr(source, "pretrained_cfg", None) or {}
    kept = {key: cfg[key] for key in DATA_KEYS if cfg.get(key) is not None}
    target.pretrained_cfg = target.default_cfg = {**target.pretrained_cfg, **kept}
