"""The authors' AutoFormer code: its logits and parameter counts for two Archs of one supernet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.space import AutoFormerSpace, autoformer
from vitnas.supernet import AUTOFORMER_OFFICIAL, Supernet
from vitnas.supernet.official import load_autoformer_model, load_autoformer_supernet

NAMES = ("largest", "smaller")


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(shared / "golden" / "autoformer.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])


@pytest.fixture(scope="module")
def weights(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> dict[str, Tensor]:
    return {name.removeprefix("weights."): t for name, t in golden[0].items() if name.startswith("weights.")}


def space_of(config: dict[str, Any]) -> AutoFormerSpace:
    wide = config["supernet"]
    return autoformer(
        "tiny",
        image_size=wide["img_size"],
        patch_size=wide["patch_size"],
        num_classes=wide["num_classes"],
        embed_dims=(96, wide["embed_dim"]),
        depths=(2, wide["depth"]),
        num_heads=(1, wide["num_heads"]),
        mlp_ratios=(3.0, 3.5, wide["mlp_ratio"]),
    )


def arch_of(config: dict[str, Any], name: str) -> Arch:
    told, dim = config["archs"][name], config["archs"][name]["embed_dim"][0]
    blocks = tuple(
        Block(num_heads=heads, head_dim=64, mlp_hidden=int(dim * ratio))
        for heads, ratio in zip(told["num_heads"], told["mlp_ratio"], strict=True)
    )
    return replace(space_of(config).largest(), stages=(Stage(embed_dim=dim, blocks=blocks),))


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_params(name: str, golden: Any, weights: dict[str, Tensor]) -> None:
    tensors, config = golden
    arch = arch_of(config, name)
    assert count(arch).params == config["archs"][name]["params"]
    supernet = Supernet(space_of(config), sharing=AUTOFORMER_OFFICIAL).eval()
    load_autoformer_supernet(supernet, weights)
    want = tensors[f"logits.{name}"]
    with torch.no_grad():
        for logits in (
            supernet(tensors["images"], arch),
            load_autoformer_model(weights, arch)(tensors["images"]),
        ):
            torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mistake", ["rows and columns swapped", "distances reversed", "bias cut per head"])
def test_the_numbers_would_show_a_mistake(mistake: str, golden: Any, weights: dict[str, Tensor]) -> None:
    tensors, config = golden
    arch, changed = arch_of(config, "smaller"), dict(weights)
    for name, tensor in weights.items():
        if mistake.startswith("rows") and name.endswith("_table_v"):
            swapped = name.replace("_table_v", "_table_h")
            changed[name], changed[swapped] = weights[swapped], tensor
        elif mistake.startswith("distances") and "_table_" in name:
            changed[name] = torch.cat([tensor[:1], tensor[1:].flip(0)])
        elif mistake.startswith("bias") and name.endswith("qkv.bias"):
            changed[name] = tensor.view(3, 2, 64).transpose(0, 1).flatten()
    with torch.no_grad():
        off = (
            (load_autoformer_model(changed, arch)(tensors["images"]) - tensors["logits.smaller"]).abs().max()
        )
    assert off > 1e-3
