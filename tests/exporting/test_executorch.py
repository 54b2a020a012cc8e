"""ExecuTorch files answer as the Model does, and say what they lack where they cannot be written."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from export_help import images, tiny_model
from torch import nn

from vitnas.errors import MissingExtra, UserError
from vitnas.exporting import ExportError, export_model
from vitnas.exporting.pixels import Ready
from vitnas.predicting import Predictor
from vitnas.records import ExportRecord
from vitnas.reporting.tables import export as table
from vitnas.stages.prepare import check_export
from vitnas.stages.results import export_files
from vitnas.stages.run import ExportConfig

NAMES = ["a", "b", "c", "d"]
CONFIG = {
    "mean": (0.5,) * 3,
    "std": (0.25,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
needs_executorch = pytest.mark.skipif(
    find_spec("executorch") is None,
    reason="ExecuTorch is not installed: pip install 'vitnas[executorch]'",
)


def known() -> nn.Module:
    """A network that knows how its images are prepared."""
    model = tiny_model()
    model.pretrained_cfg = {**model.pretrained_cfg, **CONFIG, "label_names": NAMES}
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, ExportRecord]:
    """A folder with an ONNX and an ExecuTorch file of one network."""

    class Given:
        root = tmp_path_factory.mktemp("files")
        about: ClassVar[dict[str, Any]] = {"class_names": None, "data_config": None}

        def some(self) -> torch.Tensor:
            return images(5).clamp(-1, 1)

    model = known()
    record = export_files(Given(), model, Given.root, ExportConfig(formats=("onnx", "executorch")))
    return model, Given.root, record


@pytest.mark.slow
@needs_executorch
def test_it_takes_pixels_of_any_sides_and_answers_as_the_model(
    made: tuple[nn.Module, Path, ExportRecord],
) -> None:
    model, folder, record = made
    file = record.files["executorch"]
    assert (file.path, file.input, file.n_images, file.exported_params) == (
        "model.pte",
        "uint8",
        5,
        sum(parameter.numel() for parameter in model.parameters()),
    )
    assert file.max_abs_diff < 1e-5
    predictor = Predictor(folder / "model.pte")
    whole = Ready(model, predictor.form)
    generator = np.random.default_rng(0)
    for height, width in ((16, 16), (31, 50), (700, 333), (1024, 1024)):
        photo = generator.integers(0, 256, (height, width, 3), np.uint8)
        with torch.no_grad():
            want = whole(torch.from_numpy(photo)[None]).numpy()
        np.testing.assert_allclose(predictor.probabilities([photo]), want, atol=1e-5)
    larger = generator.integers(0, 256, (1300, 900, 3), np.uint8)  # is made smaller before
    np.testing.assert_allclose(
        predictor.probabilities([larger]), Predictor(folder / "model.onnx").probabilities([larger]), atol=0.02
    )
    assert predictor.class_names == NAMES
    assert predictor.predict([larger])[0].classes[0] in NAMES


@pytest.mark.slow
@needs_executorch
def test_the_record_tells_its_time_and_its_bounds(made: tuple[nn.Module, Path, ExportRecord]) -> None:
    _, _, record = made
    assert {*record.files["executorch"].ms} == {"executorch", "onnxruntime"}
    told = table(record).rows[-1][-1]
    assert "It takes one image at a time, of up to 1024 pixels a side." in told
    assert " ms in executorch and " in told


@pytest.mark.slow
@needs_executorch
def test_a_file_of_prepared_images_gives_logits(tmp_path: Path) -> None:
    model = tiny_model()
    record = export_model(model, tmp_path / "a.pte", images(3), class_names=NAMES)
    assert (record["input"], record["batch_sizes"]) == ("float", [1])
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    with pytest.raises(ExportError, match=r"the ExecuTorch file differs from the Model by"):
        export_model(model, tmp_path / "a.pte", images(3), tolerance=0.0)


@pytest.mark.slow
@needs_executorch
def test_what_it_lacks_operators_for_is_refused_in_a_sentence_and_the_rest_is_written(tmp_path: Path) -> None:
    class Fourier(nn.Module):
        pretrained_cfg = {"input_size": (3, 8, 8), **CONFIG}  # noqa: RUF012
        num_classes = 4

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return self.head(torch.fft.fft2(images_BCHW).real.mean((2, 3)))

    with pytest.raises(ExportError, match=r"^ExecuTorch cannot take this Fourier: .*\.$"):
        export_model(Fourier(), tmp_path / "a.pte", images(2, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_executorch
def test_a_file_that_is_none_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.pte").write_bytes(b"no file of ExecuTorch's" * 9)
    with pytest.raises(UserError, match=r"a\.pte cannot be read by ExecuTorch \(.*it must be a \.pte file\."):
        Predictor(tmp_path / "a.pte")
    with pytest.raises(UserError, match=r"there is no file .*it should be an ExecuTorch file"):
        Predictor(tmp_path / "b.pte")


def test_where_it_is_not_installed_the_remedy_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitnas.exporting.executorch.find_spec", lambda name: None)
    remedy = r"an ExecuTorch file needs an optional part; run: pip install 'vitnas\[executorch\]'"
    with pytest.raises(MissingExtra, match=remedy):
        export_model(tiny_model(), tmp_path / "a.pte", images(2))
    config = ExportConfig(formats=("executorch",))
    with pytest.raises(MissingExtra, match=remedy):
        check_export(config)
    (tmp_path / "a.pte").touch()
    with pytest.raises(MissingExtra, match=remedy):
        Predictor(tmp_path / "a.pte")
    monkeypatch.setattr("vitnas.measure.runtimes.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"OpenVINO is not installed"):
        check_export(replace(config, formats=("onnx",), latency=("openvino,batch=1",)))
