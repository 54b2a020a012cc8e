"""Plain ViTs to and from timm: the same weights give the same logits, and what an Arch cannot say is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, QuickGELU, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.measure.memory import peak_activation_bytes
from vitnas.model import Model, build
from vitnas.model.published import PUBLISHED
from vitnas.model.timm_keys import arch_of_timm, from_timm, to_timm
from vitnas.space import autoformer
from vitnas.testing import randomize_
from vitnas.testing.flops import counted_macs

SMALL: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}
PLAIN = partial(VisionTransformer, **SMALL)
EVA = partial(Eva, **SMALL)
BEIT = partial(Beit, **SMALL)
RELPOS = partial(VisionTransformerRelPos, **SMALL)


def without_scale() -> VisionTransformer:
    model = PLAIN(init_values=1e-5)
    model.blocks[1].ls2 = nn.Identity()
    return model


def scale_in_one_block() -> VisionTransformer:
    model = PLAIN(init_values=1e-5)
    model.blocks[1].ls1 = model.blocks[1].ls2 = nn.Identity()
    return model


# The vision transformers that people fine-tune: each goes both ways, or is refused with this reason.
NAMES: dict[str, str | None] = {
    "deit_tiny_patch16_224": None,
    "deit_tiny_distilled_patch16_224": None,
    "deit3_small_patch16_224": None,
    "vit_small_patch16_224": None,
    "vit_medium_patch16_reg4_gap_256": None,
    "vit_so150m_patch16_reg4_gap_256": None,
    "vit_small_patch14_dinov2": None,
    "vit_small_patch14_reg4_dinov2": None,
    "vit_small_patch16_dinov3": None,
    "vit_base_patch16_clip_224": None,
    "vit_base_patch16_siglip_224": None,
    "beitv2_base_patch16_224": None,
    "eva02_tiny_patch14_224": None,
    "vit_small_r26_s32_224": r"its patches are not embedded by one convolution, but by a HybridEmbed",
    "vit_base_patch16_224_miil": None,
    "vit_relpos_small_patch16_224": None,
}
# Others that must go both ways.
GOOD: dict[str, Any] = {
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3),
    "mean pooled, fc_norm": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=48, depth=2, global_pool="avg", class_token=False
    ),
    "plain": PLAIN,
    "mean pooled with class token": lambda: PLAIN(global_pool="avg"),
    "mean pooled, norm before": lambda: PLAIN(global_pool="avg", class_token=False, fc_norm=False),
    "no qkv bias": lambda: PLAIN(qkv_bias=False),
    "no positions": lambda: PLAIN(pos_embed="none", reg_tokens=1),
    "grey": lambda: PLAIN(in_chans=1),
    "no classifier": lambda: PLAIN(num_classes=0),
    "distilled, no classifiers": lambda: VisionTransformerDistilled(**{**SMALL, "num_classes": 0}),
    "odd MLP": lambda: PLAIN(mlp_ratio=3.3),
    "eps": lambda: PLAIN(norm_layer=partial(nn.LayerNorm, eps=1e-3)),
    "any size": lambda: PLAIN(dynamic_img_size=True),
    "not square": lambda: VisionTransformer(**{**SMALL, "img_size": (64, 96), "patch_size": 16}),
    "drop path": lambda: PLAIN(drop_path_rate=0.2),
    "register tokens and a class token without position": lambda: PLAIN(reg_tokens=2, no_embed_class=True),
    "positions of a class token that is not there": lambda: PLAIN(
        class_token=False, no_embed_class=True, global_pool="avg"
    ),
    "norm before, layer scale": lambda: PLAIN(pre_norm=True, init_values=1e-5, scale_mlp_norm=True),
    "qk_norm": lambda: PLAIN(qk_norm=True),
    "eva, no bias on keys": lambda: EVA(scale_mlp=True, swiglu_mlp=True, use_fc_norm=False),
    "eva, half the angles, all biases": lambda: EVA(
        attn_type="rope", use_rot_pos_emb=True, ref_feat_shape=2, rope_temperature=50.0, qk_norm=True
    ),
    "eva as dinov3, not square": lambda: EVA(
        img_size=(16, 24),
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_rotate_half=True,
        rope_temperature=100.0,
        use_abs_pos_emb=False,
        num_reg_tokens=2,
        init_values=1.0,
        qkv_bias=False,
    ),
    "eva, attention pooling, norm before": lambda: EVA(
        class_token=False, global_pool="map", use_pre_transformer_norm=True
    ),
    "beit with positions, the class token read": lambda: BEIT(
        use_rel_pos_bias=True, use_abs_pos_emb=True, global_pool="token", swiglu_mlp=True, init_values=None
    ),
    "relative positions by a table, with a class token": lambda: RELPOS(
        rel_pos_type="bias", class_token=True, global_pool="token", act_layer=QuickGELU, qk_norm=True
    ),
    "relative positions by an MLP, with a class token, not square": lambda: RELPOS(
        class_token=True, img_size=(16, 24), init_values=None
    ),
    "attention pooling beside a class token": lambda: PLAIN(global_pool="map", mlp_ratio=2.1),
    "gelu_tanh": lambda: PLAIN(act_layer="gelu_tanh"),
    "gelu of torch, with tanh": lambda: PLAIN(act_layer=partial(nn.GELU, approximate="tanh")),
    "quick_gelu": lambda: PLAIN(act_layer="quick_gelu"),
    "silu": lambda: PLAIN(act_layer="silu"),
    "swiglu": lambda: PLAIN(mlp_layer=SwiGLU, act_layer="silu", scale_mlp_norm=True),
    "swiglu_packed": lambda: PLAIN(mlp_layer=SwiGLUPacked, act_layer="silu", mlp_ratio=5.4),
}
BAD: dict[str, tuple[Any, str]] = {
    "one bias for all blocks": (
        lambda: BEIT(use_shared_rel_pos_bias=True),
        r"its blocks share one relative position bias",
    ),
    "one MLP for all blocks": (
        lambda: RELPOS(shared_rel_pos=True),
        r"its blocks share one relative position bias",
    ),
    "swin's coordinates": (
        lambda: RELPOS(rel_pos_type="mlp_swin"),
        r"its relative position bias is of mode 'swin'",
    ),
    "registers that are not used": (
        lambda: VisionTransformerDistilled(**SMALL, reg_tokens=2),
        r"a distillation token beside reg_tokens or no_embed_class",
    ),
    "queries apart": (lambda: EVA(qkv_fused=False), r"have projections of their own \(qkv_fused\)"),
    "norm behind": (lambda: EVA(use_post_norm=True), r"it is a EvaBlockPostNorm"),
    "learned frequencies": (
        lambda: EVA(use_rot_pos_emb=True, rope_type="mixed"),
        r"are a RotaryEmbeddingMixed",
    ),
    "columns first": (
        lambda: EVA(use_rot_pos_emb=True, rope_grid_indexing="xy"),
        r"its rotary positions are indexed by 'xy'",
    ),
    "scale of attention alone": (
        lambda: EVA(init_values=1e-5, attn_only_layer_scale=True),
        r"one of its branches has layer scale",
    ),
    "a gate by gelu": (lambda: PLAIN(mlp_layer=SwiGLU), r"its MLP's activation is GELU.*\(act_layer\)"),
    "a gate last": (lambda: PLAIN(mlp_layer=GluMlp), r"its MLP's activation is GELU.*\(act_layer\)"),
    "patches that are not square": (lambda: PLAIN(patch_size=(4, 8)), r"its patches \(4, 8\) are not square"),
    "a layer scale less": (without_scale, r"blocks\.1: one of its branches has layer scale"),
    "layer scale here and there": (scale_in_one_block, r"its blocks differ in layer_scale"),
    "attention pooling over all tokens": (
        lambda: PLAIN(global_pool="map", pool_include_prefix=True),
        r"it pools by 'map', not by .* over the patches",
    ),
    "max pooling": (lambda: PLAIN(global_pool="max"), r"it pools by 'max'"),
    "no final norm": (lambda: PLAIN(final_norm=False), r"it has not exactly one final norm"),
    "rms norm": (lambda: PLAIN(norm_layer=RmsNorm), r"not every norm is a LayerNorm"),
    "relu": (
        lambda: PLAIN(act_layer=nn.ReLU),
        r"its MLP's activation is ReLU\(\), not one of gelu, gelu_tanh",
    ),
    "no proj bias": (lambda: PLAIN(proj_bias=False), r"the output projection has no bias"),
    "attention norm": (
        lambda: PLAIN(scale_attn_norm=True),
        r"the output of attention is normalised or gated",
    ),
    "another network": (lambda: nn.Linear(2, 2), r"this Linear cannot be written as an Arch"),
}


def small(name: str, **options: Any) -> nn.Module:
    """The network of that name with two blocks, on images of a few patches."""
    model: nn.Module = timm.create_model(name, depth=2, img_size=70 if "patch14" in name else 80, **options)
    return model


def images_for(model: Any, n: int = 2) -> Tensor:
    stem = model.patch_embed
    return torch.randn(n, stem.proj.in_channels, *stem.img_size, generator=torch.Generator().manual_seed(1))


def check_both_ways(theirs: Any, generator: torch.Generator) -> Model:
    """The logits are timm's at 1e-5 of the largest; what comes back has the same weights, bit for bit."""
    randomize_(theirs.eval(), generator)
    images = images_for(theirs)
    ours = from_timm(theirs)
    back = to_timm(ours)
    with torch.no_grad():
        want = theirs(images)
        close = {"rtol": 0, "atol": 1e-5 * float(want.abs().max())}
        torch.testing.assert_close(ours(images), want, **close)
        torch.testing.assert_close(back(images), want, **close)
    assert type(back) is type(theirs)
    weights, again = theirs.state_dict(), back.state_dict()
    assert set(weights) == set(again)
    for name, weight in weights.items():
        assert torch.equal(again[name], weight), name
    assert arch_of_timm(back) == ours.arch == arch_of_timm(theirs)
    assert Arch.from_json(ours.arch.to_json()) == ours.arch
    return ours


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"num_classes": 7}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_networks_that_people_use(name: str, options: dict[str, int], generator: torch.Generator) -> None:
    theirs, reason = small(name, **options), NAMES[name]
    if reason is not None:
        with pytest.raises(UserError, match=reason):
            from_timm(theirs)
        return
    arch = check_both_ways(theirs, generator).arch
    check_count(arch)


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm's interpolation
@pytest.mark.parametrize("name", [name for name, reason in NAMES.items() if reason is None])
def test_other_image_sizes_are_timms(name: str, generator: torch.Generator) -> None:
    theirs = small(name, num_classes=3).eval()
    randomize_(theirs, generator)
    ours, size = from_timm(theirs), (112, 112) if "patch14" in name else (128, 96)
    for model in (theirs, ours):
        model.set_input_size(img_size=size)
    images = torch.randn(2, 3, *size, generator=generator)
    with torch.no_grad():
        want = theirs(images)
        torch.testing.assert_close(ours(images), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, reason in NAMES.items() if reason is None])
def test_networks_that_people_use_at_their_own_size(name: str, generator: torch.Generator) -> None:
    check_both_ways(timm.create_model(name), generator)


def check_count(arch: Arch) -> None:
    model, shape = build(arch, device="meta"), arch.input_size
    cost = count(arch)
    assert cost.macs == counted_macs(model, (1, *shape))
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert cost.memory_bytes == peak_activation_bytes(model, shape)


@pytest.mark.parametrize("name", GOOD)
def test_logits_agree_both_ways(name: str, generator: torch.Generator) -> None:
    theirs = GOOD[name]()
    ours = check_both_ways(theirs, generator)
    check_count(ours.arch)
    if type(theirs) is VisionTransformer:
        assert set(ours.state_dict()) == set(theirs.state_dict())


def test_the_arch_says_what_timm_was_told() -> None:
    arch = arch_of_timm(GOOD["vit_tiny"]())
    assert (arch.image_size, arch.patch_size, arch.embed_dim, arch.depth) == (64, 16, 192, 3)
    assert {(block.num_heads, block.head_dim, block.mlp_hidden) for block in arch.blocks} == {(3, 64, 768)}
    assert (arch.num_classes, arch.norm_eps, arch.fc_norm, arch.global_pool) == (1000, 1e-6, False, "token")
    assert arch_of_timm(GOOD["mean pooled, fc_norm"]()).fc_norm
    assert arch_of_timm(GOOD["odd MLP"]()).blocks[0].mlp_hidden == int(32 * 3.3)
    assert arch_of_timm(GOOD["eps"]()).norm_eps == 1e-3


def test_weights_are_copies(generator: torch.Generator) -> None:
    theirs = PLAIN()
    ours = from_timm(theirs)
    back = to_timm(ours)
    before = theirs.head.weight.clone()
    randomize_(ours, generator)
    torch.testing.assert_close(theirs.head.weight, before, rtol=0, atol=0)
    assert not torch.equal(ours.head.weight, back.head.weight)


def test_what_is_not_weights_comes_along() -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, drop_path_rate=0.2).double()
    ours = from_timm(theirs)
    assert ours.training
    assert next(ours.parameters()).dtype == torch.float64
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in ours.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    assert ours.pretrained_cfg["mean"] == theirs.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert ours.pretrained_cfg["input_size"] == (3, 32, 32)
    assert to_timm(ours).pretrained_cfg["std"] == theirs.pretrained_cfg["std"]
    assert not to_timm(ours.eval()).training


@pytest.mark.parametrize("name", BAD)
def test_what_an_arch_cannot_say_is_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(UserError, match=message):
        from_timm(make())


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(UserError, match=r"patches \(4, 8\) .*; it pools by 'max'.*Use a plain ViT or DeiT"):
        arch_of_timm(PLAIN(patch_size=(4, 8), global_pool="max"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"act": "swiglu", "qkv_bias": "qv", "rel_pos_bias": "table", "reg_tokens": 0, "pre_norm": True},
            r"is not a timm Beit: that has no such pre_norm",
        ),
        ({"act": "quick_gelu", "qkv_bias": "qv"}, r"is not a timm Eva: that has no such act"),
        (
            {"distill_token": True, "reg_tokens": 2},
            r"it has a distillation token beside reg_tokens",
        ),
        ({"mlp_norm": "stream"}, r"is not a timm VisionTransformer: that has no such mlp_norm"),
        ({"head_norm_eps": 1e-3}, r"is not a timm VisionTransformer: that has no such head_norm_eps"),
        ({"position": "rotary"}, r"is not a timm Eva: that has no such position"),
        ({"relative_position": 14}, r"it has relative positions \(up to 14 patches\)"),
        ({"heads": (2, 4)}, r"its blocks differ in heads, MLP or mixer"),
        ({"heads": (4, 4)}, r"4 heads of 16 are not as wide as its embed_dim 32"),
        ({"heads": (2, 2), "keep": 3}, r"some of its blocks keep fewer patches"),
    ],
    ids=str,
)
def test_what_timm_cannot_say_is_refused(change: dict[str, Any], message: str) -> None:
    arch = arch_of_timm(PLAIN())
    if "heads" in change:
        stage = arch.stages[0]
        blocks = [replace(b, num_heads=n) for b, n in zip(stage.blocks, change["heads"], strict=True)]
        blocks[-1] = replace(blocks[-1], keep=change.get("keep"))
        selector = "fixed" if "keep" in change else None
        arch = replace(arch, stages=(replace(stage, blocks=tuple(blocks)),), selector=selector)
    else:
        arch = replace(arch, **change)
    with pytest.raises(UserError, match=message + r".*Keep it as a Model"):
        to_timm(build(arch))


def test_an_mlp_width_that_timms_rounding_would_lose() -> None:
    arch = arch_of_timm(PLAIN())
    stage = replace(arch.stages[0], embed_dim=98)
    lossy = [hidden for hidden in range(1, 400) if int(98 * (hidden / 98)) != hidden]
    assert lossy
    for hidden in (*lossy[:3], 392):
        block = replace(stage.blocks[0], head_dim=49, mlp_hidden=hidden)
        model = build(replace(arch, stages=(replace(stage, blocks=(block,)),)))
        assert to_timm(model).blocks[0].mlp.fc1.out_features == hidden


def test_published_archs_are_no_plain_vits() -> None:
    arch = replace(PUBLISHED["autoformer_tiny"], image_size=32, patch_size=16)
    with pytest.raises(UserError, match=r"differ in heads.*relative positions"):
        to_timm(build(arch))
    assert isinstance(build(autoformer("micro", image_size=8, patch_size=4).smallest()), Model)
