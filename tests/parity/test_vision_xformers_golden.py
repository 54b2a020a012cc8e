"""The authors' logits of 21 networks, from their weights and images; and where the right answer is another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.model.fnet2d import load_fnet2d
from vitnas.model.vision_xformers import vision_xformer_like
from vitnas.model.vision_xformers_official import load_vision_xformer, set_official

PLAIN = {"ViT": "vit", "ViP": "vip", "ViL": "vil", "ViN": "vin", "FNet": "fnet"}
NAMES = [
    *PLAIN,
    "MLPMixer",
    "HybridViT",
    "HybridViL",
    "HybridViN",
    "HybridViP",
    "HybridFNet",
    "ViTRoPE",
    "ViLRoPE",
    "ViPRoPE",
    "ViNRoPE",
    "HybridViNRoPE",
    "HybridViPRoPE",
    "CCT",
    "CCN",
    "ccp",
]


def golden(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, Tensor]:
    """Settings, weights, images and logits."""
    with safe_open(str(shared / "golden" / "vision_xformers.safetensors"), "pt") as file:
        config = json.loads(file.metadata()["config"])[name]
        start = f"{name}/weights."
        weights = {k.removeprefix(start): file.get_tensor(k) for k in file.keys() if k.startswith(start)}
        return config, weights, file.get_tensor(f"{name}/images"), file.get_tensor(f"{name}/logits")


def arch_of(name: str, config: dict[str, Any]) -> Arch:
    kind: Any = "mixer" if name == "MLPMixer" else name.lower().removeprefix("hybrid").removesuffix("rope")
    if kind in ("cct", "ccn", "ccp"):
        dim = config["embedding_dim"]
        return vision_xformer_like(
            kind,
            image_size=config["img_size"],
            patch_size=2,
            dim=dim,
            depth=config["num_layers"],
            heads=config["num_heads"],
            mlp_hidden=4 * dim,
        )
    sizes = {key: config[key] for key in ("image_size", "patch_size", "num_classes", "dim", "depth")}
    return vision_xformer_like(
        kind,
        hybrid=name.startswith("Hybrid"),
        rotary=name.endswith("RoPE"),
        heads=config.get("heads", 4),
        mlp_hidden=config.get("mlp_dim", config["dim"]),
        **sizes,
    )


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_the_authors(name: str, shared: Path) -> None:
    config, weights, images, logits = golden(shared, name)
    arch = arch_of(name, config)
    model = load_vision_xformer(weights, arch)
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-5)
    # Their rotary ViT and ViL count a table of positions that nothing uses.
    unused = weights["pos_embedding"].numel() if name in ("ViTRoPE", "ViLRoPE") else 0
    assert count(arch).params + unused == config["params"]


def test_logits_of_fnet2d(shared: Path) -> None:
    config, weights, images, logits = golden(shared, "2DFNet")
    model = load_fnet2d(weights, dim=32, depth=2, hidden=64, num_classes=10)
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-4)
    assert sum(parameter.numel() for parameter in model.parameters()) == config["params"]


@pytest.mark.parametrize("name", ["ViP", "ViN"])
def test_what_the_papers_mean_is_another_number(name: str, shared: Path) -> None:
    config, weights, images, logits = golden(shared, name)
    model = load_vision_xformer(weights, arch_of(name, config))
    set_official(model, False)
    with torch.no_grad():
        assert 1e-4 * logits.norm() < (model(images) - logits).norm() < 0.2 * logits.norm()


def test_their_performer_mixes_images_and_ours_does_not(shared: Path) -> None:
    config, weights, images, _ = golden(shared, "ViP")
    model = load_vision_xformer(weights, arch_of("ViP", config)).double()
    batch = torch.cat([images[:1], -5 * images[1:]]).double()
    for official in (True, False):
        set_official(model, official)
        with torch.no_grad():
            each = torch.cat([model(batch[:1]), model(batch[1:])])
            same = torch.allclose(model(batch), each, rtol=1e-9, atol=1e-10)
        assert same != official


def test_weights_of_another_network_are_refused(shared: Path) -> None:
    config, weights, _, _ = golden(shared, "ViP")
    with pytest.raises(
        UserError, match=r"the checkpoint is not of .*blocks\.0\.attn\.conv\.weight is missing"
    ):
        load_vision_xformer(weights, arch_of("ViN", config))
