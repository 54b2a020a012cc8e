"""Networks that tell numbers, in every form in which they are asked: all say them in units of theirs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitnas
from vitnas.arch import Arch, Block, Stage
from vitnas.cli import main
from vitnas.errors import UserError
from vitnas.exporting import export_onnx, export_program, load_timm, save_timm
from vitnas.exporting.card import CARD
from vitnas.exporting.precision import Judged, _other, export_precise
from vitnas.exporting.script import script_of
from vitnas.model.scale import Scale, scale_of
from vitnas.model.timm_cfg import take_images
from vitnas.predicting import Predictor, open_network
from vitnas.predicting.examine import Evaluation
from vitnas.testing import randomize_

SCALE = Scale((30.0, 1e5), (12.0, 4e4))  # the second has no form in half precision
NAMES = ["age", "income"]
IMAGES = {"mean": (0.4,) * 3, "std": (0.2,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
IMAGES["crop_mode"] = "center"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved network, its files, images and a table of what the network says of them, a little off."""
    root = tmp_path_factory.mktemp("numbers")
    arch = Arch(
        image_size=8,
        patch_size=4,
        num_classes=2,
        stages=(Stage(embed_dim=16, blocks=(Block(num_heads=2, head_dim=8, mlp_hidden=16),)),),
    )
    model = vitnas.build(arch).eval()
    randomize_(model, torch.Generator().manual_seed(0))
    take_images(model, IMAGES, NAMES, scale=SCALE)
    save_timm(model, root / "saved")
    for name, pixels in (("pixels", True), ("float", False)):
        export_onnx(model, root / f"{name}.onnx", exporter="legacy", pixels=pixels)
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        picture = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / "images" / f"{number}.png")
    told = Predictor(root / "saved").predict(sorted((root / "images").glob("*.png")))
    rows = [[Path(each.name).name, 0.9 * each.numbers["income"], each.numbers["age"] + 1] for each in told]
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "income", "age"], *rows])
    return root


@pytest.mark.slow
def test_every_form_tells_the_same_numbers(folder: Path) -> None:
    model: Any = load_timm(folder / "saved")
    assert (scale_of(model), model.pretrained_cfg["label_names"]) == (SCALE, NAMES)
    pictures = sorted((folder / "images").glob("*.png"))
    predictor = Predictor(model)
    wanted_NT = predictor.probabilities(pictures)
    arrays = [np.array(Image.open(path)) for path in pictures]
    images_NCHW = predictor.form.normalise(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))
    with torch.no_grad():
        np.testing.assert_allclose(wanted_NT, SCALE.restored(model(images_NCHW)), rtol=1e-6)
    assert abs(wanted_NT[:, 1].mean()) > 100 * abs(wanted_NT[:, 0].mean())
    for name in ("pixels.onnx", "float.onnx"):
        asked = Predictor(folder / name)
        assert isinstance(asked.network, torch.nn.Module)
        np.testing.assert_allclose(asked.probabilities(pictures), wanted_NT, rtol=1e-4)
        about = asked.network.session.get_modelmeta().custom_metadata_map  # type: ignore[union-attr, operator]
        assert json.loads(about["class_names"]) == NAMES
        (first,) = asked.predict(pictures[:1])
        assert (first.classes, list(first.numbers)) == ((), NAMES)
    program = torch.export.load(export_program(model, folder / "float.pt2")["path"])
    np.testing.assert_allclose(program.module()(images_NCHW).detach(), wanted_NT, rtol=1e-4)
    (folder / "predict.py").write_text(script_of(folder / "pixels.onnx"))
    words = [sys.executable, str(folder / "predict.py"), str(pictures[0])]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert (said[1], said[3]) == ("age", "income")
    assert [float(said[2]), float(said[4])] == pytest.approx(wanted_NT[0], rel=1e-3)
    card = (folder / "saved" / CARD).read_text()
    assert "2 numbers of an image" in card
    assert "## Numbers, in order\n\nage, income." in card
    code = card.split("```python\n")[1].split("```")[0]
    assert "numbers = logits * torch.tensor([12.0, 40000.0]) + torch.tensor([30.0, 100000.0])" in code
    assert "image-classification" not in card
    assert "import timm, torch" in code


def test_commands_tell_and_score_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "told.csv"
    assert main(["predict", str(folder / "pixels.onnx"), str(folder / "images"), f"out={out}"]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["image", "age", "income", "error"]
    assert len(rows) == 8
    assert main(["predict", str(folder / "saved"), str(folder / "images")]) == 0
    assert f"age {float(rows[0]['age']):.5g}" in capsys.readouterr().out
    table = f"data.labels={folder / 'table.csv'}"
    words = ["evaluate", str(folder / "float.onnx"), f"data.dataset={folder / 'images'}", table]
    assert main([*words, f"folder={tmp_path}"]) == 0, capsys.readouterr().err
    found, said = Evaluation.read(tmp_path), capsys.readouterr().out
    age, income = found.numbers
    assert (age.name, income.name) == ("age", "income"), "as the network has them, not as the table has"
    assert age.mae == pytest.approx(1, rel=1e-3)
    assert found.score.error is not None
    assert income.mae == pytest.approx(
        0.1 / 0.9 * np.mean([float(r["income"]) * 0.9 for r in rows]), rel=0.01
    )
    assert found.score.accuracy == pytest.approx((age.r2 + income.r2) / 2)
    assert said.startswith(f"R² {found.score.accuracy:.3f} (95 % CI ")
    assert "accuracy" not in said.lower()
    assert "mean absolute error 1 (age)" in said
    assert not (tmp_path / "confusion.csv").exists()
    assert found.mistakes[0].true.startswith("age ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["data.target_key=age"], "images have the numbers age and MODEL tells age, income; both must be"),
        (["data.labels=true"], "label_kind is 'numbers' and the images of "),
    ],
)
def test_other_labels_are_refused(
    folder: Path, tmp_path: Path, fields: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"data.labels": str(folder / "table.csv")} | dict(field.split("=") for field in fields)
    words = ["evaluate", str(folder / "saved"), f"data.dataset={folder / 'images'}", f"folder={tmp_path}"]
    assert main([*words, *(f"{name}={text}" for name, text in given.items())]) == 2
    said = capsys.readouterr().err
    assert any(part in said for part in message.split("|")), said


def test_a_network_of_classes_is_not_held_against_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = load_timm(folder / "saved")
    take_images(model, IMAGES, NAMES)
    save_timm(model, tmp_path / "classes")
    words = ["evaluate", str(tmp_path / "classes"), f"data.dataset={folder / 'images'}", f"folder={tmp_path}"]
    more = [f"data.labels={folder / 'table.csv'}", "data.label_kind=numbers", "data.target_key=[age,income]"]
    assert main([*words, *more]) == 2
    assert "have numbers and MODEL tells classes; both must be the same." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_are_judged_by_what_they_explain(
    folder: Path, tmp_path: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_timm(folder / "saved")
    images_NCHW = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 2.9)
    with torch.no_grad():
        told_NT = model(images_NCHW)
    judged = Judged([(images_NCHW, told_NT + 0.1)], has_labels=True)
    monkeypatch.setattr("vitnas.exporting.precision.why_not", lambda beside: "")  # this machine's clock
    path = tmp_path / "other.onnx"
    record, beside, reason = export_precise(model, path, judged, precision, target="onnxruntime", opset=20)
    assert beside is not None
    assert not reason
    assert beside.numbers
    assert beside.has_labels
    assert 0.9 < beside.accuracy <= 1
    assert record["top1_agreement"] is None
    assert str(beside).startswith("R² 0.9")
    answers = Predictor(path).probabilities([np.zeros((8, 8, 3), np.uint8)])
    np.testing.assert_allclose(
        answers, Predictor(model).probabilities([np.zeros((8, 8, 3), np.uint8)]), rtol=0.02, atol=0.5
    )
    assert _other(told_NT, told_NT, "numbers") == 0
    assert _other(told_NT * 0, told_NT, "numbers") > 0.9


def test_features_and_numbers_are_no_classes(folder: Path) -> None:
    network: Any = open_network(str(folder / "pixels.onnx"))
    assert network.num_classes == 2
    assert scale_of(network) == SCALE
    with pytest.raises(UserError, match="there is no file"):
        open_network(str(folder / "none.onnx"))
