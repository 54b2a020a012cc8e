"""The authors' ViT-ResNAS code: its logits in evaluation, and class and patch logits in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vitnas.arch import Arch
from vitnas.model.network_def import network_def, parse_network_def
from vitnas.model.resnas_official import load_resnas_model, resnas_tensors


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(shared / "golden" / "vit_resnas.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])


@pytest.fixture(scope="module")
def weights(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> dict[str, Tensor]:
    return {name.removeprefix("weights."): t for name, t in golden[0].items() if name.startswith("weights.")}


@pytest.fixture(scope="module")
def arch(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> Arch:
    config = golden[1]
    return parse_network_def(config["network_def"], image_size=config["img_size"], patch_head=True)


def test_logits(golden: Any, weights: dict[str, Tensor], arch: Arch) -> None:
    tensors, config = golden
    assert str(network_def(arch)) == config["network_def"]
    model = load_resnas_model(weights, arch)
    with torch.no_grad():
        torch.testing.assert_close(model(tensors["images"]), tensors["logits"], rtol=1e-5, atol=1e-5)
        heads = model(tensors["images"], heads=True)
    torch.testing.assert_close(heads["head"], tensors["train_logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(heads["patch_head"], tensors["train_patch_logits"], rtol=1e-5, atol=1e-5)


MISTAKES = (
    "no residual",
    "class token not transformed",
    "positions on the class token too",
    "stem without its second path",
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_numbers_would_show_a_mistake(
    mistake: str, golden: Any, weights: dict[str, Tensor], arch: Arch
) -> None:
    model = load_resnas_model(weights, arch)
    for reduction in model.reductions:
        if mistake == "no residual":
            reduction.residual = False
        elif mistake.startswith("class token"):
            torch.nn.init.zeros_(reduction.prefix.weight)
        elif mistake.startswith("positions"):
            with torch.no_grad():
                reduction.prefix.bias += reduction.pos_embed.mean(1).squeeze(0)
    if mistake.startswith("stem"):
        torch.nn.init.zeros_(model.patch_embed.norm3.weight)
    with torch.no_grad():
        assert (model(golden[0]["images"]) - golden[0]["logits"]).abs().max() > 1e-3


def test_every_name_is_known(weights: dict[str, Tensor]) -> None:
    assert len(resnas_tensors(weights)) == len(weights)
