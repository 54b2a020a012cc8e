"""A run whose space holds how many tokens are kept: what keeps fewer in vain is not returned, and the page says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from stage_help import Clock, words

from vitnas.cli import main
from vitnas.model.named import ArchFile
from vitnas.records import Result
from vitnas.reporting.tokens import TokenMaps
from vitnas.searching import SearchRecord, TokenSpeeds

FIELDS = {
    "space__keep": "[1.0,0.5]",
    "space__keep_places": "[1]",
    "space__selector": "attention",
    "space__depths": "[2]",
    "search__num_trials": "8",
    "search__searcher": "random",
    "search__objectives": "[accuracy,macs]",
    "supernet__epochs": "1",
    "supernet__monitor_every": "0",
    "supernet__checkpoint_minutes": "10",
    "retrain__rank_archs": "0",
    "retrain__baselines": "[]",
    "export__formats": "[]",
    "export__latency": "[]",
    "budget": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("selection_ms", [1.0, -1.0])
def test_fewer_tokens_are_returned_where_they_are_faster(
    selection_ms: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitnas.stages.searching.quick_meter", lambda target: Clock(selection_ms))
    assert main(words(tmp_path, **FIELDS)) == 0
    record, speeds = SearchRecord.read(tmp_path), TokenSpeeds.read(tmp_path).speeds
    with_fewer = [each for each in record.front if ArchFile.read(tmp_path / "front" / each).arch.selector]
    page = (tmp_path / "report.html").read_text()
    assert speeds
    assert {(speed.target, speed.full_ms) for speed in speeds} == {("onnxruntime,batch=1", 2.0)}
    if selection_ms < 0:  # the answer is timed, too, which need not be of the front
        chosen = ArchFile.read(tmp_path / "models" / "chosen").arch
        answer = [record.chosen] if chosen.selector else []
        assert {speed.arch_id for speed in speeds} == {*with_fewer, *answer}
        assert not record.rejections
    else:
        assert not with_fewer
        assert record.rejections == {
            "fewer tokens are not faster than all on onnxruntime,batch=1": len(speeds)
        }
        assert f"{len(speeds)} Archs of the front left it" in page or "1 Arch of the front left it" in page
    chosen = ArchFile.read(tmp_path / "models" / "chosen").arch
    assert ("Which patches are kept" in page) == (chosen.selector is not None)
    if chosen.selector:
        assert len(TokenMaps.read(tmp_path).images) == 12
    assert Result.read(tmp_path / "models" / "chosen").arch_id == record.chosen
