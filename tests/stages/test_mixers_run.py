"""A whole run of the space of mixers by `vitnas run`: trained, searched under a latency budget, retrained, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_help import words

from vitnas.cli import main
from vitnas.model.named import ArchFile
from vitnas.records import Results

MIXERS = {
    "space__kind": "mixers",
    "space__patch_size": "2",
    "space__mixers": "[fourier,nystrom,performer,softmax]",
    "space__mlp_ratios": "[1.0,2.0]",
    "budget": "latency<=20ms@onnxruntime,batch=1",
    "supernet__epochs": "1",
    "supernet__checkpoint_minutes": "10",
    "search__num_trials": "6",
    "retrain__rank_archs": "0",
    "export__formats": "[onnx]",
    "export__latency": "[]",
}


@pytest.mark.slow
def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _, *rest = words(tmp_path / "run", **MIXERS)
    assert main([run, "vision_xformers_tour", *rest]) == 0
    assert Results.read(tmp_path / "run").rows[0].role == "chosen"
    folder = tmp_path / "run" / "models" / "chosen"
    arch = ArchFile.read(folder).arch
    assert {block.mixer for block in arch.blocks} <= {"fourier", "nystrom", "performer", "softmax"}
    assert not arch.class_token
    (file,) = (tmp_path / "run").rglob("*.onnx")
    assert file.stat().st_size > 1000
    capsys.readouterr()
    assert main(["show", str(folder)]) == 0
    assert arch.id in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run")]) == 0
