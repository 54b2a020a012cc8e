"""DynamicViT's code: predictor, masked softmax, pruned inference, training forward, gradients; published costs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count, parts
from vitnas.layers.select import Kept, PredictorSelection, masked_softmax, sees
from vitnas.model import Model, build

PARTS = {
    "in_conv.0": "norm",
    "in_conv.1": "embed",
    "out_conv.0": "fc1",
    "out_conv.2": "fc2",
    "out_conv.4": "decision",
}


@pytest.fixture(scope="module")
def golden(shared: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(shared / "golden" / "dynamicvit.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])


def renamed(name: str, places: list[int]) -> str:
    """Ours of a parameter's name in their code, whose predictors are numbered by themselves."""
    found = re.fullmatch(r"(?:score_predictor\.(\d+)\.)?((?:in|out)_conv\.\d)\.(\w+)", name)
    if found is None:
        return name
    where = "" if found[1] is None else f"selections.{places[int(found[1])]}."
    return f"{where}{PARTS[found[2]]}.{found[3]}"


def weights_of(tensors: dict[str, Tensor], prefix: str, places: list[int]) -> dict[str, Tensor]:
    start = f"{prefix}/weights."
    return {renamed(n.removeprefix(start), places): t for n, t in tensors.items() if n.startswith(start)}


def dynamic_deit(
    dim: int,
    heads: int,
    keeps: dict[int, int],
    *,
    depth: int = 12,
    img: int = 224,
    patch: int = 16,
    classes: int = 1000,
) -> Arch:
    blocks = [
        Block(num_heads=heads, head_dim=dim // heads, mlp_hidden=4 * dim, keep=keeps.get(index))
        for index in range(depth)
    ]
    return Arch(
        image_size=img,
        patch_size=patch,
        num_classes=classes,
        stages=(Stage(embed_dim=dim, blocks=tuple(blocks)),),
        selector="predictor",
    )


@pytest.fixture(scope="module", params=["n196", "n64"])
def network(request: pytest.FixtureRequest, golden: Any) -> tuple[str, Model, list[int]]:
    tensors, config = golden
    net = config["networks"][request.param]
    arch = dynamic_deit(
        net["dim"],
        net["heads"],
        dict(zip(net["loc"], net["kept"], strict=True)),
        depth=net["depth"],
        img=net["img"],
        patch=net["patch"],
        classes=net["classes"],
    )
    model = build(arch)
    model.load_state_dict(weights_of(tensors, request.param, net["loc"]))
    assert count(arch).params == net["params"]
    return request.param, model, net["loc"]


@pytest.mark.parametrize("size", ["", "_small"])
def test_predictor(golden: Any, size: str) -> None:
    tensors, _ = golden
    predictor = PredictorSelection(16, 3, grid=(1, 7), num_prefix_tokens=0)
    predictor.load_state_dict(weights_of(tensors, "predictor", []))
    kept = Kept(mask_BN=tensors["predictor/policy"][..., 0])
    odds = predictor.score(tensors[f"predictor/x{size}"], kept, None)
    both = torch.stack([odds, -odds], dim=-1).sigmoid().log()
    torch.testing.assert_close(both, tensors[f"predictor/log_probs{size}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax_with_policy", "softmax_with_policy_sharp"])
def test_masked_softmax(golden: Any, name: str) -> None:
    tensors, _ = golden
    mask = sees(tensors[f"{name}/policy"][..., 0])
    torch.testing.assert_close(
        masked_softmax(tensors[f"{name}/scores"], mask), tensors[f"{name}/out"], rtol=1e-5, atol=1e-7
    )


def test_pruned_inference(golden: Any, network: tuple[str, Model, list[int]]) -> None:
    tensors, (name, model, places) = golden[0], network
    found = model.eval()(tensors[f"{name}/images"], want=("logits", "keep", "scores"))
    torch.testing.assert_close(found["logits"], tensors[f"{name}/eval.logits"], rtol=1e-4, atol=1e-5)
    for index in range(len(places)):
        theirs = tensors[f"{name}/eval.keep_original.{index}"].long()
        want = torch.zeros_like(found["keep"][:, index]).scatter(1, theirs, 1.0)
        torch.testing.assert_close(found["keep"][:, index], want, rtol=0, atol=0)
        best = found["scores"][:, index].gather(1, theirs)  # theirs are in the order of their scores
        assert bool((best.diff(dim=1) <= 0).all())


def test_training_with_their_noise(
    golden: Any, network: tuple[str, Model, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions, logits and features equal theirs; so the decisions' gradients meet the same masked attention."""
    tensors, (name, model, places) = golden[0], network
    noise = [tensors[f"{name}/train.gumbel.{index}"] for index in range(len(places))]
    left = iter([-side for pair in noise for side in (pair[..., 1], pair[..., 0])])
    # A Gumbel variable is minus the logarithm of an exponential one.
    monkeypatch.setattr(Tensor, "exponential_", lambda self: self.copy_(next(left).exp()))
    found = model.train()(tensors[f"{name}/images"], want=("logits", "keep", "tokens"))
    for index in range(len(places)):
        want = tensors[f"{name}/train.decision.{index}"]
        torch.testing.assert_close(found["keep"][:, index].detach(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["logits"], tensors[f"{name}/train.logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found["tokens"][:, 1:], tensors[f"{name}/train.features"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "dim", "heads", "ratio"),
    [
        *(("deit-256", 256, 4, ratio) for ratio in (0.5, 0.6, 0.7, 0.8, 0.9)),
        *(("deit-s", 384, 6, ratio) for ratio in (0.5, 0.6, 0.7, 0.8, 0.9)),
        ("deit-b", 768, 12, 0.7),
    ],
)
def test_published_costs(golden: Any, name: str, dim: int, heads: int, ratio: float) -> None:
    published, key = golden[1]["published_224"], f"{name}/{ratio}"
    keeps = {place: int(196 * ratio ** (index + 1)) for index, place in enumerate((3, 6, 9))}
    arch = dynamic_deit(dim, heads, keeps)
    assert (count(arch).macs, count(arch).params) == (published[key]["macs"], published[key]["params"])
    predictors = [part.params for part in parts(arch) if part.name.startswith("selections.")]
    assert sum(predictors) == published[key]["predictor_params"]
