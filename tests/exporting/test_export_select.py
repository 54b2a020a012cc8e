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
}


def model_of(selector: str) -> Model:
    """Three blocks on 16 px images, which 16, 9 and 4 patches enter."""
    like = tiny_model(relative_position=0).arch
    first, second = like.blocks
    blocks = (first, replace(second, keep=9), replace(first, keep=4))
    if selector == "patch_slimming":  # and the class token alone goes on
        blocks = (*blocks[:2], replace(first, keep=0))
    stages = (replace(like.stages[0], blocks=blocks),)
    return randomize(build(replace(like, stages=stages, selector=selector, **MODELS[selector])))


SLOW_DYNAMIC = pytest.param("dynamic_patch_slimming", marks=pytest.mark.slow)
SLOW = [pytest.param(selector, marks=pytest.mark.slow) for selector in MODELS if selector != "predictor"]


@pytest.mark.parametrize("selector", ["predictor", *SLOW])
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
    kept = [shapes[node.output[0]] for node in graph.node if node.op_type == "TopK"]
    assert [0, 9] in kept  # images are open, patches are not
    if selector != "patch_slimming":
        assert [0, 4] in kept


@pytest.mark.parametrize("selector", ["patch_slimming", "predictor", "fixed", "attention", SLOW_DYNAMIC])
def test_torch_export_drops_patches_at_any_batch(selector: str, tmp_path: Path) -> None:
    record = export_program(model_of(selector), tmp_path / "model.pt2", images(12))
    assert record["batch_sizes"] == [1, 3, 8]
    assert record["passed"]
    assert record["max_abs_diff"] < 1e-5


@pytest.mark.parametrize("selector", ["predictor", "attention"])
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
