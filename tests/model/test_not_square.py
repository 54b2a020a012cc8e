"""Networks of images whose height and width differ: extraction, export, features, and weights for other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from vitnas.arch import Arch, Block, Stage
from vitnas.exporting import export_onnx, export_program, save_timm
from vitnas.extraction import extract
from vitnas.measure.convert import input_shape
from vitnas.model import build
from vitnas.space import autoformer, mixer_space, vit_resnas, vitas
from vitnas.supernet import Supernet
from vitnas.testing import randomize_

SIZE = (16, 48)
SMALL: dict[str, Any] = {"image_size": SIZE, "num_classes": 5, "in_chans": 3}
MADE: dict[str, Any] = {
    "autoformer": lambda: autoformer("micro", patch_size=4, **SMALL),
    "mixers": lambda: mixer_space("micro", patch_size=4, **SMALL),
    "vitas": lambda: vitas("micro", patch_sizes=(4, 8), num_slots=3, **SMALL),
    "vit_resnas": lambda: vit_resnas("micro", patch_size=2, **SMALL),
}
MIXED = Arch(
    image_size=SIZE,
    patch_size=4,
    num_classes=5,
    stages=(
        Stage(
            embed_dim=24,
            blocks=tuple(
                Block(num_heads=3, head_dim=8, mlp_hidden=20, mixer=word, mixer_size=size)
                for word, size in (("linformer", 4), ("token_mlp", 7), ("long_short", 3), ("softmax", None))
            ),
        ),
    ),
)
STAGED = Arch(
    image_size=SIZE,
    patch_size=4,
    num_classes=5,
    stages=tuple(
        Stage(embed_dim=dim, blocks=(Block(num_heads=2, head_dim=8, mlp_hidden=20),)) for dim in (16, 24)
    ),
    relative_position=3,
)


def made(arch: Arch, seed: int = 0) -> Any:
    model = build(arch, generator=torch.Generator().manual_seed(seed)).eval()
    randomize_(model, torch.Generator().manual_seed(seed))
    return model


def images(arch: Arch, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *arch.input_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", MADE)
def test_spaces_extract_bit_for_bit(kind: str) -> None:
    space = MADE[kind]()
    assert space.image_size == SIZE
    supernet = Supernet(space, generator=torch.Generator().manual_seed(0)).eval()
    randomize_(supernet, torch.Generator().manual_seed(1))
    for arch in (space.smallest(), space.middle(), space.largest()):
        with torch.no_grad():
            want = supernet(images(arch), arch)
            torch.testing.assert_close(extract(supernet, arch).eval()(images(arch)), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "arch", [pytest.param(MIXED, id="mixers"), pytest.param(STAGED, id="stages", marks=pytest.mark.slow)]
)
def test_it_is_exported(arch: Arch, tmp_path: Path) -> None:
    model = made(arch)
    assert input_shape(model) == (3, *SIZE)
    exporter: Any = None if arch.relative_position else "legacy"  # the quicker one fixes their batch
    assert export_onnx(model, tmp_path / "a.onnx", images(arch, 3), exporter=exporter)["max_abs_diff"] < 1e-4
    assert export_program(model, tmp_path / "a.pt2", images(arch, 3))["max_abs_diff"] < 1e-4


def test_maps_have_rows_and_columns() -> None:
    model = made(STAGED)
    maps = model.forward_intermediates(images(STAGED), intermediates_only=True)
    assert [tuple(item.shape[1:]) for item in maps] == [(16, 4, 12), (24, 2, 6)]
    seen = model.get_intermediate_layers(images(STAGED), n=[1], reshape=True)
    torch.testing.assert_close(seen[0], maps[1], rtol=0, atol=0)
    assert model.get_intermediate_layers(images(STAGED))[0].shape == (2, 12, 24)


@pytest.mark.parametrize("size", [(32, 48), 16, (16, 48)], ids=str)
@pytest.mark.parametrize("arch", [MIXED, STAGED], ids=["mixers", "stages"])
def test_saved_weights_load_at_another_size(arch: Arch, size: Any, tmp_path: Path) -> None:
    """As `set_input_size` resamples them: positions of every stage and weights per token."""
    model = made(arch)
    save_timm(model, tmp_path / "saved")
    name = f"local-dir:{tmp_path / 'saved'}"
    loaded = timm.create_model(name, pretrained=True, img_size=size).eval()
    model.set_input_size(img_size=size)
    assert loaded.arch == model.arch
    torch.testing.assert_close(loaded(images(model.arch)), model(images(model.arch)), rtol=0, atol=0)
    other = timm.create_model(name, pretrained=True, img_size=size, num_classes=7).eval()
    assert other(images(model.arch)).shape == (2, 7)
    features = other.forward_features(images(model.arch))
    torch.testing.assert_close(features, model.forward_features(images(model.arch)), rtol=0, atol=0)
