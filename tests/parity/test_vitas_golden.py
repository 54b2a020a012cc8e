"""The authors' retrained ViTAS network: its logits through our key map."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vitnas.arch import Arch, Block
from vitnas.model.net_id import vitas_arch
from vitnas.model.vitas_official import load_vitas_model


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(shared / "golden" / "vitas.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])


def arch_of(config: dict[str, Any]) -> Arch:
    net = config["config"]["backbone"]
    count, dim, (heads,), qkv, _, hidden = net["Block"][:6]
    block = Block(num_heads=heads, head_dim=qkv // 3 // heads, mlp_hidden=hidden)
    return vitas_arch(net["init_stem"][2][0], dim, (block,) * count, num_classes=net["FC"][4])


def test_logits(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, config = golden
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    for prefix in ("", "net.", "module.net."):
        model = load_vitas_model({prefix + name: t for name, t in weights.items()}, arch_of(config))
        with torch.no_grad():
            torch.testing.assert_close(model(tensors["images"]), tensors["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [{"attn_scale": "head_dim"}, {"head_norm_eps": 1e-1}, {"norm_eps": 1e-1}])
def test_the_numbers_would_show_a_mistake(change: dict[str, Any], golden: Any) -> None:
    tensors, config = golden
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    model = load_vitas_model(weights, replace(arch_of(config), **change))
    with torch.no_grad():
        off = (model(tensors["images"]) - tensors["logits"]).abs().max()
    assert off > 1e-4
