"""What README.md and the pages of docs/ tell a reader to type: commands are read, snippets of Python run."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from vitnas import mixers
from vitnas.cli import bench, commands, export, main, predict, probe, push, show_tokens, swap, tokens
from vitnas.exporting import export_model
from vitnas.exporting.networks import load_network
from vitnas.predicting import Predictor
from vitnas.stages.run import field_names

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((REPO / "docs").glob("*.md"))}
TEXTS = [README, *(text for name, text in PAGES.items() if name != "design.md")]


def typed() -> list[list[str]]:
    """The words behind `vitnas` of every command, in blocks and in sentences."""
    blocks = "\n".join(block for text in TEXTS for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    found = re.findall(r"^vitnas (.*)", blocks.replace("\\\n", " "), re.MULTILINE)
    for text in TEXTS:
        found += re.findall(r"`vitnas ([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
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
    if (len(words) == 1 and words != ["list"]) or "FOLDER" in words:
        return  # named, not typed
    for module, name in (
        (commands, "open_run"), (commands, "whole_run"), (commands, "report"), (swap, "_load"),
        (tokens, "load_network"), (probe, "load_network"),
        (show_tokens, "image_files"), (predict, "open_network"), (predict, "image_files"),
        (export, "load_network"), (push, "push"), (bench, "bench_mixers"), (bench, "bench_tokens"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, read)
    try:
        status = main(words)
    except ReadError:
        status = 0
    assert status == 0, capsys.readouterr().err


def test_every_dotted_field_is_one() -> None:
    fields = re.findall(r"[`\s](\w+(?:\.\w+)+)=", "\n".join(TEXTS))
    assert len(fields) > 5
    assert {*fields} <= {*field_names()}


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_the_snippets_of_a_page_run(
    page: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in a run's folder."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "run"))
    names: dict[str, object] = {"__name__": page}
    monkeypatch.setitem(sys.modules, page, ModuleType(page))  # dataclasses look their module up
    before = dict(mixers.MIXERS)
    for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        if "executorch" not in code:  # which has a test of its own
            exec(compile(code, page, "exec"), names)
    for word in {*mixers.MIXERS} - {*before}:
        del mixers.MIXERS[word]


@pytest.mark.slow
def test_the_snippet_of_executorch_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says of a black image what the ONNX file says."""
    pytest.importorskip("executorch", reason="NOT RUN: ExecuTorch is not here")
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "run"))
    model = load_network("models/chosen", what="MODEL")
    export_model(model, "export/model.pte", pixels=True)
    (code,) = re.findall(r"```python\n([^`]*executorch[^`]*)```", PAGES["deploy.md"])
    capsys.readouterr()
    exec(compile(code.replace("64, 3", "64, 1"), "deploy.md", "exec"), {})  # the run is of grey images
    black = np.zeros((48, 64), np.uint8)
    assert capsys.readouterr().out.strip() == Predictor("export/model.onnx").predict([black])[0].classes[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((REPO / "docs").glob("notebooks/*.ipynb")), ids=lambda path: path.stem
)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, one after the other; what a notebook alone knows (`%`) is not in them."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {"__name__": path.stem}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "what it prints is for who runs it"
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    assert 0.2 < names["score"].accuracy <= 1  # type: ignore[attr-defined]


# What is linked is found again; LD_LIBRARY_PATH would give Node's binding another library than its own.
FOUND_AT = [f"-Wl,-rpath,{place}" for place in os.environ.get("LIBRARY_PATH", "").split(":") if place]
# Language -> how it is run, what shows that it can be, and pixels that are not all black.
LANGUAGES = {
    "js": (
        ["node", "snippet.js"],
        ["node", "-e", "require('onnxruntime-node')"],
        ("new Uint8Array(48 * 64)", "new Uint8Array(48 * 64).map((_, i) => (i * i) % 251)"),
    ),
    "cpp": (
        ["./snippet"],
        ["g++", "-std=c++17", "snippet.cpp", "-lonnxruntime", "-o", "snippet", *FOUND_AT],
        (
            "pixels(48 * 64);",
            "pixels(48 * 64); for (size_t i = 0; i < 48 * 64; ++i) pixels[i] = (i * i) % 251;",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_other_languages_say_what_predict_says(language: str, finished: Path, tmp_path: Path) -> None:
    """With onnxruntime-node (NODE_PATH) and a compiler that finds ONNX Runtime (CPATH, LIBRARY_PATH); without them
    it is not checked."""
    runs, needs, (black, pattern) = LANGUAGES[language]
    (code,) = re.findall(rf"```{language}\n(.*?)```", PAGES["deploy.md"], re.DOTALL)
    grey = code.replace("64, 3", "64, 1").replace("64 * 3", "64")
    assert (grey.count("64, 1"), grey.count(black)) == (1, 1), "the run is of grey images"
    shutil.copytree(finished / "export", tmp_path / "export")
    (tmp_path / f"snippet.{language}").write_text(grey.replace(black, pattern), encoding="utf-8")
    if shutil.which(needs[0]) is None or subprocess.run(needs, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip(f"NOT RUN: {needs[0]} with ONNX Runtime is not here")
    done = subprocess.run(runs, cwd=tmp_path, capture_output=True, text=True, check=True)
    predictor = Predictor(tmp_path / "export/model.onnx")
    image = (np.arange(48 * 64) ** 2 % 251).astype(np.uint8).reshape(48, 64)
    number, _, names = done.stdout.partition(" of ")
    assert predictor.class_names[int(number)] == predictor.predict([image])[0].classes[0]
    assert language == "js" or json.loads(names) == predictor.class_names


def test_the_site_has_every_page() -> None:
    """Its navigation names all files, and what the reference names exists."""
    nav = re.findall(r": (\w+\.md)", (REPO / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {*nav} == {*PAGES}
    for name in re.findall(r"^::: (\S+)", PAGES["reference.md"], re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\((\w+\.md)", text)]
    assert [pair for pair in links if pair[1] not in PAGES] == []
