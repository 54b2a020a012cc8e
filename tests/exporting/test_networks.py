"""Trained networks by what a user types."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from vitnas.errors import UserError
from vitnas.exporting import save_timm
from vitnas.exporting.networks import load_network
from vitnas.model.dynamicvit_official import PARTS

NAME = "test_vit"  # timm's smallest


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=7, in_chans=1).eval()


State = dict[str, torch.Tensor]


def begun(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def other(state: State) -> State:
    return {name: torch.zeros_like(value) for name, value in state.items()}


# What training scripts write: the weights wanted, and beside them what must not be taken for them.
WRITTEN: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "DDP": lambda state: {"epoch": 3, "state_dict": begun(state, "module.")},
    "compiled": lambda state: {"model": begun(state, "_orig_mod.")},
    "compiled, then DDP, then a class": lambda state: {"net": begun(state, "model.module._orig_mod.")},
    "timm's average": lambda state: {"state_dict": other(state), "state_dict_ema": begun(state, "module.")},
    "DeiT's average": lambda state: {
        "model": other(state), "model_ema": state, "args": Namespace(lr=1e-3), "max_accuracy": np.float64(0.8)
    },
    "an average called ema": lambda state: {"model": other(state), "ema": {"n_averaged": torch.tensor(3), **state}},
    "no average yet": lambda state: {"model_ema": None, "model": state},
    "Lightning": lambda state: {
        "state_dict": {**begun(state, "model."), "criterion.weight": torch.ones(7)}, "pytorch-lightning_version": "2"
    },
    "Lightning with an average": lambda state: {
        "state_dict": {**begun(other(state), "model."), **begun(state, "ema_model.module.")}
    },
    "DINO": lambda state: {
        "student": begun(other(state), "module.backbone."),
        "teacher": {**begun(state, "backbone."), "head.mlp.0.weight": torch.zeros(8, 8)},
    },
    "beside a decoder": lambda state: {"model": {**begun(state, "encoder."), "decoder.pos_embed": torch.ones(1, 9)}},
    "under a name of one's own": lambda state: {"weights": {"best": state}, "optimizer": {"state": {0: other(state)}}},
    "an epoch among the weights": lambda state: {**state, "epoch": 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_name_and_a_file(kind: str, model: Any, tmp_path: Path) -> None:
    """Classes and channels are those of the file; what training scripts wrap weights in is taken off."""
    path, state = tmp_path / "a.pth", model.state_dict()
    torch.save(WRITTEN[kind](state), path)
    found = load_network(f"{NAME}@{path}", what="pretrained")
    assert not found.training
    assert (found.num_classes, found.pretrained_cfg["num_classes"]) == (7, 7)
    assert found.pretrained_cfg["input_size"] == (1, 160, 160)
    assert "state_dict" not in {**found.pretrained_cfg, **found.default_cfg}
    torch.testing.assert_close(found.state_dict(), state, rtol=0, atol=0)
    safetensors.torch.save_file(begun(state, "module."), tmp_path / "a.safetensors")
    found = load_network(f"{NAME}@{tmp_path / 'a.safetensors'}", what="pretrained")
    torch.testing.assert_close(found.state_dict(), state, rtol=0, atol=0)


def test_a_file_without_a_head_gives_features(tmp_path: Path) -> None:
    model = timm.create_model(NAME, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    found: Any = load_network(f"{NAME}@{tmp_path / 'a.pth'}", what="pretrained")
    assert found.num_classes == 0
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_positions_of_another_image_size(tmp_path: Path) -> None:
    """They are resampled once, as timm does: to the name's size, or to the one that is asked for."""
    small = timm.create_model(NAME, img_size=64)
    torch.save(small.state_dict(), tmp_path / "a.pth")
    found: Any = load_network(f"{NAME}@{tmp_path / 'a.pth'}", what="pretrained")
    small.set_input_size(img_size=160)
    torch.testing.assert_close(found.pos_embed, small.pos_embed, rtol=0, atol=0)
    odd: Any = load_network(f"{NAME}@{tmp_path / 'a.pth'}", what="pretrained", image_size=30)
    assert odd.pos_embed.shape == found.pos_embed.shape
    own: Any = load_network(f"{NAME}@{tmp_path / 'a.pth'}", what="pretrained", image_size=64)
    assert torch.equal(own.pos_embed, torch.load(tmp_path / "a.pth")["pos_embed"])
    assert own.pretrained_cfg["input_size"] == (3, 64, 64)


@pytest.mark.parametrize("name", ["autoformer_tiny", "pip_ti_224", "vix_vip", "resnet10t"])
def test_names_of_ours_and_of_other_kinds(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=3)
    torch.save({"model": begun(model.state_dict(), "module.")}, tmp_path / "a.pth")
    found = load_network(f"{name}@{tmp_path / 'a.pth'}", what="pretrained")
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(value: float, model: Any, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["blocks.1.attn.qkv.weight"][3, 4] = state["norm.bias"][0] = value
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"NaN or infinite \(blocks\.1\.attn\.qkv\.weight and 1 more\); every"
    ):
        load_network(f"{NAME}@{tmp_path / 'a.pth'}", what="pretrained")


def test_a_file_of_a_network_with_two_heads(tmp_path: Path) -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    found = load_network(f"deit_tiny_distilled_patch16_224@{tmp_path / 'a.safetensors'}", what="pretrained")
    assert found.num_classes == 3
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))


@pytest.mark.slow  # 10 M parameters
def test_a_file_of_dynamicvits_authors(tmp_path: Path) -> None:
    """Their names of the predictors, which stand in front of blocks 3, 6 and 9; positions are resampled."""
    name = "dynamicvit_deit_256_07"
    model = timm.create_model(name, num_classes=3).eval()
    theirs = {
        key.replace(f"selections.{3 * number + 3}.", f"score_predictor.{number}."): value
        for key, value in model.state_dict().items()
        for number in [int(key.split(".")[1]) // 3 - 1 if key.startswith("selections.") else 0]
    }
    for part, own in PARTS.items():
        theirs = {
            key.replace(f".{own}.", f".{part}.") if key.startswith("score") else key: value
            for key, value in theirs.items()
        }
    torch.save({"model": theirs, "epoch": 29}, tmp_path / "their.pth")
    assert "score_predictor.2.out_conv.4.bias" in theirs
    found = load_network(f"{name}@{tmp_path / 'their.pth'}", what="pretrained")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))


def test_a_folder(model: Any, tmp_path: Path) -> None:
    save_timm(model, tmp_path / "saved")
    found = load_network(str(tmp_path / "saved"), what="pretrained")
    images = torch.randn(1, 1, 160, 160)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))


def test_what_cannot_be_loaded_is_told(model: Any, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text.pth cannot be read as a checkpoint"):
        load_network(f"{NAME}@{tmp_path / 'text.pth'}", what="pretrained")
    torch.save(
        {name: value for name, value in model.state_dict().items() if "blocks.1" not in name},
        tmp_path / "a.pt",
    )
    with pytest.raises(UserError, match="Missing key"):
        load_network(f"{NAME}@{tmp_path / 'a.pt'}", what="pretrained")
    wide = timm.create_model("test_vit2").state_dict()
    for content, reason in (
        (wide, "Error"),
        ({"model": {"a.weight": torch.ones(2)}}, "Error"),
        ({"epoch": 3}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match=reason):
            load_network(f"{NAME}@{tmp_path / 'a.pt'}", what="pretrained")
