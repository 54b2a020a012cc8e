"""Vision transformers of timm: to a Model, and back. Weights have the same names on both sides, but for the few that
timm itself calls otherwise in one class, so tensors are copied.

Only what an Arch can say is taken; anything else is refused with every reason. Dropout rates other than stochastic
depth are left behind, as they change nothing outside of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any, get_args

from timm.layers import (
    GELU,
    Attention,
    AttentionPoolLatent,
    AttentionRope,
    GELUTanh,
    GluMlp,
    Mlp,
    PatchEmbed,
    RelPosMlp,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    SwiGLU,
    SwiGLUPacked,
)
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, VisionTransformerRelPos
from torch import nn

from vitnas.arch import Act, Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.layers.mlp import ACTS, mlp_ratio
from vitnas.layers.position_bias import MLP_HIDDEN
from vitnas.layers.rotary import BASES, rotary_of
from vitnas.model.build import build
from vitnas.model.timm_cfg import copy_data_cfg, default_cfg
from vitnas.model.vit import Model

ARCHITECTURES: dict[Any, str] = {
    VisionTransformer: "vision_transformer",
    VisionTransformerDistilled: "vision_transformer_distilled",
    Eva: "eva",
    Beit: "beit",
    VisionTransformerRelPos: "vision_transformer_relpos",
}
OF_BEIT = (Eva, Beit)
OTHER_NAMES = {  # of the same weights, in these two
    ".gamma_1": ".ls1.gamma",
    ".gamma_2": ".ls2.gamma",
    ".attn.relative_position_bias_table": ".attn.rel_pos.relative_position_bias_table",
}
LAYER_SCALE = 1e-5  # any number makes timm build it; the weights follow


def arch_of_timm(model: Any) -> Arch:
    """The Arch of a timm vision transformer.

    Raises:
        UserError: it has parts that an Arch cannot say; all are named.
    """
    reasons = list(_not_plain(model)) or [
        f"blocks.{index}: {reason}"
        for index, block in enumerate(model.blocks)
        for reason in _not_plain_block(block)
    ]
    if reasons := reasons or list(_not_uniform(model)):
        raise UserError(
            f"this {type(model).__name__} cannot be written as an Arch: {'; '.join(reasons)}. "
            "Use a plain ViT or DeiT, for example vit_tiny_patch16_224."
        )
    blocks = tuple(
        Block(
            num_heads=block.attn.num_heads,
            head_dim=block.attn.qkv.out_features // (3 * block.attn.num_heads),
            mlp_hidden=block.mlp.fc2.in_features,
        )
        for block in model.blocks
    )
    pool = getattr(model, "attn_pool", None)
    registers = getattr(model, "reg_token", None)
    positions = _positions(model)
    prefixed = positions["position"].startswith("learned") and model.num_prefix_tokens > 0
    return Arch(
        image_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size[0],
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        stages=(Stage(embed_dim=model.embed_dim, blocks=blocks),),
        class_token=model.cls_token is not None,
        distill_token=getattr(model, "dist_token", None) is not None,
        reg_tokens=0 if registers is None else registers.shape[1],
        no_embed_class=prefixed and getattr(model, "no_embed_class", False),
        pre_norm=not _is_identity(getattr(model, "norm_pre", None)),
        global_pool=model.global_pool,
        pool_num_heads=0 if pool is None else pool.num_heads,
        pool_mlp_hidden=0 if pool is None else pool.mlp.fc1.out_features,
        fc_norm=not _is_identity(model.fc_norm),
        norm_eps=model.blocks[0].norm1.eps,
        **positions,
        **_block_facts(model.blocks[0]),
    )


def arch_in(network: Any) -> Arch:
    """The Arch of a Model, or of a timm vision transformer (see `arch_of_timm`)."""
    return network.arch if isinstance(network, Model) else arch_of_timm(network)


def from_timm(model: Any) -> Model:
    """The Model of a timm vision transformer, with a copy of its weights; the same images give the same logits.

    Raises:
        UserError: it has parts that an Arch cannot say; all are named.

    >>> import timm
    >>> from_timm(timm.create_model("vit_tiny_patch16_224")).arch.embed_dim
    192
    """
    arch = arch_of_timm(model)
    rates = [float(getattr(block.drop_path1, "drop_prob", 0.0) or 0.0) for block in model.blocks]
    like = model.patch_embed.proj.weight
    made = build(arch, drop_path=rates, device="meta").to(like.dtype).to_empty(device=like.device)
    names = OTHER_NAMES if isinstance(model, OF_BEIT) else {}
    made.load_state_dict({_renamed(name, names): value for name, value in model.state_dict().items()})
    copy_data_cfg(model, made)
    return made.train(model.training)


def to_timm(model: Model) -> Any:
    """The timm vision transformer of a Model, with a copy of its weights; the same images give the same logits.

    Raises:
        UserError: the Arch has what timm's class cannot say; all reasons are given.
    """
    arch = model.arch
    reasons = list(not_timm(arch))
    if reasons:
        raise UserError(
            f"{arch.id} is not a timm VisionTransformer: {'; '.join(reasons)}. Keep it as a Model, which timm loads "
            "by the name vitnas_arch."
        )
    made = _made(arch).to(model.head_like)
    said, plain = arch_of_timm(made), as_timm_says(arch)
    if other := [
        field.name for field in fields(Arch) if getattr(said, field.name) != getattr(plain, field.name)
    ]:
        raise UserError(
            f"{arch.id} is not a timm {type(made).__name__}: that has no such {', '.join(other)}. Keep it as a Model, "
            "which timm loads by the name vitnas_arch."
        )
    names = {ours: theirs for theirs, ours in OTHER_NAMES.items()} if isinstance(made, OF_BEIT) else {}
    made.load_state_dict({_renamed(name, names): value for name, value in model.state_dict().items()})
    made.pretrained_cfg = made.default_cfg = {**default_cfg(arch), "architecture": ARCHITECTURES[type(made)]}
    copy_data_cfg(model, made)
    return made.train(model.training)


def as_timm_says(arch: Arch) -> Arch:
    """`arch` as `arch_of_timm` would say the same network."""
    scaled = any(arch.embed_dim // block.num_heads != block.head_dim for block in arch.blocks)
    return replace(
        arch.with_blocks(replace(block, slot=None) for block in arch.blocks),
        attn_scale=arch.attn_scale if scaled else "head_dim",
        head_norm_eps=None if arch.head_norm_eps == arch.norm_eps else arch.head_norm_eps,
    )


def _made(arch: Arch) -> Any:
    """A network of the timm class that has what `arch` asks for, or most of it."""
    if arch.rel_pos_bias != "none":
        return _beit(arch) if (arch.rel_pos_bias, arch.qkv_bias) == ("table", "qv") else _relpos(arch)
    if arch.qkv_bias == "qv" or rotary_of(arch.position) != "none":
        return _eva(arch)
    return _vision_transformer(arch)


def _common(arch: Arch) -> dict[str, Any]:
    """What timm's classes are told by the same names."""
    return {
        "img_size": arch.image_size,
        "patch_size": arch.patch_size,
        "in_chans": arch.in_chans,
        "num_classes": arch.num_classes,
        "global_pool": arch.global_pool,
        "embed_dim": arch.embed_dim,
        "depth": arch.depth,
        "num_heads": arch.blocks[0].num_heads,
        "qkv_bias": bool(arch.qkv_bias),
        "init_values": LAYER_SCALE if arch.layer_scale else None,
        "norm_layer": partial(nn.LayerNorm, eps=arch.norm_eps),
        "mlp_ratio": mlp_ratio(arch.embed_dim, arch.blocks[0].mlp_hidden),
    }


def words_of_vit(arch: Arch) -> dict[str, Any]:
    """What timm's plain classes are told of `arch` by words that JSON holds."""
    return {
        **{key: value for key, value in _common(arch).items() if key != "norm_layer"},
        "class_token": arch.class_token,
        "no_embed_class": arch.no_embed_class,
        "qk_norm": arch.qk_norm,
        "scale_mlp_norm": arch.scale_mlp_norm,
        "reg_tokens": arch.reg_tokens,
        "pre_norm": arch.pre_norm,
        "pos_embed": "learn" if arch.has_positions else "none",
        "fc_norm": arch.fc_norm,
    }


def _vision_transformer(arch: Arch) -> Any:
    hidden = arch.blocks[0].mlp_hidden
    wide = 2 * hidden if arch.act == "swiglu_packed" else hidden
    kind = VisionTransformerDistilled if arch.distill_token else VisionTransformer
    return kind(
        **{**words_of_vit(arch), "mlp_ratio": mlp_ratio(arch.embed_dim, wide)},
        norm_layer=partial(nn.LayerNorm, eps=arch.norm_eps),
        act_layer=ACTS.get(arch.act, nn.SiLU),
        mlp_layer={"swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}.get(arch.act, Mlp),
    )


def _eva(arch: Arch) -> Eva:
    kind = rotary_of(arch.position)
    return Eva(
        **_common(arch),
        class_token=arch.class_token,
        no_embed_class=arch.no_embed_class,
        qk_norm=arch.qk_norm,
        swiglu_mlp=arch.act in ("swiglu", "swiglu_packed"),
        swiglu_align_to=int(arch.act == "swiglu"),
        scale_mlp=arch.scale_mlp_norm,
        attn_type="rope" if arch.qkv_bias is True else "eva",
        num_reg_tokens=arch.reg_tokens,
        use_abs_pos_emb=arch.has_positions,
        use_rot_pos_emb=kind != "none",
        rope_type="dinov3" if kind == "rotary_dinov3" else "cat",
        rope_rotate_half=kind == "rotary_dinov3",
        rope_temperature=arch.rotary_base or BASES.get(kind, 1.0),
        ref_feat_shape=arch.rotary_grid or None,
        use_pre_transformer_norm=arch.pre_norm,
        use_post_transformer_norm=not arch.fc_norm,
        use_fc_norm=arch.fc_norm,
    )


def _beit(arch: Arch) -> Beit:
    return Beit(
        **_common(arch),
        swiglu_mlp=arch.act == "swiglu",
        scale_mlp=arch.scale_mlp_norm,
        use_abs_pos_emb=arch.has_positions,
        use_rel_pos_bias=True,
        use_fc_norm=arch.fc_norm,
    )


def _relpos(arch: Arch) -> VisionTransformerRelPos:
    return VisionTransformerRelPos(
        **_common(arch),
        class_token=arch.class_token,
        fc_norm=arch.fc_norm,
        qk_norm=arch.qk_norm,
        rel_pos_type="mlp" if arch.rel_pos_bias == "mlp" else "bias",
        act_layer=ACTS.get(arch.act),
    )


def _positions(model: Any) -> dict[str, Any]:
    """An Arch's fields of positions."""
    learned, rope = getattr(model, "pos_embed", None) is not None, getattr(model, "rope", None)
    if rope is None:
        return {"position": "learned" if learned else "none"}
    kind = "rotary_dinov3" if isinstance(rope, RotaryEmbeddingDinoV3) else "rotary_2d"
    grid = getattr(rope, "ref_feat_shape", None)
    return {
        "position": f"learned_{kind}" if learned else kind,
        "rotary_base": None if rope.temperature == BASES[kind] else float(rope.temperature),
        "rotary_grid": 0 if grid is None else grid[0],
    }


def _not_plain(model: Any) -> Iterator[str]:
    """Why the parts around the blocks are not those of a plain ViT."""
    if type(model) not in ARCHITECTURES:
        known = ", ".join(kind.__name__ for kind in ARCHITECTURES)
        yield f"it is a {type(model).__name__}, not one of timm's {known}"
        return
    stem = model.patch_embed
    if type(stem) is not PatchEmbed or not _is_identity(stem.norm):
        yield f"its patches are not embedded by one convolution, but by a {type(stem).__name__}"
    elif (stem.proj.bias is None) == _is_identity(getattr(model, "norm_pre", None)):
        yield "its patch embedding has a bias and a norm behind it, or neither (pre_norm)"
    elif stem.img_size is None:
        yield "its images have no fixed size"
    elif len({*stem.patch_size}) > 1:
        yield f"its patches {stem.patch_size} are not square"
    elif any(side % stem.patch_size[0] for side in stem.img_size) or stem.dynamic_img_pad:
        sides = " x ".join(map(str, stem.img_size))
        yield f"its patches of {stem.patch_size[0]} pixels do not divide images of {sides}"
    if isinstance(model, VisionTransformerDistilled) and (
        model.reg_token is not None or model.no_embed_class
    ):
        yield "it has a distillation token beside reg_tokens or no_embed_class, which timm's class does not heed"
    if isinstance(model, Eva):
        yield from _not_rotary(model)
        prefixed = model.global_pool == "map" and model.num_prefix_tokens > 0
    else:
        prefixed = getattr(model, "pool_include_prefix", False)
    if any(getattr(model, name, None) is not None for name in ("rel_pos_bias", "shared_rel_pos")):
        yield "its blocks share one relative position bias"
    if model.global_pool not in ("token", "avg", "map") or prefixed:
        yield f"it pools by {model.global_pool!r}, not by 'token' or by 'avg' or 'map' over the patches"
    elif getattr(model, "attn_pool", None) is not None:
        yield from _not_attention_pool(model.attn_pool, model.blocks[0].mlp if len(model.blocks) else None)
    if _is_identity(model.norm) == _is_identity(model.fc_norm):
        yield "it has not exactly one final norm"
    if isinstance(model.head, nn.Linear) and model.head.bias is None:
        yield "its head has no bias"
    if len(model.blocks) == 0:
        yield "it has no blocks"


def _not_rotary(model: Eva) -> Iterator[str]:
    """Why the rotary positions of a timm Eva are none of ours."""
    rope = model.rope
    if rope is None:
        return
    if type(rope) not in (RotaryEmbeddingCat, RotaryEmbeddingDinoV3):
        yield f"its rotary positions are a {type(rope).__name__} (rope_type)"
        return
    halves = isinstance(rope, RotaryEmbeddingDinoV3)
    if rope.grid_indexing != "ij" or rope.grid_offset or rope.rotate_half != halves:
        yield "its rotary positions are indexed by 'xy', have an offset, or turn other pairs (rope_rotate_half)"
    elif isinstance(rope, RotaryEmbeddingDinoV3):
        if rope.normalize_coords != "separate" or rope.min_period is not None:
            yield "its rotary positions are normalised together, or have periods of their own"
        if model.pos_embed is not None:
            yield "it has learned positions beside DINOv3's rotary ones (use_abs_pos_emb)"
    elif rope.in_pixels or len({*(rope.ref_feat_shape or ())}) > 1:
        yield f"its rotary positions count pixels, or a reference {rope.ref_feat_shape} that is not square"


def _not_attention_pool(pool: Any, mlp: Any) -> Iterator[str]:
    if type(pool) is not AttentionPoolLatent or pool.pos_embed is not None or pool.latent_len != 1:
        yield f"its {type(pool).__name__} has positions or more than one query"
    elif not isinstance(pool.q, nn.Linear) or not _is_identity(pool.q_norm) or pool.q.bias is None:
        yield "its attention pooling has no q with a bias, or norms queries and keys (qk_norm)"
    elif _act_of(pool.mlp) != _act_of(mlp):
        yield f"the MLP of its attention pooling has another activation than the blocks, {pool.mlp.act}"


def _not_plain_block(block: Any) -> Iterator[str]:
    if type(block) not in (TimmBlock, EvaBlock, BeitBlock, RelPosBlock):
        yield f"it is a {type(block).__name__}"
        return
    attn, mlp = block.attn, block.mlp
    if type(attn) not in (Attention, EvaAttention, AttentionRope, BeitAttention, RelPosAttention):
        yield f"its attention is a {type(attn).__name__}"
    elif attn.qkv is None:
        yield "queries, keys and values have projections of their own (qkv_fused)"
    else:
        if not _is_identity(getattr(attn, "norm", None)) or getattr(attn, "gate", None) is not None:
            yield "the output of attention is normalised or gated (scale_attn_norm)"
        bias = getattr(attn, "rel_pos", None)
        if isinstance(bias, RelPosMlp) and (bias.mode != "cr" or bias.mlp.fc1.out_features != MLP_HIDDEN):
            yield f"its relative position bias is of mode {bias.mode!r} or has not {MLP_HIDDEN} hidden units"
        if attn.proj.bias is None:
            yield "the output projection has no bias (proj_bias)"
    if _has_scale(block, 1) != _has_scale(block, 2):
        yield "one of its branches has layer scale and the other none"
    if type(mlp) not in (Mlp, SwiGLU, GluMlp):
        yield f"its MLP is a {type(mlp).__name__}"
    elif any(linear.bias is None for linear in mlp.modules() if isinstance(linear, nn.Linear)):
        yield "its MLP lacks biases (proj_bias)"
    elif _act_of(mlp) is None:
        yield f"its MLP's activation is {mlp.act}, not one of {', '.join(get_args(Act))} (act_layer)"


def _act_of(mlp: Any) -> str | None:
    """An Arch's word for an MLP; None if it has none."""
    if isinstance(mlp, Mlp):
        tanh = getattr(mlp.act, "approximate", "none") == "tanh"
        kind = GELUTanh if tanh else nn.GELU if isinstance(mlp.act, nn.GELU | GELU) else type(mlp.act)
        return next((word for word, act in ACTS.items() if act is kind), None)
    if not isinstance(mlp.act, nn.SiLU) or getattr(mlp, "gate_last", False):
        return None
    return "swiglu" if isinstance(mlp, SwiGLU) else "swiglu_packed"


def _block_facts(block: Any) -> dict[str, Any]:
    """What an Arch says once of all blocks."""
    attn = block.attn
    bias = getattr(attn, "rel_pos", getattr(attn, "relative_position_bias_table", None))
    return {
        "qkv_bias": "qv" if getattr(attn, "q_bias", None) is not None else attn.qkv.bias is not None,
        "qk_norm": not _is_identity(getattr(attn, "q_norm", None)),
        "rel_pos_bias": "none" if bias is None else "mlp" if isinstance(bias, RelPosMlp) else "table",
        "layer_scale": _has_scale(block, 1),
        "act": _act_of(block.mlp),
        "scale_mlp_norm": not _is_identity(block.mlp.norm),
    }


def _not_uniform(model: Any) -> Iterator[str]:
    """Why what an Arch says once is not the same everywhere."""
    norms = [
        module
        for name, module in model.named_modules()
        if "norm" in name.rpartition(".")[2]
        and not _is_identity(module)
        and not name.startswith("patch_embed.")
    ]
    if not all(isinstance(norm, nn.LayerNorm) and norm.elementwise_affine for norm in norms):
        yield "not every norm is a LayerNorm with weight and bias (norm_layer)"
    elif len({norm.eps for norm in norms}) > 1 or any(norm.bias is None for norm in norms):
        yield "its norms differ in eps or lack a bias"
    first, *others = map(_block_facts, model.blocks)
    for name, value in first.items():
        if any(other[name] != value for other in others):
            yield f"its blocks differ in {name}"


def not_timm(arch: Arch) -> Iterator[str]:
    """Why none of timm's classes has the structure of `arch`; fields alone are compared when a network is made."""
    first = arch.blocks[0]
    if len({(block.num_heads, block.head_dim, block.mlp_hidden, block.mixer) for block in arch.blocks}) > 1:
        yield "its blocks differ in heads, MLP or mixer"
    if any(block.mixer != "softmax" for block in arch.blocks):
        yield "not every mixer is softmax"
    if arch.selector is not None:
        yield "some of its blocks keep fewer patches"
    if first.inner_dim != arch.embed_dim:
        yield f"{first.num_heads} heads of {first.head_dim} are not as wide as its embed_dim {arch.embed_dim}"
    if arch.relative_position:
        yield f"it has relative positions (up to {arch.relative_position} patches)"
    if arch.stem != "linear" or len(arch.stages) > 1:
        yield "its stem is not one convolution, or it has several stages"
    if arch.global_pool == "seq":
        yield "it pools by 'seq'"
    if arch.distill_token and (arch.reg_tokens or arch.no_embed_class):
        yield "it has a distillation token beside reg_tokens or no_embed_class"


def _has_scale(block: Any, branch: int) -> bool:
    """Whether a branch of a timm block has layer scale, by either of timm's names."""
    if isinstance(block, EvaBlock | BeitBlock):
        return getattr(block, f"gamma_{branch}") is not None
    return not _is_identity(getattr(block, f"ls{branch}"))


def _renamed(name: str, names: dict[str, str]) -> str:
    """`name` with the part that `names` knows replaced."""
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)
