"""The page of a slimmed network."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any, cast

import plotly.graph_objects as go
import pytest

from vitnas.arch import Arch
from vitnas.model.named import ArchFile
from vitnas.records import Original, SlimFront, SlimResults
from vitnas.reporting import report
from vitnas.reporting.drawing import draw
from vitnas.reporting.files import read_run
from vitnas.reporting.slim_page import original_arch, removed, rounding
from vitnas.reporting.slimming import reach
from vitnas.reporting.tables import percent
from vitnas.searching import Feasibility
from vitnas.searching.feasibility import FeasibilityRow
from vitnas.space import around


@pytest.fixture(autouse=True)
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out plotly's own code: megabytes that hold almost any text."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly.js */")


def archs(folder: Path) -> tuple[Arch, Arch]:
    """The chosen one, and the original."""
    whole = original_arch(read_run(folder))
    assert whole is not None
    return ArchFile.read(folder / "models" / "chosen").arch, whole


def test_the_page_says_what_was_removed_and_why(slimmed: Path, tmp_path: Path) -> None:
    page = unescape(report(slimmed, tmp_path / "page.html").read_text())
    results, (chosen, whole) = SlimResults.read(slimmed), archs(slimmed)
    row = results.rows[1]
    share = percent(row.cost.macs / results.rows[0].cost.macs, 0)
    assert f"{Original.read(slimmed).name} made smaller: {chosen.describe()}, {share} of its MACs" in page
    assert f"accuracy {percent(row.accuracy)} (n = {row.agreement.n} test images)" in page
    assert "Budget met." in page
    assert removed(chosen, whole) in page
    for choice in ("Effort", "Importance", "Sensitivity", "Compensation", "Allocation", "Rounding"):
        assert f'data-label="Choice" class="">{choice}<' in page, choice
    for member in SlimFront.read(slimmed).members:
        assert member.folder in page
    # Nothing was exported, so nothing was timed, and MACs are counted.
    for gone in ("Supernet training", "Against simpler ways", "search.json", "all timed", "as measured"):
        assert gone not in page
    match = re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    figures = cast(dict[str, Any], json.loads(match[1]))
    assert {"agreement", "predicted", "sensitivity", "costs"} <= set(figures)
    for name, figure in figures.items():
        go.Figure(figure)
        height = figure["layout"].get("height")  # or it would lie over what is behind it
        assert (f'style="height: {height}px" id="plot-{name}"' in page) == (height is not None), name
    assert figures["sensitivity"]["layout"]["height"]


def test_an_unfinished_run_has_a_page_that_says_what_is_missing(slimmed: Path, tmp_path: Path) -> None:
    """From each stage on, with what is there."""
    folder = Path(shutil.copytree(slimmed, tmp_path / "run"))
    for file in ("slimmed.json", "models", "front.json", "front", "allocation.json", "sensitivity.json", "order.json",
                 "forecast.json"):  # fmt: skip
        path = folder / file
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        page = report(folder).read_text()
        assert "No network is chosen yet" in page or file == "slimmed.json"
    assert "Missing: nothing is folded yet (front.json is not there)." in page
    (folder / "front.json").write_text('{"members": 3}')
    assert "front.json cannot be read" in unescape(report(folder).read_text())


def test_the_drawing_shows_what_is_gone(slimmed: Path) -> None:
    chosen, whole = archs(slimmed)
    drawn = draw(chosen, whole)
    assert drawn.count('class="gone"') == 2 * whole.depth
    assert drawn.count(">left out<") == whole.depth - chosen.depth
    assert 'class="gone"' not in draw(chosen)
    first = chosen.with_blocks(chosen.blocks[:1])
    last = draw(first, whole)
    assert last.count(">left out<") == whole.depth - 1


def test_what_rounding_costs(slimmed: Path) -> None:
    """Against the shares that the Space was made with, whichever they are."""
    _, whole = archs(slimmed)
    space = around(whole, hidden=(0.3, 0.5, 1.0), multiple=4)
    assert "+0 hidden units" in rounding(whole, space)[1]
    other = whole.with_blocks(replace(block, mlp_hidden=20) for block in whole.blocks)
    assert "+2 hidden units" in rounding(other, space)[1]  # three times 20 for 19.2
    assert "none are rounded" in rounding(other, around(whole, hidden=(20, 64), multiple=4))[1]


def test_hundredths_of_a_millisecond_are_told_apart() -> None:
    """A share of what a small network takes."""
    row = FeasibilityRow(
        "latency on torch,batch=1", "ms", 0.06881, 0.1052, "latency<=0.070434ms@torch,batch=1", 0.1, 9, ""
    )
    (said,) = reach(Feasibility((row,)))
    assert said == "latency on torch,batch=1 at most 0.0704ms: from 0.0688ms to 0.105ms can be had"
