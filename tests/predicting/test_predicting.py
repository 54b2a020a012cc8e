"""Any trained network is asked about images, and held against labels, by commands and from Python."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitnas
from vitnas.arch import Arch, Block, Stage
from vitnas.cli import main
from vitnas.data import Readings
from vitnas.errors import UserError
from vitnas.exporting import export_onnx, load_timm, save_timm
from vitnas.model import build
from vitnas.model.timm_cfg import SEVERAL, take_images
from vitnas.predicting import Predictor, open_network
from vitnas.predicting.examine import Evaluation, matched_classes
from vitnas.testing import randomize_

CLASSES = ["ant", "bee", "cat"]
IMAGES = {
    "mean": (0.4,) * 3,
    "std": (0.2,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved network, files of it, and images in folders of its classes, one of which is absent."""
    folder = tmp_path_factory.mktemp("predicting")
    arch = Arch(
        image_size=8,
        patch_size=4,
        num_classes=3,
        stages=(Stage(embed_dim=16, blocks=(Block(num_heads=2, head_dim=8, mlp_hidden=16),)),),
    )
    model = build(arch).eval()
    randomize_(model, torch.Generator().manual_seed(0))
    take_images(model, IMAGES, CLASSES)
    save_timm(model, folder / "saved")
    for name, pixels in (("pixels", True), ("float", False)):
        export_onnx(model, folder / f"{name}.onnx", exporter="legacy", pixels=pixels)
    generator = np.random.default_rng(0)
    for name in ("cat", "bee"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(5):
            size = (9 + number, 12, 3) if number else (8, 8, 3)
            picture = Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8))
            picture.save(folder / "images" / name / f"{number}.png")
    return folder


def files(trained: Path) -> list[Path]:
    return sorted((trained / "images").rglob("*.png"))


@pytest.fixture(scope="module")
def shares(trained: Path) -> np.ndarray[Any, Any]:
    """Probabilities by the saved network, images prepared by timm's own transform."""
    import timm

    model: Any = load_timm(trained / "saved")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    rows = []
    with torch.no_grad():
        for file in files(trained):
            picture = Image.open(file)
            if picture.size == (8, 8):  # of the final size already: not resized
                small = timm.data.create_transform(
                    (3, 8, 8), crop_pct=1.0, mean=IMAGES["mean"], std=IMAGES["std"]
                )
                rows.append(model(small(picture)[None]).softmax(1))
            else:
                rows.append(model(transform(picture)[None]).softmax(1))
    found: np.ndarray[Any, Any] = torch.cat(rows).numpy()
    return found


@pytest.mark.parametrize("name", ["saved", "pixels.onnx", "float.onnx"])
def test_all_forms_of_a_network_say_the_same(name: str, trained: Path, shares: np.ndarray[Any, Any]) -> None:
    predictor = vitnas.Predictor(trained / name, batch_size=3)
    assert predictor.class_names == CLASSES
    np.testing.assert_allclose(predictor.probabilities(files(trained)), shares, atol=0.01)
    found = predictor.predict(files(trained), top=2)
    for prediction, row in zip(found, shares, strict=True):
        order = row.argsort()[::-1][:2]
        assert prediction.classes == tuple(CLASSES[i] for i in order)
        np.testing.assert_allclose(prediction.probabilities, row[order], atol=0.01)
    arrays = [np.asarray(Image.open(file)) for file in files(trained)]
    np.testing.assert_array_equal(predictor.probabilities(arrays), predictor.probabilities(files(trained)))


def test_the_command_writes_what_is_asked_for(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["predict", str(trained / "pixels.onnx"), str(trained / "images")]
    want = Predictor(trained / "saved").predict(files(trained), top=2)
    assert main([*words, "--top", "2", "--out", "csv"]) == 0
    with open("predictions.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["image"], row["class1"], row["class2"]) for row in rows] == [
        (each.name, *each.classes) for each in want
    ]
    assert main([*words, "top=2", "out=some/rows.json"]) == 0
    assert [row["classes"] for row in json.loads(Path("some/rows.json").read_text())] == [
        [*each.classes] for each in want
    ]
    pytest.importorskip("pyarrow")
    assert main([*words, "top=2", "out=parquet"]) == 0
    from pyarrow import parquet

    assert parquet.read_table("predictions.parquet").column("name").to_pylist() == [
        each.name for each in want
    ]
    capsys.readouterr()
    assert main(words) == 0
    assert f"{want[0].name}  {want[0].classes[0]}" in capsys.readouterr().out
    assert main([*words, "out=xml"]) == 2
    assert "it must be one of csv, json, parquet" in capsys.readouterr().err


def test_an_unreadable_image_is_named_and_the_others_are_answered(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no image")
    (tmp_path / "in" / "b.png").write_bytes(files(trained)[0].read_bytes())
    out = tmp_path / "rows.csv"
    assert main(["predict", str(trained / "saved"), str(tmp_path / "in"), f"out={out}"]) == 2
    assert "1 of 2 images cannot be read (such as" in capsys.readouterr().err
    first, second = list(csv.DictReader(out.read_text().splitlines()))
    assert first["class1"] == ""
    assert "cannot be read" in first["error"]
    assert second["class1"] in CLASSES
    assert second["error"] == ""


@pytest.mark.parametrize("name", ["saved", "pixels.onnx"])
def test_classes_are_matched_by_name(
    name: str,
    trained: Path,
    shares: np.ndarray[Any, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["evaluate", str(trained / name), f"data.dataset={trained / 'images'}", f"folder={tmp_path}"]
    assert main(words) == 0
    found = Evaluation.read(tmp_path)
    true = [CLASSES.index(file.parent.name) for file in files(trained)]
    said = shares.argmax(1)
    assert (found.split, found.score.n) == ("all", 10)
    assert found.score.accuracy == pytest.approx(np.mean(said == true))
    counts = {each.name: (each.n, each.said, each.right) for each in found.classes}
    for number, label in enumerate(CLASSES):
        mine = np.array(true) == number
        assert counts[label] == (mine.sum(), (said == number).sum(), (mine & (said == number)).sum())
    rows = list(csv.reader((tmp_path / "confusion.csv").read_text().splitlines()))
    assert rows[0][1:] == CLASSES
    for number, row in enumerate(rows[1:]):
        assert [int(cell) for cell in row[1:]] == [
            sum(t == number and s == other for t, s in zip(true, said, strict=True)) for other in range(3)
        ]
    wrong = sum(t != s for t, s in zip(true, said, strict=True))
    assert 0 < len(found.mistakes) <= wrong
    assert "accuracy" in capsys.readouterr().out
    assert not Readings.exists(tmp_path)  # all of a dataset without splits is nobody's test split
    for split in ("train", "test"):
        shutil.copytree(trained / "images", tmp_path / "set" / split)
    words[2] = f"data.dataset={tmp_path / 'set'}"
    for times in (1, 2):
        assert main(words) == 0
        assert Evaluation.read(tmp_path).split == "test"
        assert len(Readings.read(tmp_path).readings) == times


def test_of_a_runs_own_images_those_are_taken_that_its_models_have_not_seen(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, images = tmp_path / "run", trained / "images"
    shutil.copytree(trained / "saved", run / "models" / "chosen")
    (run / "run.yaml").write_text(f"recipe: tour\ndata:\n  dataset: {images}\n")
    monkeypatch.chdir(trained)
    for model in (run / "models" / "chosen", f"{run}@chosen"):
        for dataset in ([f"data.dataset={images}"], ["data.dataset=images"]):
            assert main(["evaluate", str(model), *dataset, f"folder={tmp_path / 'out'}"]) == 0
            found = Evaluation.read(tmp_path / "out")
            assert (found.split, found.score.n) == ("test", 2)
            assert "MODEL has not seen the test images: these are taken" in capsys.readouterr().out
    shutil.copytree(images, tmp_path / "others")
    assert main(["evaluate", f"{run}@chosen", f"data.dataset={tmp_path / 'others'}"]) == 0
    assert "on 10 images (all)" in capsys.readouterr().out
    assert len(Readings.read(run).readings) == 4


def test_what_cannot_be_evaluated_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("cat", "cow"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / label / f"{number}.png")
    words = ["evaluate", str(trained / "saved"), f"folder={tmp_path}"]
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(files(trained)):
        shutil.copy(file, flat / f"{number}.png")
    for more, sentence in (
        ([f"data.dataset={flat}"], "needs labels, and these images have none"),
        ([f"data.dataset={tmp_path / 'images'}"], "the class 'cow', which MODEL does not know"),
        ([f"data.dataset={tmp_path / 'images'}", "split=holdout"], "has no validation split"),
        ([f"data.dataset={tmp_path / 'images'}", "data.size=3"], "there is no field 'data.size'"),
        ([], "`vitnas evaluate` takes a run folder, or a network and data.dataset=IMAGES"),
    ):
        assert main([*words, *more]) == 2
        assert sentence in capsys.readouterr().err
    assert matched_classes([], ["a", "b"], 2) is None
    with pytest.raises(UserError, match=r"the images have 2 classes and MODEL 3, which it does not name"):
        matched_classes([], ["a", "b"], 3)
    with pytest.raises(UserError, match=r"there is no file '.*none.onnx'"):
        open_network(str(tmp_path / "none.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"no file")
    with pytest.raises(UserError, match=r"bad.onnx cannot be read by ONNX Runtime"):
        open_network(str(tmp_path / "bad.onnx"))


def test_several_classes_are_told_each_by_itself(trained: Path, tmp_path: Path) -> None:
    model: Any = load_timm(trained / "saved")
    take_images(model, IMAGES, CLASSES, several=True)
    save_timm(model, tmp_path / "several")
    again: Any = load_timm(tmp_path / "several")
    assert again.pretrained_cfg[SEVERAL] is True
    export_onnx(again, tmp_path / "model.onnx", exporter="legacy", pixels=True)
    with torch.no_grad():
        want = again(
            Predictor(again).form.normalise(torch.full((1, 3, 8, 8), 7, dtype=torch.uint8))
        ).sigmoid()
    for network in (again, tmp_path / "model.onnx"):
        got = Predictor(network).probabilities([np.full((8, 8, 3), 7, np.uint8)])
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
