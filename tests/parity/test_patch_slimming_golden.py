"""Patch Slimming, to numbers by hand and of an independent implementation: scores, errors, search, network, MACs."""

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
from vitnas.slimming import slim_patches
from vitnas.slimming.patch_scores import Blocks, Streams, patch_scores
from vitnas.slimming.patches import PatchSearch

ERRORS = {"mse": "mse", "relative_frobenius_sq": "relative", "raw_frobenius_sq": "sum"}

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


def test_scores(golden: Golden) -> None:
    """In float64 to all digits, in float32 to its own, whatever the batches."""
    tensors, part = golden
    keep = [tensors[f"keep.{index}"] for index in range(part["depth"])]
    model, images = whole(golden), tensors["images"].double()
    for precision, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        blocks = Blocks(model.to(precision))
        streams = Streams(blocks, images.to(precision).split(1), memory_bytes=1)
        for index in range(part["depth"] - 1):
            into = streams.into(index)
            if (name := f"hybrid.{index}.block_input") in tensors:
                torch.testing.assert_close(
                    torch.cat(into).double(), tensors[name], rtol=tolerance, atol=tolerance
                )
            found = torch.cat([patch_scores(blocks, index, x, keep[index + 1 :]) for x in into])
            torch.testing.assert_close(found, tensors[f"score.{index}.paths"], rtol=tolerance, atol=0)


def test_attention(golden: Golden) -> None:
    """Of the whole block, and of later ones among the tokens that are left."""
    tensors, part = golden
    model = whole(golden)
    keep = [tensors[f"keep.{index}"] for index in range(part["depth"])]
    blocks, x = Blocks(model), tensors["hybrid.0.block_input"]
    came = everything = blocks.all_tokens
    torch.testing.assert_close(blocks.attention(0, x, came, came), tensors["hybrid.0.attention"])
    x = blocks.run(0, x, everything, everything)
    for index in range(1, part["depth"]):
        found, given = blocks.attention(index, x, came, keep[index]), keep[index]
        want = tensors[f"hybrid.0.attention_after.{index}"]
        torch.testing.assert_close(found, want[..., given, :][..., came])
        x, came = blocks.run(index, x, came, given), given


def test_errors_of_candidates(golden: Golden) -> None:
    tensors, part = golden
    given = {index: tensors[f"keep.{index}"] for index in range(part["depth"])}
    for theirs, ours in ERRORS.items():
        slimming = PatchSearch(whole(golden), [tensors["images"].double()], error=ours)  # type: ignore[arg-type]
        for name, want in part["reconstruction_error"].items():
            index = int(name.split("/")[0])
            found = slimming.layer(slimming.blocks, index, given).error(torch.tensor(want["keep"]))
            assert found == pytest.approx(want[theirs], rel=1e-9, abs=1e-20)


def test_search_without_tuning(golden: Golden) -> None:
    tensors, part = golden
    images = tensors["images"].double()
    for name, want in part["search_without_fine_tuning"].items():
        theirs, _, tolerance = name.partition("<=")
        found = slim_patches(
            whole(golden),
            [images],
            tolerance=float(tolerance),
            step=want["step"],
            error=ERRORS[theirs],  # type: ignore[arg-type]
        )
        assert [[0, *(places + 1).tolist()] for places in found.places] == want["keep"]
        assert [list(tried[:3]) for tried in found.tried] == [tried[:3] for tried in want["tried"]]
        torch.testing.assert_close(list(found.errors), want["errors"], rtol=1e-9, atol=0)
        logits = tensors[f"search.{theirs}.{tolerance}.logits"]
        torch.testing.assert_close(found.model(images), logits, rtol=1e-12, atol=1e-12)
