"""Outputs by name, read from networks of timm: right values, tokens from maps, names that do not exist."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from vitnas.errors import UserError
from vitnas.model import build, from_timm
from vitnas.model.outputs import output_names, read_outputs
from vitnas.space import unified

PLAIN = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5, "img_size": 32}
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": PLAIN,
    "deit_tiny_distilled_patch16_224": PLAIN,
    "eva02_tiny_patch14_224": PLAIN | {"img_size": 28},
    "vit_small_patch16_dinov3": PLAIN,
    "beitv2_base_patch16_224": PLAIN,
    "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 2), "num_heads": (1, 2), "img_size": 56},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (12, 24, 36, 48)},
}
GRIDS = {  # side and width behind each block
    "swin_tiny_patch4_window7_224": [(14, 12), (7, 24), (7, 24)],
    "convnext_tiny": [(16, 12), (8, 24), (4, 36), (2, 48)],
}


def network_of(name: str) -> Any:
    torch.manual_seed(0)
    options = {"num_classes": 5} | NETWORKS[name]
    return timm.create_model(name, **options).eval()


def images_for(name: str) -> torch.Tensor:
    side = NETWORKS[name].get("img_size", 64)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_timm_are_read_by_the_same_names(name: str) -> None:
    network, images = network_of(name), images_for(name)
    names = output_names(network)
    found = read_outputs(network, images, names)
    assert list(found) == names
    assert {"logits", "head", "pooled", "tokens", "blocks.0", "blocks.2"} <= {*names}
    assert f"blocks.{len(GRIDS.get(name, 'abc'))}" not in names
    features = network.forward_features(images)
    torch.testing.assert_close(found["logits"], network(images), rtol=0, atol=0)
    torch.testing.assert_close(
        found["pooled"], network.forward_head(features, pre_logits=True), rtol=0, atol=0
    )
    if name in GRIDS:
        for index, (side, width) in enumerate(GRIDS[name]):
            assert found[f"blocks.{index}"].shape == (2, side**2, width)
        assert found["tokens"].shape == found[f"blocks.{index}"].shape
        mean = features.mean((1, 2)) if "swin" in name else features.mean((2, 3))
        torch.testing.assert_close(found["tokens"].mean(1), mean)
    else:
        torch.testing.assert_close(found["tokens"], features, rtol=0, atol=0)
        maps = network.forward_intermediates(
            images, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
        for index, (patches, prefix) in enumerate(maps):
            block = torch.cat([prefix, patches], 1)
            torch.testing.assert_close(found[f"blocks.{index}"], block, rtol=0, atol=0)
    # Asked for alone, an output is the same, and nothing is left behind in the network.
    for alone in names:
        torch.testing.assert_close(read_outputs(network, images, [alone])[alone], found[alone])
    assert not any(module._forward_hooks for module in network.modules())


def test_both_heads_of_a_distilled_network() -> None:
    name = "deit_tiny_distilled_patch16_224"
    network, images = network_of(name), images_for(name)
    found = read_outputs(network, images, ("head", "head_dist", "logits"))
    tokens = network.forward_features(images)
    torch.testing.assert_close(found["head"], network.head(tokens[:, 0]))
    torch.testing.assert_close(found["head_dist"], network.head_dist(tokens[:, 1]))
    torch.testing.assert_close(found["logits"], (found["head"] + found["head_dist"]) / 2)


def test_ours_and_timms_say_the_same() -> None:
    network, images = network_of("vit_tiny_patch16_224"), images_for("vit_tiny_patch16_224")
    ours = from_timm(network).eval()
    names = output_names(ours)
    assert sorted(names) == sorted(output_names(network))
    theirs = read_outputs(network, images, names)
    torch.testing.assert_close(read_outputs(ours, images, names), theirs, rtol=1e-5, atol=1e-5)


def test_what_is_not_there_is_refused_with_the_nearest_name() -> None:
    network, images = network_of("vit_tiny_patch16_224"), images_for("vit_tiny_patch16_224")
    with pytest.raises(
        UserError, match=r"'token' is wanted; .* and blocks.0 to blocks.2.* Nearest: 'tokens'"
    ):
        read_outputs(network, images, ["token"])
    assert list(read_outputs(network, images, ["head", "head_dist?"])) == ["head"]
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    assert output_names(plain) == ["logits", "head"]
    torch.testing.assert_close(read_outputs(plain, images, ["head"])["head"], plain(images))
    several = timm.create_model("crossvit_9_240", num_classes=5).eval()
    with pytest.raises(UserError, match="features of several kinds"):
        read_outputs(several, torch.randn(1, 3, 240, 240), ["tokens"])


def test_gradients_flow_through_what_is_read() -> None:
    network, images = network_of("convnext_tiny"), images_for("convnext_tiny")
    read_outputs(network, images, ["blocks.1"])["blocks.1"].sum().backward()
    assert network.stem[0].weight.grad is not None
    assert network.head.fc.weight.grad is None


@pytest.mark.parametrize("want", [["logits"], ["tokens", "blocks.0"]])
def test_what_a_training_asks_for_is_one_graph_of_torch_compile(want: list[str]) -> None:
    network = build(unified("px32").middle())
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    found = compiled(images, want=want)
    for name, expected in network(images, want=want).items():
        torch.testing.assert_close(found[name], expected)
