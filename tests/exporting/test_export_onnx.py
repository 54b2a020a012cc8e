"""ONNX: the file runs elsewhere, holds the Model's parameters, agrees with it, and replaces an old one in one step."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_help import images, staged_model, tiny_model, tiny_timm
from torch import nn

import vitnas.exporting.onnx as module
from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.exporting import ExportError, export_model, export_onnx, unsupported, verify
from vitnas.exporting.onnx import onnx_runner
from vitnas.measure.convert import convert
from vitnas.model import Model, build
from vitnas.space import autoformer

CLASSES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path, dict[str, Any]]:
    """One export through the default exporter, of a Model in training mode with one frozen block."""
    model, path = tiny_model(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    model.blocks[1].eval()
    modes, threads = [part.training for part in model.modules()], torch.get_num_threads()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = export_model(
            model, path, images(9), class_names=CLASSES, data_config={"mean": (0.1, 0.2, 0.3)}
        )
    assert [part.training for part in model.modules()] == modes
    assert torch.get_num_threads() == threads
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)
    return model, path, record


def test_the_record_says_what_was_checked(exported: tuple[Model, Path, dict[str, Any]]) -> None:
    model, path, record = exported
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["exporter"] == "dynamo"
    assert record["opset"] == 20
    assert record["problems"] == []
    assert record["passed"]
    assert record["real_images"]
    assert record["n_images"] == 9
    assert record["batch_sizes"] == [1, 3, 5]
    assert record["max_abs_diff"] < 1e-4
    assert record["top1_agreement"] == 1
    assert record["bytes"] == path.stat().st_size
    assert record["params"] == sum(p.numel() for p in model.parameters())
    assert record["exported_params"] == record["params"]
    assert record["params_equal"]
    assert record["missing_params"] == []


def test_the_file_is_single_and_described(exported: tuple[Model, Path, dict[str, Any]]) -> None:
    model, path, _ = exported
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(str(path))
    assert [node.name for node in proto.graph.input] == ["input"]
    assert [node.name for node in proto.graph.output] == ["logits"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.opset_import[0].version == 20
    properties = {item.key: item.value for item in proto.metadata_props}
    assert Arch.from_json(json.loads(properties["arch"])) == model.arch
    assert json.loads(properties["class_names"]) == CLASSES
    assert json.loads(properties["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(properties["input_size"]) == [3, 16, 16]
    assert properties["vitnas_version"]
    assert str(Path.cwd()).encode() not in path.read_bytes()  # no traces of the machine that exported


def test_nothing_is_added_to_scattered_places(exported: tuple[Model, Path, dict[str, Any]]) -> None:
    """ONNX Runtime has that in float32 alone, so no file with it could be made float16."""
    _, path, _ = exported
    adds = [
        node.name
        for node in onnx.load(str(path)).graph.node
        if node.op_type.startswith("Scatter") and any(each.s == b"add" for each in node.attribute)
    ]
    assert not adds


def test_the_file_runs_where_only_onnxruntime_is(exported: tuple[Model, Path, dict[str, Any]]) -> None:
    model, path, _ = exported
    code = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "session = ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "images = np.load(sys.argv[2])\n"
        "logits = np.concatenate([session.run(None, {'input': images[i:j]})[0] for i, j in ((0, 1), (1, 7))])\n"
        "assert not {'torch', 'timm', 'vitnas', 'onnx'} & set(sys.modules)\n"
        "np.save(sys.argv[3], logits)\n"
    )
    given, got = path.parent.parent / "in.npy", path.parent.parent / "out.npy"
    np.save(given, images(7).numpy())
    subprocess.run([sys.executable, "-I", "-c", code, path, given, got], check=True, timeout=120)
    with torch.no_grad():
        want = model.eval()(images(7))
    torch.testing.assert_close(torch.from_numpy(np.load(got)), want, rtol=1e-4, atol=1e-4)


def test_a_weight_changed_after_the_export_is_noticed(exported: tuple[Model, Path, dict[str, Any]]) -> None:
    model, path, _ = exported
    assert verify(model, onnx_runner(path), images(4), name="the file", real_images=True).passed
    before = model.blocks[0].attn.proj.weight.detach().clone()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight[0, 0] += 1.0
    with pytest.raises(ExportError, match=r"the file differs from the Model by"):
        verify(model, onnx_runner(path), images(4), name="the file", real_images=True)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.copy_(before)


def test_the_legacy_exporter_gives_the_same(tmp_path: Path) -> None:
    model = tiny_timm()
    record = export_onnx(model, tmp_path / "a.onnx", exporter="legacy")
    assert record["exporter"] == "legacy"
    assert record["params_equal"]
    assert record["problems"] == ["No images were given, so the comparison used noise."]
    fixed = export_onnx(model, tmp_path / "b.onnx", images(3), exporter="legacy", dynamic_batch=False)
    assert fixed["batch_sizes"] == [1]
    assert onnx.load(str(tmp_path / "b.onnx")).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    ours = tiny_model(relative_position=0)  # whose forward takes more than images
    assert export_onnx(ours, tmp_path / "c.onnx", images(3), exporter="legacy")["params_equal"]
    assert "forward" not in vars(ours)


def broken_dynamo(kind: str) -> Any:
    """A stand-in for `convert` whose dynamo exporter fails, or writes a file with other weights."""

    def stand_in(model: nn.Module, path: Path, batch: torch.Tensor, *, exporter: str, **kwargs: Any) -> None:
        if exporter == "dynamo" and kind == "raises":
            raise RuntimeError("no translation for aten::x\nand a long story")
        convert(model, path, batch, exporter="legacy", **kwargs)
        if exporter == "dynamo":
            proto = onnx.load(str(path))
            name = next(t for t in proto.graph.initializer if t.name == "head.bias")
            name.CopyFrom(onnx.numpy_helper.from_array(np.full(4, 7, np.float32), "head.bias"))
            onnx.save(proto, str(path))

    return stand_in


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("raises", "The dynamo exporter failed: no translation for aten::x."),
        ("differs", "The dynamo exporter failed: the ONNX file differs from the Model by"),
    ],
)
def test_a_failing_exporter_is_replaced_by_the_other_and_recorded(
    kind: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "convert", broken_dynamo(kind))
    record = export_onnx(tiny_timm(), tmp_path / "model.onnx", images(4))
    assert record["exporter"] == "legacy"
    assert record["passed"]
    assert len(record["problems"]) == 1
    assert record["problems"][0].startswith(problem)


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(module, "convert", broken_dynamo("differs"))
    with pytest.raises(
        ExportError, match=r"model.onnx cannot be exported. The dynamo exporter failed: .* differs"
    ):
        export_onnx(tiny_timm(), path, images(4), exporter="dynamo")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


def test_parameters_that_the_file_lacks_are_named(tmp_path: Path) -> None:
    class WithUnused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.unused = tiny_timm(), nn.Linear(5, 3)
            nn.init.ones_(self.unused.bias)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.inside(batch)

    record = export_onnx(WithUnused(), tmp_path / "model.onnx", images(4), exporter="legacy")
    assert not record["params_equal"]
    assert record["params"] - record["exported_params"] == 18
    assert record["missing_params"] == ["unused.weight", "unused.bias"]
    assert "does not hold these parameters" in record["problems"][0]


def test_reasons_are_given_all_at_once(tmp_path: Path) -> None:
    class Wrapped(nn.Module):  # as torch.compile makes it
        _orig_mod = None

    assert unsupported(tiny_timm()) == []
    model = tiny_timm()
    model.head.to(torch.bfloat16)
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    reasons = unsupported(model)
    assert reasons[0].startswith("parameters mix torch.bfloat16, torch.float32")
    assert reasons[1].startswith("parameters are torch.bfloat16")
    assert reasons[2] == "parameter norm.bias has values that are not finite"
    with pytest.raises(
        ExportError, match=r"ONNX cannot take this VisionTransformer: parameters mix .*; .* not finite"
    ):
        export_onnx(model, tmp_path / "model.onnx")
    assert "on the meta device" in unsupported(nn.Linear(1, 1, device="meta"))[0]
    assert "is a wrapper; export what it wraps, model._orig_mod" in unsupported(Wrapped())[0]


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    model = tiny_timm()
    with pytest.raises(UserError, match=r"opset is 11; files are written with 17 to 25"):
        export_onnx(model, tmp_path / "model.onnx", opset=11)
    with pytest.raises(UserError, match=r"2 class names are given; the model has 4 classes"):
        export_onnx(model, tmp_path / "model.onnx", images(2), class_names=["a", "b"])
    with pytest.raises(UserError, match=r"must end in .onnx, .pt2 or .pte, or be a folder"):
        export_model(model, tmp_path / "model.pth")


def test_several_stages_and_a_convolutional_stem(tmp_path: Path) -> None:
    model = staged_model()
    record = export_onnx(model, tmp_path / "staged.onnx", images(3, 32))
    assert record["passed"]
    assert record["max_abs_diff"] < 1e-4
    assert record["top1_agreement"] == 1


def test_relative_positions_with_the_legacy_exporter(tmp_path: Path) -> None:
    """Its files ran at the batch that was traced, and failed in a Concat at any other."""
    space = autoformer("micro", image_size=16, patch_size=8, num_classes=5, relative_position=3)
    model, pixels = build(space.smallest()).eval(), torch.randn(3, 3, 16, 16)
    with pytest.raises(
        ExportError, match=r"The legacy exporter failed: it fixes the batch of relative positions"
    ):
        export_onnx(model, tmp_path / "a.onnx", pixels, exporter="legacy")
    record = export_onnx(model, tmp_path / "b.onnx", pixels, exporter="legacy", dynamic_batch=False)
    assert record["max_abs_diff"] < 1e-4
