"""torch.export: the file computes the Model's logits at any batch size and holds no pickle."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from export_help import images, tiny_model, tiny_timm
from torch import nn

import vitnas.exporting.torch_export as module
from vitnas.exporting import ExportError, export_model, export_program
from vitnas.exporting.torch_export import pickled_records
from vitnas.measure.convert import quiet
from vitnas.model import Model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path, dict[str, Any]]:
    model, path = tiny_model(), tmp_path_factory.mktemp("pt2") / "model.pt2"
    model.blocks[1].eval()
    modes = [part.training for part in model.modules()]
    record = export_model(model, path, images(9), class_names=["a", "b", "c", "d"])
    assert [part.training for part in model.modules()] == modes
    return model, path, record


def test_the_record_and_the_file_agree_with_the_model(exported: tuple[Model, Path, dict[str, Any]]) -> None:
    model, path, record = exported
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["passed"]
    assert record["batch_sizes"] == [1, 3, 5]
    assert record["problems"] == []
    assert record["exported_params"] == record["params"] == sum(p.numel() for p in model.parameters())
    with quiet():
        loaded = torch.export.load(path).module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images(6)), model.eval()(images(6)), rtol=1e-5, atol=1e-5)


def test_the_file_holds_no_pickle_and_describes_itself(exported: tuple[Model, Path, dict[str, Any]]) -> None:
    _, path, _ = exported
    assert pickled_records(path) == []
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("vitnas.json"))
        assert json.loads(json.loads(archive.read(name))["class_names"]) == ["a", "b", "c", "d"]


def test_pickled_records_are_found(exported: tuple[Model, Path, dict[str, Any]], tmp_path: Path) -> None:
    with quiet():
        program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
        torch.export.save(program, tmp_path / "usual.pt2")  # torch's own way keeps the example inputs
    assert len(pickled_records(tmp_path / "usual.pt2")) == 1


def test_a_wrong_program_is_refused_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")
    original = module.trace

    def changed(model: nn.Module, batch: torch.Tensor, axes: dict[int, Any]) -> torch.export.ExportedProgram:
        program = original(model, batch, axes)
        with torch.no_grad():
            program.state_dict["head.bias"] += 1  # shared with the model, so the model's own is put back
        module_bias = program.state_dict["head.bias"].clone()
        with torch.no_grad():
            model.get_parameter("head.bias").sub_(1)
        program.state_dict["head.bias"] = nn.Parameter(module_bias)
        return program

    monkeypatch.setattr(module, "trace", changed)
    with pytest.raises(ExportError, match=r"the torch.export file differs from the Model by"):
        export_program(tiny_timm(), path, images(4))
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_what_torch_cannot_export_is_told_in_a_sentence(tmp_path: Path) -> None:
    class Undecided(nn.Module):
        pretrained_cfg = {"input_size": (3, 8, 8)}  # noqa: RUF012

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch.flatten(1) if batch.sum() > 0 else -batch.flatten(1)

    with pytest.raises(ExportError, match=r"torch.export cannot take this Undecided: "):
        export_program(Undecided(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
