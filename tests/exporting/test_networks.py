"""Trained networks by what a user types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("kind", ["weights.safetensors", "plain.pt", "wrapped.pth", "average.ckpt"])
def test_a_name_and_a_file(kind: str, model: Any, tmp_path: Path) -> None:
    """Classes and channels are those of the file; what training scripts wrap weights in is taken off."""
    path, state = tmp_path / kind, model.state_dict()
    if kind == "weights.safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "plain.pt":
        torch.save(state, path)
    else:
        name = "state_dict" if kind == "wrapped.pth" else "ema"
        torch.save({"epoch": 3, name: {f"module.{key}": value for key, value in state.items()}}, path)
    found = load_network(f"{NAME}@{path}", what="pretrained")
    assert not found.training
    images = torch.randn(2, 1, 160, 160)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))


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
