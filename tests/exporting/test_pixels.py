"""Files that take pixels: they prepare images as training does, or are refused; what is known of images travels."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_help import images, tiny_model, tiny_timm
from PIL import Image
from timm.data import create_transform

from vitnas.data import Data, DataConfig, TrainBatches
from vitnas.data.config import Augment
from vitnas.data.images import Form
from vitnas.errors import UserError
from vitnas.exporting import ExportError, export_model, export_onnx, load_timm, save_timm
from vitnas.exporting.describe import describe
from vitnas.exporting.opset import lower
from vitnas.exporting.pixels import Prepare, Ready
from vitnas.exporting.script import script_of
from vitnas.extraction import extract
from vitnas.model import build
from vitnas.model.timm_cfg import knows_images
from vitnas.sample import Uniform
from vitnas.space import autoformer
from vitnas.supernet import Supernet
from vitnas.train import Classification, TrainConfig, fit

CLASSES = ["ant", "bee", "cat", "dog"]
CONFIG = {
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.25, 0.3),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
FORM = Form(image_size=16, in_chans=3, **CONFIG)  # type: ignore[arg-type]
SIZES = [(16, 16), (30, 21), (21, 30), (9, 40), (64, 65), (12, 11)]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """A smooth picture: noise hides what a filter does."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 3 + 2, width // 3 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def prepared(pixels: np.ndarray[Any, Any], form: Form) -> torch.Tensor:
    """(1, C, H, W) levels by timm's evaluation transform; images of the final size stay as they are."""
    if pixels.shape[:2] == form.input_size[1:]:
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    transform = create_transform(
        form.input_size,
        is_training=False,
        crop_pct=form.crop_pct,
        crop_mode=form.crop_mode,
        interpolation=form.interpolation,
        normalize=False,
    )
    return torch.as_tensor(transform(Image.fromarray(pixels)))[None]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interpolation": "lanczos", "crop_pct": 1.0},
        {"interpolation": "hamming", "image_size": (12, 20)},
        {"interpolation": "bilinear", "image_size": (20, 12), "crop_pct": 0.9},
        {"crop_mode": "squash", "image_size": (12, 20)},
    ],
)
def test_images_are_prepared_as_timm_prepares_them(changes: dict[str, Any]) -> None:
    form = replace(FORM, **changes)
    for number, (height, width) in enumerate(SIZES):
        pixels = photo(height, width, number)
        want = prepared(pixels, form).float()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (form.mean, form.std))
        got = (Prepare(form)(torch.from_numpy(pixels.copy())[None]) * std + mean) * 255
        apart = (got - want).abs()
        # Pillow sums whole numbers: where a level is just between two, either may come out.
        ties = 0.15 if form.interpolation == "bilinear" else 0.3 if form.crop_mode == "squash" else 0.01
        assert float(apart.max()) < (3.5 if form.crop_mode == "squash" else 2.5)
        assert float((apart > 0.5).float().mean()) <= ties


@pytest.mark.parametrize("opset", [17, 20])
def test_a_file_needs_nothing_else(opset: int, tmp_path: Path) -> None:
    model, path = tiny_timm().eval(), tmp_path / "model.onnx"
    record = export_onnx(
        model,
        path,
        images(5),
        pixels=True,
        opset=opset,
        class_names=CLASSES,
        data_config=CONFIG,
        exporter="legacy",
    )
    assert (record["input"], record["opset"], record["params_equal"]) == ("uint8", opset, True)
    proto = onnx.load(str(path))
    assert (proto.ir_version, proto.opset_import[0].version) == ({17: 8, 20: 9}[opset], opset)
    assert {each.domain for each in proto.opset_import} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == (
        "images",
        "tensor(uint8)",
        ["batch", "height", "width", 3],
    )
    assert (answer.name, answer.shape) == ("probabilities", ["batch", 4])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == CLASSES
    assert json.loads(about["mean"]) == [*CONFIG["mean"]]  # type: ignore[misc]
    for number, (height, width) in enumerate(SIZES):
        batch = np.stack([photo(height, width, 10 * number + i) for i in range(2)])
        with torch.no_grad():
            want = model(torch.cat([FORM.normalise(prepared(one, FORM)) for one in batch])).softmax(1)
        got = session.run(None, {"images": batch})[0]
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=0.02)
        torch.testing.assert_close(got.sum(1), np.ones(2, np.float32), rtol=0, atol=1e-5)


def test_the_script_beside_a_file_names_the_class(tmp_path: Path) -> None:
    model = tiny_timm().eval()
    export_onnx(
        model,
        tmp_path / "model.onnx",
        pixels=True,
        class_names=CLASSES,
        data_config=CONFIG,
        exporter="legacy",
    )
    (tmp_path / "predict.py").write_text(script_of(tmp_path / "model.onnx"))
    pixels = photo(30, 21)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with torch.no_grad():
        want = model(FORM.normalise(prepared(pixels, FORM))).softmax(1)[0]
    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "predict.py"), str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd="/",
    )
    name, share = done.stdout.split()[1:3]
    assert name == CLASSES[int(want.argmax())]
    assert float(share.rstrip("%")) / 100 == pytest.approx(float(want.max()), abs=0.02)


@pytest.mark.slow
def test_a_program_takes_pixels_too(tmp_path: Path) -> None:
    model, path = tiny_timm().eval(), tmp_path / "model.pt2"
    record = export_model(model, path, images(5), pixels=True, data_config=CONFIG)
    assert record["input"] == "uint8"
    run = torch.export.load(path).module()
    for height, width in SIZES:
        batch = torch.from_numpy(np.stack([photo(height, width, i) for i in range(3)]))
        with torch.no_grad():
            torch.testing.assert_close(run(batch), Ready(model, FORM)(batch))


def test_what_is_not_known_is_refused_and_never_guessed(tmp_path: Path) -> None:
    model = build(tiny_model(relative_position=0).arch).eval()
    with pytest.raises(
        UserError, match=r"mean, std, interpolation, crop_pct of this Model's images are not known"
    ):
        export_model(model, tmp_path / "a.onnx", pixels=True)
    export_onnx(model, tmp_path / "a.onnx", exporter="legacy")
    about = {item.key: item.value for item in onnx.load(str(tmp_path / "a.onnx")).metadata_props}
    assert not {"mean", "std", "crop_pct", "interpolation"} & set(about)
    save_timm(model, tmp_path / "folder")
    assert not knows_images(load_timm(tmp_path / "folder").pretrained_cfg)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"crop_mode of the images is 'border'; .* knows center, squash"):
        export_model(model, tmp_path / "a.onnx", pixels=True, data_config={**CONFIG, "crop_mode": "border"})


def test_constants_and_class_names_travel_from_training_to_every_file(tmp_path: Path) -> None:
    pixels = torch.randint(
        0, 256, (24, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    config = DataConfig(mean=(0.3,), std=(0.4,), holdout=4, augment=Augment())
    data = Data.from_arrays(train=(pixels, [0, 1, 2, 3] * 6), class_names=CLASSES, config=config)
    space = autoformer("micro", image_size=8, patch_size=4, in_chans=1, num_classes=4)
    supernet = Supernet(space)
    batches = TrainBatches(data.train, data.augment, batch_size=8, seed=0)
    fit(supernet, Classification(), Uniform(space), batches, config=TrainConfig(epochs=0.5))
    model = extract(supernet, space.smallest()).eval()
    save_timm(model, tmp_path / "first")
    again = load_timm(tmp_path / "first")
    save_timm(again, tmp_path / "second")
    last = load_timm(tmp_path / "second")
    about = describe(last, last.arch.input_size)  # type: ignore[union-attr,arg-type]
    assert json.loads(about["class_names"]) == CLASSES
    assert (json.loads(about["mean"]), json.loads(about["std"])) == ([0.3], [0.4])
    assert json.loads(about["crop_pct"]) == 1
    last.reset_classifier(7)  # type: ignore[operator]
    assert "label_names" not in last.pretrained_cfg  # type: ignore[operator]


def test_files_of_older_sets_hold_what_these_have() -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1, noop_with_empty_axes=0),
        helper.make_node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2),
        helper.make_node("Add", ["a", "mean"], ["sum"]),
        helper.make_node("Add", ["sum", "b"], ["y"]),
    ]
    axes = onnx.numpy_helper.from_array(np.array([1]), "axes")
    values = [helper.make_tensor_value_info(name, kind, [2, size]) for name, size in (("x", 4), ("y", 2))]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], [axes])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)

    def run() -> Any:
        onnx.checker.check_model(proto, full_check=True)
        return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]

    before = run()
    lower(proto, 17)
    assert (proto.ir_version, proto.opset_import[0].version, len(proto.graph.initializer)) == (8, 17, 0)
    np.testing.assert_array_equal(run(), before)
    del proto.graph.node[:]
    proto.graph.node.append(helper.make_node("Gelu", ["y"], ["z"]))
    proto.opset_import[0].version = 20
    with pytest.raises(ExportError, match=r"operator set 17 has no Gelu"):
        lower(proto, 17)


@pytest.mark.slow
def test_relative_positions_in_an_old_set_and_in_half_precision(tmp_path: Path) -> None:
    model = tiny_model().eval()
    record = export_model(model, tmp_path / "a.onnx", images(5), opset=17, pixels=True, data_config=CONFIG)
    assert (record["exporter"], record["opset"]) == ("dynamo", 17)
    half = export_model(model.half(), tmp_path / "b.onnx", images(5), pixels=True, data_config=CONFIG)
    assert half["max_rel_diff"] < 1e-2
