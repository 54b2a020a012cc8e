"""Vision X-formers by name: parameters as counted in the authors' networks, convolutional ones, other image sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.counting import count
from vitnas.exporting import export_onnx, load_timm, save_timm
from vitnas.model.convolutional import ChannelNorm, MapBlock, cv, levi
from vitnas.model.fnet2d import FNet2d
from vitnas.model.vision_xformers import VISION_XFORMERS
from vitnas.testing import randomize_

TABLE = 1025 * 128  # learned positions; the authors' rotary ViT and ViL keep a table that nothing uses
TRUE = {
    "vix_vit": 661_770,
    "vix_vip": 663_306,
    "vix_vin": 662_298,
    "vix_vil": 809_482,
    "vix_vit_rope": 661_770 - TABLE,
    "vix_vip_rope": 532_106,
    "vix_vin_rope": 531_098,
    "vix_vil_rope": 858_634 - TABLE,
    "vix_fnet": 399_114,
    "vix_hybrid_vit": 754_506,
    "vix_hybrid_vit_rope": 754_506 - TABLE,
    "vix_hybrid_vip": 756_042,
    "vix_hybrid_vip_rope": 624_842,
    "vix_hybrid_vin": 755_034,
    "vix_hybrid_vin_rope": 623_834,
    "vix_hybrid_vil": 951_370,
    "vix_hybrid_vil_rope": 951_370 - TABLE,
    "vix_hybrid_fnet": 491_850,
    "vix_cct": 1_061_129,
    "vix_ccn": 1_061_657,
    "vix_ccp": 1_062_665,
    "vix_mixer": 8_558_664,
    "vix_hybrid_mixer": 8_650_248,
}


def test_parameters_are_the_true_ones() -> None:
    assert {name: count(arch).params for name, arch in VISION_XFORMERS.items()} == TRUE


@pytest.mark.parametrize(
    ("kind", "letter", "leaf"),
    [("levi", "n", 645_912), ("levi", "p", 646_920), ("cv", "n", 851_416), ("cv", "p", 852_424)],
)
def test_parameters_of_convolutional_ones(kind: str, letter: str, leaf: int) -> None:
    model = {"levi": levi, "cv": cv}[kind](letter)
    norms = 11 * 2 * 128 if kind == "cv" else 0  # which the authors' summary does not see
    assert sum(parameter.numel() for parameter in model.parameters()) == leaf + norms


@pytest.mark.parametrize(("family", "norms"), [(cv, True), (levi, False)])
def test_convolutional_ones_are_the_papers_formula(family: Any, norms: bool) -> None:
    """Convolutional embeddings, the norm that adds epsilon to the deviation, and the blocks on maps, step by step."""
    model = family("t", num_classes=5).double().eval()
    randomize_(model, torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 10, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def normed(norm: Any, x: Tensor) -> Tensor:
        if not norms:
            return x
        mean, deviation = x.mean(1, keepdim=True), x.std(1, correction=0, keepdim=True)
        return (x - mean) / (deviation + 1e-5) * norm.weight[:, None, None] + norm.bias[:, None, None]

    def attended(attn: Any, x: Tensor) -> Tensor:
        heads = (x.flatten(2).transpose(1, 2) @ attn.qkv.weight.t()).unflatten(2, (3, 4, 32))
        q, k, v = (heads[:, :, i].transpose(1, 2) for i in range(3))
        out = ((q @ k.transpose(2, 3) / 32**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        rows = out @ attn.proj.weight.t() + attn.proj.bias
        return rows.transpose(1, 2).reshape(x.shape)

    def linear(layer: Any, x: Tensor) -> Tensor:
        return torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], x) + layer.bias[:, None, None]

    x = images
    for layer in model.layers:
        if isinstance(layer, MapBlock):
            x = x + attended(layer.attn, normed(layer.norm1, x))
            x = x + linear(layer.fc2, functional.gelu(linear(layer.fc1, normed(layer.norm2, x))))
        elif isinstance(layer, nn.Conv2d):
            x = functional.conv2d(x, layer.weight, layer.bias, stride=layer.stride, padding=1)
        else:
            x = normed(layer, x)
    assert x.shape == (2, 128, 5, 7)
    assert [layer.stride[0] for layer in model.layers if isinstance(layer, nn.Conv2d)] == [2, 1, 1]
    want = x.mean((2, 3)) @ model.head.weight.t() + model.head.bias
    torch.testing.assert_close(model(images), want, rtol=1e-8, atol=1e-9)


def test_parameters_of_fnet2d() -> None:
    assert sum(parameter.numel() for parameter in FNet2d().parameters()) == 407_818


@pytest.mark.parametrize(
    "name", ["vix_levin", "vix_levip", "vix_levit", "vix_cvn", "vix_cvp", "vix_cvt", "vix_fnet2d"]
)
def test_convolutional_ones_run_and_learn(name: str) -> None:
    model = timm.create_model(name, num_classes=5, img_size=16)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model(images).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)
        assert model(torch.zeros(1, 3, 24, 20)).shape == (1, 5)  # any size, also not square
        assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (
            2,
            model.num_features,
        )
        model.reset_classifier(3)
        assert model(images).shape == (2, 3)
        model.reset_classifier(0)
        assert model(images).shape == (2, model.num_features)


@pytest.mark.parametrize("name", ["vix_levip", "vix_cvt", "vix_fnet2d"])
def test_convolutional_ones_export(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=5, img_size=8).eval()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert export_onnx(model, tmp_path / "model.onnx", images, exporter="legacy")["max_rel_diff"] < 1e-4


@pytest.mark.parametrize("name", ["vix_hybrid_vin_rope", "vix_vil", "vix_cct", "vix_mixer"])
def test_timm_makes_them_at_other_sizes(name: str) -> None:
    arch = VISION_XFORMERS[name]
    model = timm.create_model(name, num_classes=7, img_size=16 * arch.patch_size).eval()
    images = torch.zeros(1, 3, 16 * arch.patch_size, 16 * arch.patch_size)
    assert model(images).shape == (1, 7)
    model.set_input_size(img_size=12 * arch.patch_size)
    assert model(torch.zeros(1, 3, 12 * arch.patch_size, 12 * arch.patch_size)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "base"),
    [("pin_ti_224", "pit_ti_224"), ("pip_ti_224", "pit_ti_224"), ("levin_128s", "levit_128s")],
)
def test_pit_and_levit_are_timms_own(name: str, base: str) -> None:
    model, plain = timm.create_model(name, num_classes=4), timm.create_model(base, num_classes=4)
    assert type(model) is type(plain)
    assert {row["is"] for row in model.swapped} == {"Performer" if "p_" in name else "Nystrom"}
    assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 4)
    new = sum(row["new_params"] for row in model.swapped)
    gone = sum(
        plain.get_submodule(row["layer"]).get_parameter(leaf).numel()
        for row in model.swapped
        for leaf in row["gone"]
    )  # LeViT's attention biases
    assert (
        sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + new - gone
    )


def test_pit_and_levit_are_saved_with_their_names(tmp_path: Path) -> None:
    """Loading asks nobody for weights of timm's model; other classes than the saved ones mean a fresh head."""
    for name in ("pin_ti_224", "levip_128s"):
        model = timm.create_model(name, num_classes=4)
        assert save_timm(model.eval(), tmp_path / name)["architecture"] == name
        images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        loaded = load_timm(tmp_path / name)
        assert torch.equal(loaded(images), model(images))
        fewer = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True, num_classes=2).eval()
        assert fewer(images).shape == (1, 2)
        layer = model.swapped[0]["layer"]
        for ours, theirs in zip(*(m.get_submodule(layer).parameters() for m in (model, fewer)), strict=True):
            assert torch.equal(ours, theirs)


def test_the_channel_norm_of_equal_channels_has_a_gradient() -> None:
    x = torch.zeros(1, 4, 2, 2).index_fill(3, torch.tensor([1]), 3.0).requires_grad_()
    ChannelNorm(4)(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
