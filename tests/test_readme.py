"""What README.md tells a reader to type works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import onnx
import pytest

from vitnas.cli import bench, commands, main, probe, show_tokens, swap, tokens
from vitnas.stages.run import field_names

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text()


def typed() -> list[list[str]]:
    """The words behind `vitnas` of every command, in blocks and in sentences."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    found = re.findall(r"^vitnas (.*)", blocks, re.MULTILINE)
    found += re.findall(r"`vitnas ([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    return [shlex.split(text.replace("RECIPE", "tour"), comments=True) for text in dict.fromkeys(found)]


class ReadError(Exception):
    """All words were read."""


def read(*_: object, **__: object) -> None:
    raise ReadError


@pytest.mark.parametrize("words", typed(), ids=" ".join)
def test_every_command_is_read(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a command would do with its words is left out."""
    assert words[0] in commands.COMMANDS
    if len(words) == 1 and words != ["list"]:
        return  # named, not typed
    for module, name in (
        (commands, "open_run"), (commands, "whole_run"), (commands, "report"), (swap, "_load"),
        (tokens, "load_network"), (probe, "load_network"),
        (show_tokens, "_files"), (bench, "bench_mixers"), (bench, "bench_tokens"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, read)
    try:
        status = main(words)
    except ReadError:
        status = 0
    assert status == 0, capsys.readouterr().err


def test_every_dotted_field_is_one() -> None:
    fields = re.findall(r"[`\s](\w+(?:\.\w+)+)=", README)
    assert len(fields) > 5
    assert {*fields} <= {*field_names()}


def test_the_library_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    study, model = names["study"], names["model"]
    best = study.best()  # type: ignore[attr-defined]
    assert best.cost.macs <= 1.5e6
    assert model.arch == best.arch  # type: ignore[attr-defined]
    assert len(study.scored()) == 20  # type: ignore[attr-defined]
    proto = onnx.load(str(tmp_path / "model.onnx"))
    onnx.checker.check_model(proto)
    about = {item.key: json.loads(item.value) for item in proto.metadata_props if item.key in ("mean", "std")}
    data: Any = names["data"]
    assert about == {"mean": [*data.mean], "std": [*data.std]}
