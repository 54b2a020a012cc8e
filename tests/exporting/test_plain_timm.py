"""Archs that timm can say are written as timm's own networks, with the same answers; of others vitnas is needed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from export_help import randomize
from timm.models.vision_transformer import VisionTransformer

from vitnas.arch import Arch, Block, Stage
from vitnas.exporting import load_timm, save_timm
from vitnas.exporting.card import licence_in
from vitnas.model import Model, build
from vitnas.model.timm_cfg import DATA_KEYS
from vitnas.runs import read_json

ARCH = Arch(
    image_size=8,
    patch_size=4,
    in_chans=3,
    num_classes=3,
    stages=(Stage(embed_dim=16, blocks=(Block(num_heads=2, head_dim=8, mlp_hidden=24),) * 2),),
)
PLAIN: list[dict[str, Any]] = [
    {},
    {"norm_eps": 1e-5, "class_token": False, "global_pool": "avg", "fc_norm": True},
    {"reg_tokens": 2, "layer_scale": True, "qk_norm": True, "act": "quick_gelu", "image_size": (8, 12)},
    {"distill_token": True},
    {"pre_norm": True, "position": "none", "num_classes": 0},
]
OURS: list[dict[str, Any]] = [{"relative_position": 2}, {"norm_eps": 1e-3}, {"act": "swiglu"}]


def model_of(**changes: Any) -> Any:
    model = randomize(build(replace(ARCH, **changes))).eval()
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), images_known=True)
    return model


@pytest.mark.parametrize("changes", PLAIN)
def test_timm_alone_gives_the_same_answers(changes: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(**changes)
    names = list("abc")[: model.num_classes] or None
    record = save_timm(model, tmp_path / "saved", class_names=names)
    assert record["needs_import"] is None
    theirs = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert isinstance(theirs, VisionTransformer)
    images = torch.randn(3, *model.arch.input_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=0, atol=0)
    assert list(theirs.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
    again: Any = load_timm(tmp_path / "saved")
    assert isinstance(again, Model)
    assert again.arch == model.arch
    assert again.pretrained_cfg.get("label_names") == names
    assert "import vitnas" not in (tmp_path / "saved" / "README.md").read_text()
    save_timm(again, tmp_path / "second")  # names and constants survive
    first, second = (read_json(tmp_path / name / "config.json") for name in ("saved", "second"))
    for key in ("architecture", "model_args", "vitnas_arch", "label_names"):
        assert first.get(key) == second.get(key)
    assert all(first["pretrained_cfg"][key] == second["pretrained_cfg"][key] for key in DATA_KEYS)


@pytest.mark.parametrize("changes", OURS)
def test_what_timm_has_not_says_that_vitnas_is_needed(changes: dict[str, Any], tmp_path: Path) -> None:
    record = save_timm(model_of(**changes), tmp_path)
    assert record["needs_import"] == "vitnas"
    card = (tmp_path / "README.md").read_text()
    assert "import timm, vitnas" in card
    assert "timm alone has no such network" in card


def test_a_licence_that_was_chosen_stays(tmp_path: Path) -> None:
    model = model_of()
    save_timm(model, tmp_path / "saved")
    card = tmp_path / "saved" / "README.md"
    assert licence_in(card) == "unknown"
    card.write_text(card.read_text().replace("license: unknown", "license: cc-by-4.0"))
    save_timm(model, tmp_path / "saved")
    assert licence_in(card) == "cc-by-4.0"
    assert "Nobody has chosen" not in card.read_text()


@pytest.mark.slow
def test_a_process_without_vitnas_loads_it(tmp_path: Path) -> None:
    model = model_of()
    save_timm(model, tmp_path / "saved")
    torch.save(images := torch.randn(2, 3, 8, 8), tmp_path / "images.pt")
    code = (
        "import sys, timm, torch\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "with torch.no_grad(): answer = model(torch.load(sys.argv[2]))\n"
        "assert not any(name.startswith('vitnas') for name in sys.modules)\n"
        "torch.save(answer, sys.argv[3])\n"
    )
    paths = (tmp_path / "saved", tmp_path / "images.pt", tmp_path / "answer.pt")
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "answer.pt"), model(images), rtol=0, atol=0)
