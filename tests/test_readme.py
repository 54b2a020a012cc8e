"""What README.md tells a reader to type works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest

REPO = Path(__file__).resolve().parents[1]


def test_the_library_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    study, model = names["study"], names["model"]
    best = study.best()  # type: ignore[attr-defined]
    assert best.cost.macs <= 1.5e6
    assert model.arch == best.arch  # type: ignore[attr-defined]
    assert len(study.scored()) == 20  # type: ignore[attr-defined]
    onnx.checker.check_model(onnx.load(str(tmp_path / "model.onnx")))
