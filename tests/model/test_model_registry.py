"""Names for timm.create_model: options, feature extraction, checkpoints, saving and loading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import timm.data
import torch
from timm.models import load_checkpoint, save_for_hf
from torch import Tensor

import vitnas  # noqa: F401 - registers the models
from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.exporting import save_timm
from vitnas.model import Model, build
from vitnas.model.published import PUBLISHED
from vitnas.model.registry import fit_weights
from vitnas.space import autoformer
from vitnas.testing import randomize_

# Since then timm notes how a model was made, saves it, and adapts weights of any number of channels.
TIMM_NOTES = hasattr(timm.models, "get_model_args")
ARCH = autoformer("micro", image_size=16, patch_size=4, num_classes=5, in_chans=1).smallest()


def images_for(arch: Arch, n: int = 2) -> Tensor:
    shape = (n, *arch.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name: str) -> None:
    assert name in timm.list_models()
    model = timm.create_model(name, device="meta")
    assert isinstance(model, Model)
    assert model.arch == PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == count(PUBLISHED[name]).params
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == PUBLISHED[name].input_size
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    if name.startswith("vix_"):  # trained on CIFAR images between -1 and 1
        mean = std = (0.5, 0.5, 0.5)
    assert (config["mean"], config["std"]) == (mean, std)
    assert model.pretrained_cfg["architecture"] == name


def test_options_change_the_arch() -> None:
    model = timm.create_model(
        "autoformer_tiny",
        num_classes=7,
        in_chans=1,
        img_size=(32, 32),
        patch_size=8,
        global_pool="token",
        drop_path_rate=0.2,
        drop_rate=0.0,
        dtype=torch.float64,
    )
    want = replace(
        PUBLISHED["autoformer_tiny"],
        num_classes=7,
        in_chans=1,
        image_size=32,
        patch_size=8,
        global_pool="token",
    )
    assert model.arch == want
    assert model.head.weight.dtype == torch.float64
    assert model.blocks[-1].drop_path2.drop_prob == pytest.approx(0.2)
    assert model.pretrained_cfg["input_size"] == (1, 32, 32)
    assert model.pretrained_cfg["mean"] == pytest.approx([sum(timm.data.IMAGENET_DEFAULT_MEAN) / 3])
    assert model(images_for(want).double()).shape == (2, 7)
    assert (
        timm.create_model("vitnas_arch", arch=ARCH, num_classes=0, global_pool="")(images_for(ARCH)).ndim == 3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path": 0.1}, r"autoformer_tiny has no option 'drop_path'; .* Nearest: 'drop_path_rate'"),
        ({"qk_norm": True}, r"has no option 'qk_norm'; it takes num_classes, in_chans"),
        ({"drop_rate": 0.1}, r"drop_rate is 0\.1; .*Use drop_path_rate"),
        (
            {"img_size": (224, 100)},
            r"image_size is 224 x 100; it must be a multiple of patch_size 16\. Nearest: 96",
        ),
        (
            {"img_size": (224, 192, 3)},
            r"img_size is \(224, 192, 3\); it must be a whole number of at least 1",
        ),
        ({"img_size": 100}, r"image_size is 100; it must be a multiple of patch_size 16\. Nearest: 96"),
        ({"global_pool": "max"}, r"global_pool is 'max'; it must be one of token, avg"),
        ({"num_classes": -1}, r"num_classes is -1; it must be a whole number"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        timm.create_model("autoformer_tiny", **options)


def test_pretrained_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for autoformer_tiny"):
        timm.create_model("autoformer_tiny", pretrained=True, img_size=32)


def test_any_arch_by_value_or_json() -> None:
    by_value = timm.create_model("vitnas_arch", arch=ARCH)
    by_json = timm.create_model("vitnas_arch", arch=json.loads(json.dumps(ARCH.to_json())))
    assert by_value.arch == by_json.arch == ARCH
    assert timm.data.resolve_model_data_config(by_json)["input_size"] == (1, 16, 16)
    with pytest.raises(UserError, match=r"arch is missing; vitnas_arch takes an Arch or its JSON"):
        timm.create_model("vitnas_arch")
    with pytest.raises(UserError, match=r"the Arch's schema is None"):
        timm.create_model("vitnas_arch", arch={"embed_dim": 3})


def test_features_only(generator: torch.Generator) -> None:
    model = build(ARCH).eval()
    randomize_(model, generator)
    net = timm.create_model(
        "vitnas_arch", arch=ARCH, features_only=True, out_indices=(0, 2), img_size=32
    ).eval()
    assert net.feature_info.channels() == [ARCH.embed_dim] * 2
    assert net.feature_info.reduction() == [4, 4]
    assert timm.data.resolve_model_data_config(net)["input_size"] == (1, 32, 32)
    net.model.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in net.model.state_dict()}
        | {"pos_embed": net.model.pos_embed}
    )
    model.set_input_size(img_size=32)
    model.pos_embed = net.model.pos_embed
    images = images_for(model.arch)
    want = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    torch.testing.assert_close(net(images), want, rtol=0, atol=0)
    assert [tuple(item.shape) for item in net(images)] == [(2, ARCH.embed_dim, 8, 8)] * 2
    assert len(timm.create_model("vitnas_arch", arch=ARCH, features_only=True)(images_for(ARCH))) == 3


def test_checkpoint_path(tmp_path: Path, generator: torch.Generator) -> None:
    model = build(ARCH).eval()
    randomize_(model, generator)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    path = str(tmp_path / "model.safetensors")
    again = timm.create_model("vitnas_arch", arch=ARCH, checkpoint_path=path).eval()
    torch.testing.assert_close(again(images_for(ARCH)), model(images_for(ARCH)), rtol=0, atol=0)
    load_checkpoint(again, path, strict=True)
    with pytest.raises(RuntimeError, match="size mismatch for head"):
        timm.create_model("vitnas_arch", arch=ARCH, num_classes=3, checkpoint_path=path)


@pytest.mark.skipif(not TIMM_NOTES, reason="this timm does not save how a model was made")
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("name", ["autoformer_tiny", "vitnas_arch"])
def test_timm_saves_and_loads(tmp_path: Path, name: str, resized: bool, generator: torch.Generator) -> None:
    options: dict[str, Any] = {"arch": ARCH.to_json()} if name == "vitnas_arch" else {"img_size": 32}
    model = timm.create_model(name, num_classes=4, **options).eval()
    randomize_(model, generator)
    if resized:
        model.set_input_size(img_size=model.arch.image_size * 2, patch_size=8)
        model.reset_classifier(6)
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.arch == model.arch
    images = images_for(model.arch)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_a_model_of_our_own_saves_with_its_arch(tmp_path: Path, generator: torch.Generator) -> None:
    model = build(ARCH).eval()
    randomize_(model, generator)
    save_for_hf(model, tmp_path, safe_serialization=True, model_args={"arch": model.arch.to_json()})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.arch == ARCH
    torch.testing.assert_close(again(images_for(ARCH)), model(images_for(ARCH)), rtol=0, atol=0)
    # Other classes, channels and sizes are adapted as timm does for its own ViTs.
    chans = 3 if TIMM_NOTES else 1
    other = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=chans, img_size=32
    )
    want = build(ARCH)
    want.load_state_dict(model.state_dict())
    want.set_input_size(img_size=32)
    torch.testing.assert_close(other.pos_embed, want.pos_embed, rtol=0, atol=0)
    torch.testing.assert_close(
        other.patch_embed.proj.weight.sum(1, keepdim=True), want.patch_embed.proj.weight, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(other.blocks[1].attn.rel_pos_k.rows, want.blocks[1].attn.rel_pos_k.rows)
    assert other(images_for(other.arch)).shape == (2, 3)


def test_patches_of_another_size_are_resampled(tmp_path: Path, generator: torch.Generator) -> None:
    model = build(ARCH)
    randomize_(model, generator)
    save_for_hf(model, tmp_path, safe_serialization=True, model_args={"arch": model.arch.to_json()})
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, patch_size=8, img_size=32)
    model.set_input_size(img_size=32, patch_size=8)
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_weights_for_another_resolution_are_resampled_in_every_stage() -> None:
    small = replace(PUBLISHED["vit_res_tiny"], image_size=112, num_classes=3)
    model, state = build(replace(small, image_size=56)).eval(), build(small).state_dict()
    fitted = fit_weights(state, model)
    assert {name: tensor.shape for name, tensor in fitted.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    torch.testing.assert_close(
        fitted["reductions.0.pos_embed"],
        state["reductions.0.pos_embed"].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2),
        rtol=0,
        atol=0.05,
    )
    without = {name: tensor for name, tensor in state.items() if name != "reductions.1.pos_embed"}
    with pytest.raises(UserError, match=r"the weights have no reductions\.1\.pos_embed; .* resampled"):
        fit_weights(without, model)


def test_training_heads_are_an_option(tmp_path: Path) -> None:
    model = timm.create_model("vit_resnas_tiny", patch_head=True, num_classes=3, img_size=56)
    assert model(torch.randn(1, 3, 56, 56), want=["patch_head"])["patch_head"].shape == (1, 1, 3)
    save_timm(model, tmp_path)  # other classes: neither head's weights are taken
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2)
    assert other.pretrained_cfg["classifier"] == model.pretrained_cfg["classifier"] == ("head", "patch_head")
    torch.testing.assert_close(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_another_image_size_keeps_the_share_of_the_patches() -> None:
    """As `set_input_size` does: a net that was searched with fewer patches loads at other sizes."""
    small = replace(PUBLISHED["autoformer_tiny"], image_size=(32, 48))
    blocks = tuple(replace(b, keep=3) if i == 2 else b for i, b in enumerate(small.stages[0].blocks))
    arch = replace(small, stages=(replace(small.stages[0], blocks=blocks),), selector="fixed")
    for size in ((64, 96), (32, 32)):
        made = timm.create_model("vitnas_arch", arch=arch, img_size=size)
        same = build(arch)
        same.set_input_size(img_size=size)
        assert made.arch == same.arch
    assert [block.keep for block in made.arch.blocks if block.keep] == [2]
