"""EsViT's evaluation by the authors' code: weighted nearest neighbours, and features of the last blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitnas.model.timm_keys import from_timm
from vitnas.probing import features, knn_accuracy, knn_votes


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(shared / "golden" / "esvit.safetensors", "pt") as file:
        wanted = [name for name in file.keys() if name.startswith(("knn/", "vit/", "swin/"))]
        return {name: file.get_tensor(name) for name in wanted}, json.loads(file.metadata()["config"])[
            "parts"
        ]


def weights(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}/weights."
    return {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix) and "weights.head" not in key
    }


def test_nearest_neighbours(golden: Any) -> None:
    tensors, parts = golden
    want = parts["knn"]
    bank, classes, asked, truth = (
        tensors[f"knn/{name}"] for name in ("train_features", "train_labels", "test_features", "test_labels")
    )
    k, temperature = want["k"], want["temperature"]
    found = knn_accuracy(bank, classes, asked, truth, k=k, temperature=temperature)
    assert 100 * found == pytest.approx(want["top1"])
    votes = knn_votes(bank, classes, asked, k=k, temperature=temperature, num_classes=want["classes"])
    top5 = (votes.sort(1, descending=True).indices[:, :5] == truth[:, None]).any(1).double().mean()
    assert 100 * float(top5) == pytest.approx(want["top5"])


@pytest.mark.parametrize("ours", [False, True])
def test_features_of_the_last_blocks_of_a_vit(golden: Any, ours: bool) -> None:
    tensors, parts = golden
    size = parts["vit"]
    network: nn.Module = VisionTransformer(
        img_size=size["img_size"],
        patch_size=size["patch"],
        embed_dim=size["embed_dim"],
        depth=size["depth"],
        num_heads=size["heads"],
        num_classes=0,
    )
    network.load_state_dict(weights(tensors, "vit"))
    if ours:
        network = from_timm(network)
    images = tensors["vit/crops.global"][0]
    found = features(network, [(images, torch.zeros(len(images)))], blocks=size["n_last"])
    torch.testing.assert_close(found.values_ND, tensors["vit/last_blocks.crop0"], rtol=1e-5, atol=1e-5)


def test_features_of_the_last_blocks_of_a_swin(golden: Any) -> None:
    """Across stages, those of the last stage through the final norm."""
    tensors, parts = golden
    size = parts["swin"]
    network = SwinTransformer(
        img_size=size["img_size"],
        patch_size=size["patch"],
        embed_dim=size["embed_dim"],
        depths=size["depths"],
        num_heads=size["heads"],
        window_size=size["window"],
        num_classes=0,
    )
    network.load_state_dict(checkpoint_filter_fn(weights(tensors, "swin"), network), strict=False)
    images = tensors["swin/crops.global"][0]
    found = features(network, [(images, torch.zeros(len(images)))], blocks=size["n_last"])
    torch.testing.assert_close(found.values_ND, tensors["swin/last_blocks.crop0"], rtol=1e-5, atol=1e-5)
