"""The report's content: what is shown, what is named as missing, what is escaped."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import plotly.graph_objects as go
import pytest
from synthetic_run import NASTY, make_arch, make_run_folder, read

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.reporting import html, plots, report
from vitnas.reporting.drawing import draw
from vitnas.reporting.html import block_costs
from vitnas.runs import write_atomic, write_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "digits"))


@pytest.fixture(autouse=True)
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out plotly's own code: megabytes that hold almost any text."""
    monkeypatch.setattr(html, "get_plotlyjs", lambda: "/* plotly.js */")


def page_of(folder: Path) -> str:
    return report(folder).read_text()


def figures_of(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return cast(dict[str, Any], json.loads(match[1]))


def test_headline_says_arch_cost_accuracy_and_budget(whole: Path) -> None:
    page = page_of(whole)
    assert (
        "12 blocks, width 192, 3-4 heads, MLP 576-768, patch 8 of 64 px, 5.91M params, 1.28 GMACs: "
        "97.8 % on 360 test images (95 % CI 95.7–98.9 %)" in page
    )
    assert "Budget met. Picked from 300 scored Archs (161 more were rejected unscored); it is on the" in page
    assert "+1.5 % to the upper bound" in page  # 1.281G of 1.3G


def test_missed_budget_is_said_in_capitals(run: Path) -> None:
    search = read(run / "search.json")
    write_json(run / "search.json", {**search, "budget": "macs<=1G and latency<=8ms"})
    page = page_of(run)
    assert "Budget missed." in page
    assert "-28.1 % to the upper bound" in page
    assert "MISSED" in page


def test_every_section_of_a_finished_run_is_there(whole: Path) -> None:
    page = page_of(whole)
    assert set(figures_of(page)) == {
        "front", "hypervolume", "supernet", "monitor", "retrain", "retrain_accuracy", "correlation", "costs",
    }  # fmt: skip
    assert "Missing:" not in page
    assert "local-dir:" in page
    assert "onnxruntime.InferenceSession" in page
    assert "torch.export.load" in page
    assert "Kendall&#39;s tau 0.71, Spearman&#39;s rho 0.83, n = 8 Archs." in page
    assert "the Supernet has not converged" in page
    assert "Test split read: once (2026-03-02T10:04:00, 360 images, final report)." in page
    assert "no: IQR 16 % of median" in page
    assert "macs are above 1.3G" in page
    assert "n = 180 images" in page  # the holdout that scores are on
    assert 'href="models/chosen/model.safetensors"' in page


def test_user_text_is_escaped_everywhere(run: Path) -> None:
    search = read(run / "search.json")
    search["trials"][3]["arch_id"] = NASTY
    search["rejections"] = {NASTY: 3}
    write_json(run / "search.json", search)
    page = page_of(run)
    assert "<script>window.injected" not in page
    assert "<b>cats" not in page
    assert "&lt;b&gt;cats &amp; dogs&lt;/b&gt;" in page
    hover = [text for trace in figures_of(page)["front"]["data"] for text in trace.get("customdata", [])]
    assert any("&lt;b&gt;cats" in text for text in hover)
    assert not any("<b>cats" in text for text in hover)


def test_nothing_is_loaded_from_elsewhere(whole: Path) -> None:
    page = page_of(whole)
    for link in re.findall(r"""(?:src|href)=["']([^"']+)|url\(([^)]+)""", page):
        assert not re.match(r"(?:https?:)?//", link[0] or link[1]), link
    assert "default-src 'none'" in page
    assert page.count("/* plotly.js */") == 1


def test_half_a_run_names_what_is_missing(tmp_path: Path) -> None:
    write_atomic(tmp_path / "run.yaml", "recipe: digits\n")
    page = page_of(tmp_path)
    assert "No Arch is chosen yet" in page
    for name in (
        "search.json",
        "feasibility.json",
        "metrics.jsonl",
        "correlation.json",
        "export.json",
        "manifest.json",
    ):
        assert name in page
    assert page.count("Missing:") >= 9
    assert "search: missing" in page
    assert figures_of(page) == {}


def test_a_run_that_stopped_after_search_says_not_retrained(run: Path) -> None:
    for name in ("models", "export"):
        shutil.rmtree(run / name)
    (run / "results.json").unlink()
    page = page_of(run)
    assert "with inherited weights; not retrained yet" in page
    assert "retrain: missing" in page
    assert "✓ search" not in page
    assert '<li class="done">search</li>' in page
    assert "12 blocks" in page  # from front/<arch_id>/arch.json


def test_unmeasured_numbers_are_called_so(run: Path) -> None:
    result = read(run / "models" / "chosen" / "result.json")
    write_json(run / "models" / "chosen" / "result.json", {**result, "test_accuracy": None, "n_test": None})
    (run / "results.json").unlink()
    page = page_of(run)
    assert "98.0 % on holdout images (n not recorded); test not measured" in page
    assert "97.8 %" not in page


def test_few_pairs_are_too_few_to_tell(tmp_path: Path) -> None:
    page = page_of(make_run_folder(tmp_path / "few", num_trials=10, num_pairs=4))
    assert "n = 4 Archs: too few to tell" in page
    assert "tau 0.71" not in page


def test_files_that_cannot_be_read_are_named_and_not_fatal(run: Path) -> None:
    (run / "search.json").write_text("{")
    (run / "feasibility.json").write_text('"text"')
    (run / "correlation.json").write_text('{"points": 3}')
    (run / "models" / "chosen" / "arch.json").write_text('{"schema": 99}')
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write("not json\n")
    page = page_of(run)
    assert "search.json cannot be read" in page
    assert "feasibility.json holds a str, not a list of rows" in page
    assert "correlation.json: points is a int, not a list; left out" in page
    assert "models/chosen/arch.json is not an Arch" in page
    assert "metrics.jsonl cannot be read past line" in page
    assert "supernet" in figures_of(page)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone is not a folder; a report is made from a run folder\. Give"):
        report(tmp_path / "gone")
    with pytest.raises(
        UserError, match=r"holds no file of a run \(run\.yaml, .*\); a report needs at least one"
    ):
        report(tmp_path)


def test_links_follow_the_page(run: Path, tmp_path: Path) -> None:
    out = report(str(run), tmp_path / "pages" / "one.html")
    assert out == tmp_path / "pages" / "one.html"
    assert 'href="../digits/models/chosen/model.safetensors"' in out.read_text()


def test_many_trials_are_thinned_but_the_front_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = figures_of(page_of(run))["front"]["data"]
    monkeypatch.setattr(plots, "MAX_POINTS", 100)
    page = page_of(run)
    thinned = figures_of(page)["front"]["data"]
    assert 80 <= len(thinned[0]["x"]) <= 100 < len(whole[0]["x"])
    assert thinned[1:] == whole[1:]
    assert "300 scored trials, thinned evenly for drawing" in page


def test_charts_are_what_plotly_reads(whole: Path) -> None:
    """plotly's Python objects refuse an unknown name or a wrong value; plotly.js would pass over it in silence."""
    for figure in figures_of(page_of(whole)).values():
        go.Figure(figure)


def test_block_costs_add_up_to_the_count() -> None:
    arch = make_arch(depth=5)
    rows, cost = block_costs(arch), count(arch)
    assert [row[0] for row in rows] == ["stem", "1", "2", "3", "4", "5", "head"]
    assert sum(sum(row[1:4]) for row in rows) == cost.macs
    assert sum(row[4] for row in rows) == cost.params
    assert rows[0][1:3] == (0, 0)
    assert min(rows[1][1:3]) > 0


@pytest.mark.parametrize("depth", [1, 12, 30])
def test_drawing_has_a_row_per_block_inside_its_frame(depth: int) -> None:
    arch = make_arch(depth)
    svg = draw(arch)
    assert svg.count('class="attention"') == svg.count('class="mlp"') == depth
    assert svg.count('class="tick"') == sum(block.num_heads - 1 for block in arch.blocks)
    _check_frame(svg)


def test_drawing_of_several_stages_keeps_one_scale() -> None:
    """As wide as stages get, of images that are not square."""
    stages = tuple(
        Stage(embed_dim=d, blocks=(Block(num_heads=d // 32, head_dim=32, mlp_hidden=4 * d),) * n)
        for d, n in ((64, 2), (320, 4), (1280, 2))
    )
    svg = draw(Arch(image_size=(64, 96), patch_size=8, stages=stages))
    assert "image 64×96×3 → patches 8×8 → 97 tokens" in svg
    assert "stage 3" in svg
    assert "embedding 1280" in svg
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="\d+" rx="2" class="attention"', svg)]
    assert widths[-1] == pytest.approx(20 * widths[0], rel=0.05)
    _check_frame(svg)


def _check_frame(svg: str) -> None:
    view = re.search(r'viewBox="0 0 (\d+) (\d+)"', svg)
    assert view is not None
    for x, y, width, height in re.findall(
        r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="(\d+)"', svg
    ):
        assert float(x) + float(width) <= int(view[1])
        assert float(y) + float(height) <= int(view[2])
    for x, text in re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="start">([^<]*)', svg):
        assert float(x) + 6 * len(text) <= int(view[1]) + 6, text
