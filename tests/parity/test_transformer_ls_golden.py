"""The authors' Transformer-LS for images: logits and features of networks, outputs of single layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.mixers import MIXERS, Mixer
from vitnas.mixers.long_short import LongShort, folded_rows
from vitnas.model import PUBLISHED, Model, build
from vitnas.model.transformer_ls import transformer_ls
from vitnas.model.transformer_ls_official import PARTS, load_transformer_ls, transformer_ls_tensors

NETWORKS = ("four_stage", "window7", "absolute_positions", "no_global_in_ls")
LAYERS = (
    "layer_w4_r4_g1",
    "layer_w7_r8_g1",
    "layer_small_kv",
    "layer_w3_r2_g0",
    "layer_full_g1",
    "layer_full_g0",
)
Golden = tuple[dict[str, Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    with safe_open(shared / "golden" / "transformer_ls.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])


def weights_of(golden: Golden, name: str) -> dict[str, Tensor]:
    start = f"{name}/weights."
    return {key.removeprefix(start): tensor for key, tensor in golden[0].items() if key.startswith(start)}


def network(golden: Golden, name: str) -> Model:
    config = golden[1]["networks"][name]
    arch = transformer_ls(config["arch"], image_size=config["img_size"], num_classes=config["classes"])
    assert [grid for grid, _ in arch.grids] == config["grid_per_stage"]
    return load_transformer_ls(weights_of(golden, name), arch)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, golden: Golden) -> None:
    model, tensors = network(golden, name), golden[0]
    with torch.no_grad():
        found = model(tensors[f"{name}/images"], want=("logits", "pooled"))
    torch.testing.assert_close(found["logits"], tensors[f"{name}/logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["pooled"], tensors[f"{name}/features"], rtol=1e-5, atol=1e-5)
    if name != "absolute_positions":  # theirs are rows and columns, ours are written out
        assert count(model.arch).params == golden[1]["networks"][name]["params"]


def layer(golden: Golden, name: str) -> Mixer:
    config, weights = golden[1]["networks"][name], weights_of(golden, name)
    side, nglo, heads = config["side"], config["nglo"], config["num_heads"]
    options: dict[str, Any] = {"grid": (side, side), "num_prefix_tokens": nglo}
    ours = {
        f"{PARTS[f'attn.{part}'][5:]}.{leaf}": tensor
        for name, tensor in weights.items()
        for part, _, leaf in (name.rpartition("."),)
        if f"attn.{part}" in PARTS
    }
    table = weights.get("local_relative_position_bias_table")
    if config["layer"] == "AttentionLS":
        made: Any = LongShort(
            config["dim"],
            heads,
            size=config["dp_rank"],
            window=config["w"],
            window_bias="step" if table is None else "folded",
            **options,
        )
        ours["bias"] = torch.zeros_like(made.bias) if table is None else table
    else:
        made = MIXERS["softmax"](config["dim"], heads, rel_pos_bias="table", **options)
        assert table is not None
        if nglo:
            ends, own = weights["g2l_relative_position_bias"], weights["g2g_relative_position_bias"]
            table = torch.cat([table, ends[..., 0], own[..., 0].T])
        ours["rel_pos.relative_position_bias_table"] = table
    made.load_state_dict(ours)
    mixer: Mixer = made.eval()
    return mixer


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, golden: Golden) -> None:
    tensors = golden[0]
    with torch.no_grad():
        found = layer(golden, name)(tensors[f"{name}/x"])
    torch.testing.assert_close(found, tensors[f"{name}/y"], rtol=1e-5, atol=1e-5)


def test_the_folded_index_is_theirs(golden: Golden) -> None:
    """Which row of the table each query and key meet, for every window that the numbers have."""
    for name in ("layer_w4_r4_g1", "layer_w7_r8_g1"):
        mixer: Any = layer(golden, name)
        rows = torch.arange(folded_rows(mixer.window), dtype=torch.float32)
        mixer.bias.data = rows[:, None].expand(-1, mixer.num_heads).clone()
        index = golden[0][f"{name}/relative_position_index"]
        bias_AWS = mixer._steps_bias(mixer.window, mixer.window, index.shape[1], rows)
        torch.testing.assert_close(bias_AWS[0], index.float(), rtol=0, atol=0)


@pytest.mark.parametrize("file", ["model.safetensors", "model_best.pth"])
def test_timm_takes_a_file_of_them(file: str, golden: Golden, tmp_path: Path) -> None:
    """Weights alone, or as their code saves them."""
    want, weights = network(golden, "four_stage"), weights_of(golden, "four_stage")
    if file.endswith(".pth"):
        torch.save({"epoch": 299, "net": weights}, tmp_path / file)
    else:
        save_file(weights, tmp_path / file)
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / file)}}
    model = timm.create_model("vitnas_arch", arch=want.arch, **options).eval()
    images = golden[0]["four_stage/images"]
    with torch.no_grad():
        torch.testing.assert_close(model(images), want(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    "mistake", ["bias by step", "no second norm", "class token of the stage before", "mean of all"]
)
def test_the_numbers_would_show_a_mistake(mistake: str, golden: Golden) -> None:
    name = "absolute_positions" if mistake == "mean of all" else "window7"
    model: Any = network(golden, name)
    images, logits = golden[0][f"{name}/images"], golden[0][f"{name}/logits"]
    for block in model.blocks:
        if mistake == "bias by step" and isinstance(block.attn, LongShort):
            block.attn.bias.data = block.attn.bias.data.flip(0)
        elif mistake == "no second norm" and isinstance(block.attn, LongShort):
            block.attn.norm_dynamic = torch.nn.Identity()
    if mistake.startswith("class token"):
        model.reductions[0].cls_token.data.zero_()
    with torch.no_grad():
        found = (
            model(images) if mistake != "mean of all" else model.head(model.forward_features(images).mean(1))
        )
    assert (found - logits).abs().max() > 1e-4


def test_every_name_is_known(golden: Golden) -> None:
    weights, config = weights_of(golden, "window7"), golden[1]["networks"]["window7"]
    arch = transformer_ls(config["arch"], image_size=112, num_classes=10)
    buffers = {"layer1.1.attn.relative_position_index": torch.zeros(2)}
    assert set(transformer_ls_tensors(weights | buffers, arch)) == set(
        build(arch, device="meta").state_dict()
    )
    with pytest.raises(
        UserError, match=r"has 1 names that a Transformer-LS lacks \(layer1\.1\.attn\.other\)"
    ):
        transformer_ls_tensors(weights | {"layer1.1.attn.other": torch.zeros(1)}, arch)


@pytest.mark.parametrize("name", ["medium_224", "base_224", "medium_384"])
def test_published_counts(name: str, golden: Golden) -> None:
    """Theirs are of their code, in which the class token's value is multiplied without a matrix product."""
    want = golden[1]["published"][name]
    arch = PUBLISHED[f"transformer_ls_{name.removesuffix('_224')}"]
    assert transformer_ls(want["arch"], image_size=want["img_size"]) == arch
    cost = count(arch)
    assert cost.params == want["params"]
    of_class_values = sum(
        rows * cols * block.inner_dim
        for stage, (rows, cols) in zip(arch.stages, arch.grids, strict=True)
        for block in stage.blocks
        if block.mixer == "long_short"
    )
    assert cost.macs - of_class_values == want["macs"]
