"""A saved folder: timm gives back the same model bit for bit, and nothing but safetensors is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from export_help import images, randomize, tiny_model
from torch import nn

import vitnas.exporting.timm_dir as module
from vitnas.errors import UserError
from vitnas.exporting import ExportError, export_model, load_timm, save_timm


def timm_model() -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_classes=4
    )
    return randomize(model)


@pytest.mark.parametrize("make", [tiny_model, timm_model])
def test_a_folder_gives_back_the_same_model(make: object, tmp_path: Path) -> None:
    model = make()  # type: ignore[operator]
    folder = tmp_path / "saved"
    record = export_model(
        model, folder, class_names=["a", "b", "c", "d"], data_config={"mean": (0.1, 0.2, 0.3)}
    )
    assert json.loads(json.dumps(record)) == record
    assert record["params"] == sum(p.numel() for p in model.parameters())
    assert model.training
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images(3)), model.eval()(images(3)), rtol=0, atol=0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert list(loaded.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads((folder / "config.json").read_text())["label_names"] == ["a", "b", "c", "d"]


def test_an_arch_comes_back_and_the_card_tells_the_import(tmp_path: Path) -> None:
    model = tiny_model()
    record = save_timm(model, tmp_path / "saved")
    assert record["architecture"] == "vitnas_arch"
    assert record["needs_import"] == "vitnas"
    assert load_timm(tmp_path / "saved").arch == model.arch
    assert "import vitnas" in (tmp_path / "saved" / "README.md").read_text()
    assert "0.5" in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.slow
def test_a_fresh_process_loads_it_with_two_imports(tmp_path: Path) -> None:
    model = tiny_model()
    save_timm(model, tmp_path / "saved")
    code = (
        "import sys, timm, vitnas\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True)\n"
        "print(model.arch.id, float(sum(p.detach().double().sum() for p in model.parameters())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "saved"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    total = float(sum(p.detach().double().sum() for p in model.parameters()))
    assert done.stdout.split() == [model.arch.id, str(total)]


def test_other_files_stay_and_a_failure_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    save_timm(tiny_model(), folder)
    (folder / "result.json").write_text("{}")
    save_timm(tiny_model(relative_position=0), folder)
    assert (folder / "result.json").exists()
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}

    def broken(model: nn.Module, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    other = tiny_model()
    other.extra = nn.Linear(2, 2)  # what no Arch says
    with pytest.raises(ExportError, match=r"timm (cannot rebuild|rebuilds) this Model"):
        save_timm(other, folder)
    monkeypatch.setattr(module, "save_for_hf", broken)
    with pytest.raises(UserError, match=r"saved cannot be written \(No space left on device\)"):
        save_timm(tiny_model(), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_timm(tiny_model(), folder)
    os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        load_timm(folder)
    with pytest.raises(UserError, match=r"has no config.json"):
        load_timm(tmp_path)


def test_folders_that_timm_does_not_understand_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_timm(tiny_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "unheard_of"}))
    with pytest.raises(UserError, match=r"names the architecture 'unheard_of'; timm does not know it"):
        load_timm(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"cannot be loaded by timm"):
        load_timm(folder)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 class names are given; the model has 4 classes"):
        save_timm(tiny_model(), tmp_path / "saved", class_names=["a"])
    with pytest.raises(UserError, match=r"Linear has no pretrained_cfg with an architecture"):
        save_timm(nn.Linear(1, 1), tmp_path / "saved")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file; the folder for timm needs its own name"):
        save_timm(tiny_model(), tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
