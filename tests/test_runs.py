"""Files of a run folder: what killed writers leave is cleared away, and every file reads back or says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import torch

import vitnas.records
from vitnas.data import Readings
from vitnas.errors import UserError
from vitnas.exporting import save_timm
from vitnas.model import build
from vitnas.model.named import ArchFile, Chosen
from vitnas.predicting.examine import Evaluation
from vitnas.records.finals import Rung
from vitnas.runs import (
    STALE_S,
    RunFile,
    from_json,
    load_tensors,
    read_json,
    remove_stale,
    save_tensors,
    to_json,
    write_json,
)
from vitnas.searching import Feasibility, SearchRecord
from vitnas.slimming import Sensitivity
from vitnas.space import autoformer
from vitnas.stages.full import FullCost

OTHERS = (ArchFile, Chosen, Readings, Feasibility, SearchRecord, Sensitivity, FullCost, Evaluation)
FILES = sorted(
    {
        each
        for each in (*vars(vitnas.records).values(), *OTHERS)
        if isinstance(each, type) and issubclass(each, RunFile) and "FILE" in vars(each)
    },
    key=lambda each: each.FILE,
)


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    old, young, other = (
        tmp_path / name for name in (".a.json.abcdefgh", ".a.json.ijklmnop", ".b.json.abcdefgh")
    )
    for path in (old, young, other):
        path.write_text("half")
    then = time.time() - STALE_S - 1
    os.utime(old, (then, then))
    os.utime(other, (then, then))
    write_json(tmp_path / "a.json", [1])
    assert read_json(tmp_path / "a.json") == [1]
    assert [path.exists() for path in (old, young, other)] == [False, True, True]
    folder = tmp_path / ".chosen.abcdefgh"
    (folder / "new").mkdir(parents=True)
    os.utime(folder, (then, then))
    remove_stale(tmp_path / "chosen")
    assert not folder.exists()


@pytest.fixture(scope="module")
def runs(finished: Path, learned: Path, slimmed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs, copied."""
    folder = tmp_path_factory.mktemp("runs")
    for name, each in (("plain", finished), ("learned", learned), ("slimmed", slimmed)):
        shutil.copytree(each, folder / name)
    return folder


def paths(kind: type[RunFile], runs: Path) -> list[Path]:
    return sorted(runs.rglob(kind.FILE))


# Only made by other runs: of a sampler of latency, `vitnas specialize`, finals; their tests read them.
ELSEWHERE = {"sampler_latency.json", "family.json", "finals.json"}


def test_every_file_of_a_run_reads_back_as_it_was(runs: Path) -> None:
    for kind in FILES:
        found = paths(kind, runs)
        assert found or kind.FILE in ELSEWHERE, kind.FILE
        for path in found:
            text = path.read_text()
            kind.load(path).save(path)
            assert path.read_text() == text, path
    for path in runs.rglob("finals/**/rung*.json"):
        assert Rung.load(path).epochs > 0
    known = {kind.FILE for kind in FILES} | {"config.json"}  # the latter is timm's
    # In finals they are named after Archs.
    assert {path.name for path in runs.rglob("*.json") if "finals" not in path.parts} <= known


def drop(value: Any, name: str) -> None:
    del value[name]


def add(value: Any, name: str) -> None:
    value["typo"] = 1


def spoil(value: Any, name: str) -> None:
    value[name] = {"of": "another kind"} if not isinstance(value[name], dict) else "text"


@pytest.mark.parametrize(
    "kind", [kind for kind in FILES if kind.FILE not in ELSEWHERE], ids=lambda kind: kind.FILE
)
@pytest.mark.parametrize(
    ("change", "why"),
    [(drop, "'{name}' is missing"), (add, "'typo' is unknown"), (spoil, "{name}: ")],
    ids=["missing", "unknown", "kind"],
)
def test_a_foreign_file_is_one_sentence(
    kind: type[RunFile], change: Callable[[Any, str], None], why: str, runs: Path, tmp_path: Path
) -> None:
    if kind is ArchFile:
        pytest.skip("an Arch refuses by itself, see tests/test_arch.py")
    value = json.loads(paths(kind, runs)[0].read_text())
    assert is_dataclass(kind)
    name = next(
        item.name
        for item in fields(kind)
        if item.default is MISSING and get_type_hints(kind)[item.name] is not Any
    )
    change(value, name)
    write_json(tmp_path / kind.FILE, value)
    with pytest.raises(UserError) as error:
        kind.read(tmp_path)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / kind.FILE} cannot be read ({why.format(name=name)}"), said
    assert said.endswith(kind.REMEDY)
    assert f"`{kind.COMMAND}`" in said


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "null", "\x00"])
def test_a_damaged_file_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(
        UserError, match=r"search\.json cannot be read \(.*\); it must be as `vitnas search` wrote it"
    ):
        SearchRecord.read(tmp_path)


def test_a_missing_file_names_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"search\.json does not exist; `vitnas search` writes it\. Run that first"
    ):
        SearchRecord.read(tmp_path)


@dataclass(frozen=True)
class Inner:
    word: Literal["a", "b"]
    pair: tuple[int, float]


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    by_name: dict[str, Inner | None]
    side: int | tuple[int, int] | None = None
    flag: bool = False


def test_nested_values_read_back() -> None:
    value = Outer((Inner("a", (1, 2.0)),), {"x": None, "y": Inner("b", (3, 4.5))}, side=(2, 3))
    assert from_json(Outer, json.loads(json.dumps(to_json(value)))) == value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (
            {"inner": [{"word": "c", "pair": [1, 2]}], "by_name": {}},
            r"inner: 0: word: \"c\" is not one of 'a', 'b'",
        ),
        ({"inner": [{"word": "a", "pair": [1]}], "by_name": {}}, r"inner: 0: pair: \[1\] is not a list of 2"),
        ({"inner": [{"word": "a", "pair": [1.5, 2]}], "by_name": {}}, r"pair: 0: 1.5 is not a whole number"),
        ({"inner": [{"word": "a", "pair": [1, True]}], "by_name": {}}, r"pair: 1: true is not a number"),
        ({"inner": [], "by_name": {"x": 3}}, r"by_name: x: 3 is not an object"),
        ({"inner": [], "by_name": {}, "flag": 1}, r"flag: 1 is not true or false"),
        ({"inner": {}, "by_name": {}}, r"inner: \{\} is not a list"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        from_json(Outer, value)


def test_what_is_flushed_was_opened_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows flushes nothing else."""
    fcntl, flushed = pytest.importorskip("fcntl"), list[int]()

    def fsync(file: int) -> None:
        flushed.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", {})
    save_timm(
        build(autoformer("micro", image_size=8, patch_size=4, num_classes=2).smallest()), tmp_path / "net"
    )
    assert len(flushed) > 1
    assert {*flushed} == {os.O_RDWR}


def test_json_that_nests_too_deep_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "space.json"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"space\.json cannot be read \(it nests too deep\)"):
        read_json(path)
    with pytest.raises(UserError, match="it nests too deep"):
        SearchRecord.load(path)


def test_equal_tensors_are_equal_files(tmp_path: Path) -> None:
    """The order of a header's texts was chance."""
    meta = {"vitnas": '{"is": "\u00e9\\n\\"so\\""}', "a": "b", "z": "y"}
    found = set()
    for number in range(12):
        path = tmp_path / f"{number}.safetensors"
        save_tensors(path, {"x": torch.arange(3.0), "y.z": torch.zeros(2, 2)}, meta)
        found.add(path.read_bytes())
    assert len(found) == 1
    tensors, texts = load_tensors(path)
    assert {name: texts[name] for name in meta} == meta
    assert tensors["x"].tolist() == [0, 1, 2]
