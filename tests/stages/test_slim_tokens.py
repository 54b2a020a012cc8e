"""`vitnas slim MODEL tokens=WORD`: tokens go where that is faster, timed beside the same network with all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from slim_help import ARCH, save, slim_words
from stage_help import Clock, refused

from vitnas.cli import main
from vitnas.exporting import load_timm
from vitnas.model import build
from vitnas.records import SlimFront
from vitnas.searching import TokenSpeeds

FIELDS = {
    "tokens": "attention",
    "slim__axes": "[hidden]",
    "space__keep": "[1.0,0.5]",
    "space__keep_places": "[1]",
    "budget": "macs<=70%",
    "search__num_trials": "40",
    "images": "32",
}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return save(build(ARCH).eval(), tmp_path / "net")


@pytest.mark.slow
@pytest.mark.parametrize("selection_ms", [1.0, -1.0])
def test_tokens_go_where_that_is_faster(
    selection_ms: float, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitnas.stages.slim.stages.quick_meter", lambda target: Clock(selection_ms))
    assert main(slim_words(original, tmp_path / "run", **FIELDS)) == 0
    speeds = TokenSpeeds.read(tmp_path / "run").speeds
    archs = [
        load_timm(tmp_path / "run" / each.folder).arch for each in SlimFront.read(tmp_path / "run").members
    ]
    assert {speed.target for speed in speeds} == {"onnxruntime,batch=1"}
    assert {speed.is_faster for speed in speeds} == {selection_ms < 0}
    with_fewer = {arch.id for arch in archs if arch.selector}
    assert with_fewer <= {speed.arch_id for speed in speeds}
    assert bool(with_fewer) == (selection_ms < 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": "atention"}, "slim.tokens is 'atention'; .*Nearest: 'attention'"),
        (
            {"tokens": "predictor"},
            "slim.tokens is 'predictor', .* Use `vitnas tokens MODEL dataset=IMAGES selector=predictor keep=0.7`",
        ),
        (
            {"tokens": "patch_slimming"},
            "slim.tokens is 'patch_slimming', .* selector=patch_slimming budget='macs<=55%'`",
        ),
        (
            {"space__selector": "evit"},
            "tokens is 'attention' and space.selector 'evit'; both say who chooses",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    fields: dict[str, str], words: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(words, refused(slim_words(original, tmp_path / "run", **FIELDS | fields), capsys))
