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
from vitnas.layers.axes import Axes, named_axes
from vitnas.model import build
from vitnas.model.network_def import network_def, parse_network_def
from vitnas.model.resnas_official import load_resnas_model, resnas_tensors
from vitnas.space import StageSpace, vit_resnas
from vitnas.supernet import Supernet


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
        heads = model(tensors["images"], want=("head", "patch_head"))
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


def test_a_supernets_checkpoint_is_that_of_its_largest_arch(
    weights: dict[str, Tensor], golden: Any, arch: Arch
) -> None:
    """Shared by prefix on both sides: a supernet whose largest Arch is the golden net has the golden logits."""
    stages = tuple(
        StageSpace(
            depth=len(stage.blocks),
            embed_dims=(stage.embed_dim - 4, stage.embed_dim),
            num_heads=tuple(sorted({block.num_heads for block in stage.blocks})),
            head_dim=stage.blocks[0].head_dim,
            mlp_hidden=tuple(sorted({block.mlp_hidden for block in stage.blocks})),
        )
        for stage in arch.stages
    )
    space = vit_resnas("sr_tiny_mh", image_size=112, num_classes=10, stages=stages, patch_head=True)
    supernet = Supernet(space).eval()
    tensors = resnas_tensors(weights)
    wide = dict(supernet.state_dict())
    for (
        name,
        tensor,
    ) in tensors.items():  # the golden net is not the widest everywhere: its entries come first
        if wide[name].shape == tensor.shape:
            wide[name] = tensor
        else:
            wide[name] = place(
                wide[name], tensor, supernet.axes[name], named_axes(build(arch, device="meta"))[name]
            )
    supernet.load_state_dict(wide)
    with torch.no_grad():
        logits = supernet(golden[0]["images"], arch)
    torch.testing.assert_close(logits, golden[0]["logits"], rtol=1e-5, atol=1e-5)


def place(wide: Tensor, tensor: Tensor, axes: Axes, given: Axes) -> Tensor:
    found = wide.clone()
    region = tuple(slice(0, size) for _, size in given)
    found.view([size for _, size in axes])[region] = tensor.view([size for _, size in given])
    return found
