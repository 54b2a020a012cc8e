"""Files of 16 and 8 bits: what is left out, what is judged by which images, when one is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_help import randomize
from torch import Tensor, nn

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.exporting import precision
from vitnas.exporting.precision import Beside, Judged, export_precise, onnx_target, quantise, why_not
from vitnas.exporting.quick import export_quickly
from vitnas.measure import runtimes
from vitnas.measure.latency import LatencyMeter
from vitnas.measure.target import LatencyTarget
from vitnas.model import build
from vitnas.predicting import OnnxNetwork

CONFIG = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
CONFIG["crop_mode"] = "center"
ARCH = Arch(
    image_size=16,
    patch_size=4,
    num_classes=4,
    stages=(Stage(embed_dim=32, blocks=(Block(num_heads=2, head_dim=16, mlp_hidden=64),) * 2),),
)
TARGET = "onnxruntime,batch=1"


def learned() -> Any:
    """A network whose answers are as far apart as those of trained ones, and images with its answers as labels."""
    model: Any = randomize(build(ARCH)).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model


def judged_by(model: nn.Module, n: int = 96) -> Judged:
    images = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    images = (images * 0.25 + 0.5).mul(255).round().div(255).sub(0.5).div(0.25)  # of pixels
    with torch.no_grad():
        targets = model(images).argmax(1)
    return Judged([(images[:64], targets[:64]), (images[64:], targets[64:])], has_labels=True)


class Clock:
    """Says that one is as fast as it is told."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def __call__(self, target: str) -> Clock:
        return self

    def compare_onnx(self, files: dict[str, Path]) -> dict[str, Any]:
        assert next(iter(files)) == "fp32"
        return {name: type("T", (), {"median_ms": 1.0 if name == "fp32" else self.ms}) for name in files}


@pytest.mark.slow
def test_a_file_of_8_bits_is_as_good_and_much_smaller(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "LatencyMeter", Clock(0.5))
    model = learned()
    judged = judged_by(model)
    about: dict[str, Any] = {
        "target": TARGET,
        "opset": 17,
        "data_config": CONFIG,
        "class_names": list("abcd"),
    }
    record, beside, reason = export_precise(model, tmp_path / "int8.onnx", judged, "int8", **about)
    assert beside is not None
    assert reason == ""
    assert (beside.accuracy_fp32, beside.n, beside.has_labels) == (
        1.0,
        48,
        True,
    )  # the half not calibrated on
    assert beside.accuracy >= 0.995
    assert 1e-4 < record["max_abs_diff"] < 3  # of 8 bits beside 32
    assert len(beside.left_out) < beside.layers
    proto = onnx.load(tmp_path / "int8.onnx")
    kinds = [tensor.data_type for tensor in proto.graph.initializer if tensor.dims and len(tensor.dims) == 2]
    assert kinds.count(onnx.TensorProto.INT8) == beside.layers - len(beside.left_out) - 1  # one is the stem's
    network = OnnxNetwork(tmp_path / "int8.onnx")  # takes pixels, names its classes
    assert network.pretrained_cfg["label_names"] == list("abcd")
    with torch.no_grad():
        want, got = model(judged.images_NCHW[:32]), network(judged.images_NCHW[:32])
    assert not torch.equal(want, got)
    assert (want.argmax(1) == got.argmax(1)).float().mean() > 0.9
    half, beside, reason = export_precise(model, tmp_path / "fp16.onnx", judged, "fp16", **about)
    assert reason == ""
    assert beside is not None
    assert beside.accuracy == 1.0
    weights = [
        tensor for tensor in onnx.load(tmp_path / "fp16.onnx").graph.initializer if len(tensor.dims) == 2
    ]
    assert sum(each.data_type == onnx.TensorProto.FLOAT16 for each in weights) >= beside.layers
    assert (half["input"], record["input"]) == ("uint8", "uint8")


def test_what_is_not_faster_or_loses_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "LatencyMeter", Clock(1.5))
    model = learned()
    about: dict[str, Any] = {"target": TARGET, "opset": 17, "data_config": CONFIG}
    _, beside, reason = export_precise(model, tmp_path / "a.onnx", judged_by(model), "int8", **about)
    assert beside is not None
    assert reason.startswith("it is not faster here (accuracy")
    assert "1.5 ms against 1" in reason
    assert not (tmp_path / "a.onnx").exists()
    assert why_not(replace(beside, precision="fp16")) == ""  # half as large is worth having
    assert why_not(replace(beside, accuracy=0.99, ms=0.5)).startswith("it loses more than 0.5 points")


def test_the_layer_that_changes_answers_stays_in_float(tmp_path: Path) -> None:
    """A layer whose weights 8 bits cannot hold: one entry is a thousand times the others, in each row."""
    model = learned()
    with torch.no_grad():
        model.head.weight[:, 0] = 3000.0
        model.norm.weight[0], model.norm.bias[0] = 1e-5, 0.0
    images = judged_by(model).images_NCHW
    export_quickly(model, tmp_path / "base.onnx", images[:8])
    left, layers = quantise(tmp_path / "base.onnx", tmp_path / "int8.onnx", images[:48])
    assert 0 < len(left) < layers
    assert layers == 10
    proto = onnx.load(tmp_path / "int8.onnx")
    shapes = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in proto.graph.initializer}
    (worst,) = (node for node in proto.graph.node if node.name == left[0])
    kind, shape = shapes[worst.input[1]]
    assert (kind, sorted(shape)) == (onnx.TensorProto.FLOAT, [4, 32])  # the one that was spoiled


def test_features_have_no_8_bit_file(tmp_path: Path) -> None:
    model = build(replace(ARCH, num_classes=0)).eval()
    judged = Judged([(torch.zeros(8, 3, 16, 16), torch.zeros(8))], has_labels=False)
    about: dict[str, Any] = {"target": TARGET, "opset": 17, "data_config": CONFIG}
    _, beside, reason = export_precise(model, tmp_path / "a.onnx", judged, "int8", **about)
    assert beside is None
    assert "features, and no classes to judge" in reason


def test_files_are_timed_on_the_first_target_of_onnx_runtime() -> None:
    assert onnx_target(["torch,batch=8", "onnxruntime,batch=4", "onnxruntime"]) == "onnxruntime,batch=4"
    assert onnx_target(["torch"]) == "onnxruntime,batch=1"
    beside = Beside(
        precision="int8", accuracy=0.9, accuracy_fp32=0.9, n=4, has_labels=False, ms=1, fp32_ms=2, target="t"
    )
    assert str(beside).startswith("same first class 90.0 % against 90.0 % on 4 held-out images")


def test_runtimes_that_are_not_there_are_refused_in_a_sentence(monkeypatch: Any) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"OpenVINO is not installed. Run: pip install 'vitnas\[openvino\]'\.$"
    ):
        LatencyMeter("openvino,batch=1")
    monkeypatch.setattr(runtimes.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"torch.compile needs a C\+\+ compiler, and there is none"):
        LatencyMeter("torch_compile")
    with pytest.raises(UserError, match=r"openvino runs on cpu here"):
        LatencyTarget(runtime="openvino", device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino,batch=2", "torch_compile,batch=2"])
def test_other_runtimes_give_times(target: str) -> None:
    if target.startswith("openvino"):
        pytest.importorskip("openvino")
    found = LatencyMeter(target, runs=10, seconds=0.2, attempts=1).measure(learned())
    assert found.median_ms > 0
    assert (found.runtime, found.batch) == (target.partition(",")[0], 2)
    assert found.ratio_to_reference > 0


@pytest.mark.slow
def test_openvino_answers_as_the_network_does(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = learned()
    export_quickly(model, tmp_path / "a.onnx")
    call = runtimes.openvino_call(
        tmp_path / "a.onnx", LatencyTarget(runtime="openvino", batch=2), (3, 16, 16)
    )
    answer: Any = call()
    images: Tensor = runtimes.random_images((2, 3, 16, 16))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(answer[0].copy()), model(images), rtol=1e-3, atol=1e-3)
    assert "openvino" in sys.modules
