"""Exported files of Models that keep fewer patches: top-k with a constant k, any batch, and timm's folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_help import images, randomize, tiny_model

from vitnas.arch import Arch
from vitnas.exporting import export_onnx, load_timm, save_timm
from vitnas.exporting.torch_export import export_program
from vitnas.model import Model, build

MODELS: dict[str, dict[str, Any]] = {
    "patch_slimming": {"position": "rotary_2d"},
    "dynamic_patch_slimming": {},
    "predictor": {"position": "rotary_2d"},
    "fixed": {"relative_position": 2},
    "attention": {},
    "evit": {"position": "rotary"},
    "merge": {"class_token": False, "global_pool": "avg"},
    "pool": {},
    "random": {},
    "first": {},
}


def model_of(selector: str) -> Model:
    """Three blocks on 16 px images, which 16, 9 and 4 patches enter, or of those that pool 16, 4 and 1."""
    like = tiny_model(relative_position=0).arch
    first, second = like.blocks
    keeps = (4, 1) if selector == "pool" else (9, 4)
    if selector == "patch_slimming":  # and the class token alone goes on
        keeps = (9, 0)
    blocks = (first, replace(second, keep=keeps[0]), replace(first, keep=keeps[1]))
    stages = (replace(like.stages[0], blocks=blocks),)
    return randomize(build(replace(like, stages=stages, selector=selector, **MODELS[selector])))


QUICK = "attention"


@pytest.mark.parametrize(
    "selector", [QUICK, *(pytest.param(word, marks=pytest.mark.slow) for word in MODELS if word != QUICK)]
)
def test_onnx_drops_patches_at_any_batch(selector: str, tmp_path: Path) -> None:
    model, path = model_of(selector), tmp_path / "model.onnx"
    record = export_onnx(model, path, images(12), exporter="dynamo")
    assert record["batch_sizes"] == [1, 3, 8]
    assert record["passed"]
    assert record["max_abs_diff"] < 1e-4
    assert record["params_equal"]
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path)), data_prop=True).graph
    shapes = {
        item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim] for item in graph.value_info
    }
    normed = {tuple(shapes[node.output[0]]) for node in graph.node if node.op_type == "LayerNormalization"}
    prefix, patches = model.num_prefix_tokens, (16, *(each.keep for each in model.selections.values()))
    assert normed >= {(0, prefix + left, 24) for left in patches}  # images are open, patches are not
    assert all(shape[0] == 0 and all(shape[1:]) for shape in normed)


@pytest.mark.slow
@pytest.mark.parametrize("selector", MODELS)
def test_torch_export_drops_patches_at_any_batch(selector: str, tmp_path: Path) -> None:
    record = export_program(model_of(selector), tmp_path / "model.pt2", images(12))
    assert record["batch_sizes"] == [1, 3, 8]
    assert record["passed"]
    assert record["max_abs_diff"] < 1e-5


@pytest.mark.parametrize("selector", ["predictor", "attention", "pool"])
def test_the_legacy_exporter_drops_patches_too(selector: str, tmp_path: Path) -> None:
    record = export_onnx(model_of(selector), tmp_path / "model.onnx", images(12), exporter="legacy")
    assert record["batch_sizes"] == [1, 3, 8]
    assert record["passed"]


@pytest.mark.parametrize("selector", MODELS)
def test_timm_gives_back_the_same_model(selector: str, tmp_path: Path) -> None:
    model = model_of(selector).eval()
    with torch.no_grad():
        for name, worth in model.named_buffers():  # places that somebody found, not those it began with
            if name.endswith(".worth"):
                worth.copy_(worth.flip(0))
        save_timm(model, tmp_path / "folder")
        again = load_timm(tmp_path / "folder")
        assert isinstance(again, Model)
        assert Arch.from_json(again.arch.to_json()) == model.arch
        torch.testing.assert_close(again.eval()(images(3)), model(images(3)), rtol=0, atol=0)
