"""Exported files of Models that have the parts of pretrained networks give the Models' answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_help import images, tiny_model

from vitnas.exporting import export_model
from vitnas.model import build
from vitnas.testing import randomize_

PARTS: dict[str, dict[str, Any]] = {
    "tokens and norms": {
        "reg_tokens": 2, "no_embed_class": True, "pre_norm": True, "layer_scale": True, "qk_norm": True,
        "scale_mlp_norm": True, "act": "swiglu", "qkv_bias": "qv",
    },
    "attention pooling": {"global_pool": "map", "pool_num_heads": 2, "pool_mlp_hidden": 12, "act": "quick_gelu"},
    "dinov3": {"position": "rotary_dinov3", "act": "swiglu_packed"},
    "eva": {"position": "learned_rotary_2d", "rotary_grid": 7, "act": "gelu_tanh"},
    "table": {"rel_pos_bias": "table", "act": "silu"},
    "mlp": {"rel_pos_bias": "mlp"},
}  # fmt: skip


QUICK = ("tokens and norms", "pt2")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        pytest.param(name, suffix, marks=[] if (name, suffix) == QUICK else pytest.mark.slow)
        for name in PARTS
        for suffix in ("onnx", "pt2")
    ],
)
def test_the_file_gives_the_models_answers(name: str, suffix: str, tmp_path: Path) -> None:
    model = build(replace(tiny_model(relative_position=0).arch, **PARTS[name])).eval()
    randomize_(model, torch.Generator().manual_seed(0))
    record = export_model(model, tmp_path / f"model.{suffix}", images(9))
    assert record["passed"]
    assert record["max_abs_diff"] < 1e-5
    assert record["batch_sizes"] == [1, 3, 5]
