"""Patch Slimming: the slimmed network and its MACs, to an independent implementation's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.model import Model, build
from vitnas.model.selections import selecting, with_places

Golden = tuple[dict[str, Tensor], dict[str, Any]]


@pytest.fixture(scope="module", params=["a", "b"])
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    """Tensors without the part's name, and its settings."""
    with safe_open(shared / "golden" / "patch_slimming.safetensors", "pt") as file:
        start = f"{request.param}/"
        found = {name[len(start) :]: file.get_tensor(name) for name in file.keys() if name.startswith(start)}
        return found, json.loads(file.metadata()["config"])["parts"][request.param]


def arch_of(part: dict[str, Any], kept: list[int] | None = None) -> Arch:
    """Of the whole network, or of one whose blocks give so many tokens."""
    block = Block(num_heads=part["heads"], head_dim=part["dim"] // part["heads"], mlp_hidden=4 * part["dim"])
    arch = Arch(
        image_size=part["img"],
        patch_size=part["patch"],
        num_classes=part["classes"],
        stages=(Stage(embed_dim=part["dim"], blocks=(block,) * part["depth"]),),
    )
    left, keeps = part["tokens"], {}
    for index, tokens in enumerate(kept or ()):
        if tokens < left:
            keeps[index], left = tokens - 1, tokens
    return selecting(arch, keeps, "patch_slimming")


def whole(golden: Golden) -> Model:
    """The network before slimming, in float64 as the golden numbers are."""
    tensors, part = golden
    model = build(arch_of(part))
    model.load_state_dict({n[8:]: t for n, t in tensors.items() if n.startswith("weights.")})
    return model.double().eval()


def test_slimmed_network(golden: Golden) -> None:
    tensors, part = golden
    keep = [tensors[f"keep.{index}"] for index in range(part["depth"])]
    model = with_places(whole(golden), [tokens[tokens > 0] - 1 for tokens in keep])
    assert model.arch == arch_of(part, part["keep_counts"])
    want = tensors["logits_slim"]
    torch.testing.assert_close(model(tensors["images"].double()), want, rtol=1e-12, atol=1e-12)
    model.masks_tokens = True
    torch.testing.assert_close(model(tensors["images"].double()), want, rtol=1e-12, atol=1e-12)


def test_macs(golden: Golden) -> None:
    part = golden[1]
    assert count(arch_of(part, part["keep_counts"])).macs == part["macs_slim"]
    whole_until_last = [part["tokens"]] * (part["depth"] - 1) + [1]
    want = part["macs_all_tokens_until_the_last_block"]
    assert count(arch_of(part, whole_until_last)).macs == want
