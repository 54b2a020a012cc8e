"""swap_attention: trained weights stay, outputs are near, and what cannot be swapped is said."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.cait import Cait
from timm.models.levit import Levit
from timm.models.pit import PoolingVisionTransformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.mixers import MIXERS
from vitnas.model import build
from vitnas.model.convolutional import cv
from vitnas.model.swap import attention_layers, swap_attention
from vitnas.model.timm_keys import from_timm
from vitnas.testing import randomize_

WORDS = [word for word in MIXERS if not word.startswith("linformer_") and word != "fourier2d"]
HEADED = [word for word in WORDS if MIXERS[word].has_heads]


def vit(**options: Any) -> Any:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return made(VisionTransformer(**{**sizes, **options}))


def made(model: Any, size: int = 32) -> Any:
    torch.manual_seed(0)
    randomize_(model, torch.Generator().manual_seed(0))
    for name, buffer in model.named_buffers():
        if "running_var" in name:
            buffer.fill_(1.0)
    model.pretrained_cfg = {"input_size": (3, size, size)}
    return model.eval()


def pit() -> Any:
    return made(
        PoolingVisionTransformer(
            img_size=32, patch_size=4, stride=4, stem_type="overlap", base_dims=(16, 16), depth=(1, 1), heads=(2, 2),
            mlp_ratio=2, num_classes=5,
        )
    )  # fmt: skip


def levit_model(**options: Any) -> Any:
    return made(
        Levit(
            img_size=32, embed_dim=(16, 24), key_dim=8, depth=(1, 1), num_heads=(2, 2), stem_type="s8", num_classes=5,
            **options,
        )
    )  # fmt: skip


def cait_model() -> Any:
    return made(
        Cait(img_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5, depth_token_only=1)
    )


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("word", WORDS)
def test_a_vit_keeps_its_projections(word: str) -> None:
    model = vit()
    before = {name: p.clone() for name, p in model.named_parameters()}
    want = model(images()).detach()
    assert swap_attention(model, word, size=None if word != "linformer" else 16) is model
    after = dict(model.named_parameters())
    kept = ["blocks.0.attn.qkv.weight", "blocks.1.attn.proj.bias"] if MIXERS[word].has_heads else []
    for name in [*kept, "blocks.0.mlp.fc1.weight", "head.weight"]:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    got = model(images())
    assert got.shape == want.shape
    assert bool(got.isfinite().all())
    assert [row["layer"] for row in model.swapped] == ["blocks.0.attn", "blocks.1.attn"]
    got.square().sum().backward()
    if word == "softmax":
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("word", "size"), [("nystrom", 65), ("nystrom", 16), ("performer", 2000)])
def test_the_start_is_near_to_softmax(word: str, size: int) -> None:
    """As near as the method says: equal with a landmark per token, and nearer than without attention."""
    model, empty = vit(), vit()
    want = model(images()).detach()
    for block in empty.blocks:
        nn.init.zeros_(block.attn.proj.weight)
    swap_attention(model, word, size=size)
    error = (model(images()) - want).norm()
    assert error < (3e-2 if size == 65 else 0.5) * (empty(images()) - want).norm()


@pytest.mark.parametrize("word", ["performer", "nystrom", "linformer", "softmax"])
@pytest.mark.parametrize("kind", [pit, levit_model, cait_model])
def test_pit_levit_and_cait(kind: Any, word: str) -> None:
    model = kind()
    total = sum(p.numel() for p in model.parameters())
    swap_attention(model, word, size=4 if word != "softmax" else None)
    assert model(images()).shape == (2, 5)
    model(images()).square().sum().backward()
    for row in model.swapped:
        assert any("qkv" in name for name in row["kept"])
        assert any("proj" in name for name in row["kept"])
    new = sum(row["new_params"] for row in model.swapped)
    assert sum(p.numel() for p in model.parameters()) <= total + new
    gone = {name for row in model.swapped for name in row["gone"]}
    assert bool(gone) == (kind is not pit)  # LeViT's bias and CaiT's mixing of heads


def test_chosen_layers_only() -> None:
    model = vit()
    swap_attention(model, "nystrom", layers=[-1])
    assert [type(block.attn).__name__ for block in model.blocks] == ["Attention", "Nystrom"]
    swap_attention(model, "performer", layers=[0])
    assert [type(block.attn).__name__ for block in model.blocks] == ["Performer", "Nystrom"]
    assert len(model.swapped) == 2
    assert len(attention_layers(cait_model())) == 3


@pytest.mark.parametrize(
    ("model", "word", "layers", "sentence"),
    [
        (vit, "nystrm", None, r"mixer is 'nystrm'; it must be one of .*Nearest: 'nystrom'"),
        (vit, "nystrom", [], r"layers is empty; it must name at least one layer"),
        (lambda: cv("t", projection="conv"), "performer", None, r"convolutions make its queries, keys and values"),
        (vit, "nystrom", [2], r"layers has 2; the model has attention layers 0 to 1"),
        (
            lambda: from_timm(vit(qk_norm=True)),
            "nystrom",
            None,
            r"in blocks\.0\.attn: its queries and keys are normalised or its keys have no bias",
        ),
        (lambda: vit(qk_norm=True), "nystrom", None, r"in blocks\.0\.attn: queries and keys are normalised"),
        (lambda: nn.Linear(2, 2), "nystrom", None, r"Linear has no attention that is known here"),
        (vit, "linformer_shared", None, r"trained ones would be lost; use linformer"),
        (levit_model, "long_short", None, r"long_short does not work on queries, keys and values that another layer"),
        (lambda: levit_model(use_conv=True), "nystrom", None, r"LeViT's convolutional form"),
        (cait_model, "nystrom", [2], r"its one query, the class token, already costs"),
        (
            lambda: SwinTransformer(img_size=32, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4),
            "nystrom",
            None,
            r"layers\.0\.blocks\.0\.attn: its windows are too short for a mixer to pay",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_swapped_is_said(model: Any, word: str, layers: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        swap_attention(model(), word, layers)


@pytest.mark.parametrize("word", ["token_mlp", "long_short", "linformer"])
def test_a_grid_that_is_not_square(word: str) -> None:
    model = swap_attention(vit(img_size=(32, 24)), word, size=4)
    assert model.blocks[0].attn.grid == (8, 6)
    assert model(images()[..., :24]).shape == (2, 5)


def test_a_model_that_does_not_say_its_images() -> None:
    """timm's classes made directly have no configuration, and create_model's does not follow `in_chans`."""
    sizes: dict[str, int] = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    plain: Any = VisionTransformer(img_size=16, in_chans=1, **sizes)
    assert swap_attention(plain, "linformer", size=4)(torch.zeros(1, 1, 16, 16)).shape == (1, 5)
    grey = timm.create_model("levit_128s", in_chans=1, num_classes=5)
    swap_attention(grey, "linformer", size=4)
    assert grey(torch.zeros(2, 1, 224, 224)).shape == (2, 5)
    unsaid = pit()
    unsaid.pretrained_cfg, unsaid.patch_embed.img_size = None, None
    with pytest.raises(UserError, match=r"does not say its image size.* Set model\.pretrained_cfg"):
        swap_attention(unsaid, "linformer")


def test_a_named_model() -> None:
    model = timm.create_model("deit_tiny_patch16_224")
    swap_attention(model, "nystrom", size=32)
    assert sum(row["new_params"] for row in model.swapped) == 12 * 3 * 33


def test_swapped_layers_keep_their_numbers() -> None:
    """So that layers=[0] and then layers=[1] are the first and the second, and nothing is swapped twice."""
    for model in (vit(depth=3), levit_model()):
        count = len(attention_layers(model))
        swap_attention(model, "nystrom", [0], size=4)
        assert len(attention_layers(model)) == count
        with pytest.raises(UserError, match=r"it is nystrom already; start from the model as it was"):
            swap_attention(model, "performer", [0])
    model = swap_attention(swap_attention(vit(depth=3), "nystrom", [0]), "performer", [1])
    assert [type(block.attn).__name__ for block in model.blocks] == ["Nystrom", "Performer", "Attention"]


def test_dropout_and_frozen_weights_stay() -> None:
    """Dropout behind the projection does as before; that of attention weights is said to be gone."""
    torch.manual_seed(0)
    model = vit(proj_drop_rate=0.5, attn_drop_rate=0.25)
    model.blocks[0].attn.qkv.requires_grad_(False)
    swap_attention(model, "performer", [0])
    mixer = model.blocks[0].attn
    assert model.swapped[0]["gone"] == ["attn_drop of 0.25"]
    assert [p.requires_grad for p in mixer.qkv.parameters()] == [False, False]
    assert [p.requires_grad for p in mixer.proj.parameters()] == [True, True]
    x = torch.randn(4, 65, 32)
    still = mixer(x)
    share = (mixer.train()(x) == 0).float().mean()
    assert share == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(mixer.eval()(x), still)
    torch.testing.assert_close(mixer.train()(x).mean(), still.mean(), atol=0.1, rtol=0)


def test_registers_are_no_patches() -> None:
    model = swap_attention(vit(reg_tokens=4, img_size=16), "linformer", size=4)
    assert (model.blocks[0].attn.grid, model.blocks[0].attn.num_prefix_tokens) == ((4, 4), 5)
    assert model(images()[..., :16, :16]).shape == (2, 5)


def test_the_arch_of_our_own_model_follows() -> None:
    block = Block(num_heads=2, head_dim=8, mlp_hidden=16)
    arch = Arch(image_size=8, patch_size=2, num_classes=3, stages=(Stage(embed_dim=16, blocks=(block,) * 2),))
    model = swap_attention(build(arch).eval(), "nystrom", [1], size=4)
    assert [(b.mixer, b.mixer_size) for b in model.arch.blocks] == [("softmax", None), ("nystrom", 4)]
    again = build(model.arch).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images()[..., :8, :8]), model(images()[..., :8, :8]), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"mixer_size is 18; nystrom compresses 17 tokens"):
        swap_attention(build(arch), "nystrom", size=18)
