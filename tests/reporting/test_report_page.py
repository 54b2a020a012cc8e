"""The report's content: what is shown, what is named as missing, what is escaped."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any, cast

import plotly.graph_objects as go
import pytest

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.model.named import ArchFile
from vitnas.records import Manifest, Ranking, Result
from vitnas.reporting import plots, report
from vitnas.reporting.drawing import draw
from vitnas.reporting.files import read_run
from vitnas.reporting.html import block_costs
from vitnas.reporting.tables import number
from vitnas.runs import write_atomic
from vitnas.searching import SearchRecord

# Text that a page must escape, as a data set could carry it.
NASTY = "</script><script>window.injected=1</script><b>cats & dogs</b>"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run whose files a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "digits"))


@pytest.fixture(autouse=True)
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out plotly's own code: megabytes that hold almost any text."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly.js */")


def page_of(folder: Path) -> str:
    return report(folder, folder.parent / "page.html").read_text()


def figures_of(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return cast(dict[str, Any], json.loads(match[1]))


def test_headline_says_arch_cost_accuracy_and_budget(run: Path) -> None:
    folder = run / "models" / "chosen"
    replace(Result.read(folder), test_accuracy=352 / 360, n_test=360).write(folder)
    cost, page = count(ArchFile.read(folder).arch), page_of(run)
    assert (
        f"{ArchFile.read(folder).arch.describe()}, {number(cost.params)} params, {number(cost.macs, 'MACs')}: "
        "97.8 % on 360 test images (95 % CI 95.7–98.9 %)" in page
    )
    assert "Budget met. Picked from 6 scored Archs (0 more were rejected); it is on the" in page
    assert f"{100 * (1 - cost.macs / 200_000):+.1f} % to the upper bound" in page


def test_missed_budget_is_said_in_capitals(run: Path) -> None:
    macs = Result.read(run / "models" / "chosen").macs
    tight = f"macs<={macs // 2} and latency<=1us@onnxruntime and latency<=1s@torch"
    replace(SearchRecord.read(run), budget=tight).write(run)
    page = page_of(run)
    assert "Budget missed." in page
    assert "-100.0 % to the upper bound" in page
    assert page.count("MISSED") == 2, "the latency as bench measured it, too"
    assert page.count("not known") == 1


def test_every_section_of_a_finished_run_is_there(run: Path) -> None:
    found = replace(
        Ranking.read(run), kendall_tau=0.714, ci95=(0.2, 0.9), n=8, note=""
    )  # this run trained two Archs
    found.write(run)
    page = page_of(run)
    assert set(figures_of(page)) == {
        "front", "hypervolume", "supernet", "monitor", "retrain", "correlation", "costs",
    }  # fmt: skip
    assert "Missing:" not in page
    assert "local-dir:" in page
    assert "onnxruntime.InferenceSession" in page
    assert "Kendall&#39;s tau 0.71 (95 % interval 0.20 to 0.90) of 8 Archs of about equal cost" in page
    assert "The supernet has not learned" in page
    assert re.search(r"Test split read: once \(\S+, 240 images, final table of chosen, hand_scaled", page)
    assert "n = 36 images" in page  # the holdout that scores are on
    assert 'href="digits/models/chosen/model.safetensors"' in page
    assert "0, bit for bit" in page


def test_every_line_of_a_learned_sampler_is_drawn(learned: Path) -> None:
    page = page_of(learned)
    figures = figures_of(page)
    assert {name for name in figures if name.startswith("sampler")} == {
        "sampler_prefers", "sampler_cost", "sampler_entropy", "sampler_gain",
    }  # fmt: skip
    looks = read_run(learned).looks
    assert len(figures["sampler_gain"]["data"][0]["x"]) == len(looks)
    assert len(figures["sampler_cost"]["data"]) == len(looks[0][1].budgets)
    assert "Drawn by the policy against random Archs of equal cost" in page
    for figure in figures.values():
        go.Figure(figure)


def test_a_search_that_orders_nothing_has_no_green_tick(run: Path) -> None:
    found = SearchRecord.read(run)
    assert found.num_images == sum(Manifest.read(run).data.counts["holdout"])
    scored = [trial for trial in found.trials if trial.values]
    alike = tuple(
        replace(trial, values={**trial.values, "loss": 0.5, "loss_odd": 0.5 + place % 2})
        for place, trial in enumerate(scored)
    )
    replace(found, trials=alike).write(run)
    page = page_of(run)
    assert '<li class="unsure">search: cannot tell Archs apart</li>' in page
    assert "were it 0.01, about" in page
    apart = tuple(
        replace(
            trial,
            values={**trial.values, "loss": float(place % 2), "loss_odd": place % 2 + 0.01 * (place % 3)},
        )
        for place, trial in enumerate(scored)
    )
    replace(found, trials=apart).write(run)
    assert '<li class="done">search</li>' in page_of(run)


def test_reasons_for_rejection_are_counted(run: Path) -> None:
    replace(SearchRecord.read(run), rejections={"macs<=1K": 3, "params<=2K": 41}, num_rejected=44).write(run)
    page = page_of(run)
    assert page.index("params&lt;=2K") < page.index("macs&lt;=1K"), "the most frequent first"


def test_user_text_is_escaped_everywhere(run: Path) -> None:
    search, manifest = SearchRecord.read(run), Manifest.read(run)
    trials = list(search.trials)
    trials[3] = replace(trials[3], arch_id=NASTY)
    replace(search, trials=tuple(trials), rejections={NASTY: 3}).write(run)
    replace(manifest, data=replace(manifest.data, class_names=(NASTY,))).write(run)
    page = page_of(run)
    assert "<script>window.injected" not in page
    assert "<b>cats" not in page
    assert page.count("&lt;b&gt;cats &amp; dogs&lt;/b&gt;") >= 2
    hover = [text for trace in figures_of(page)["front"]["data"] for text in trace.get("customdata", [])]
    assert any("&lt;b&gt;cats" in text for text in hover)
    assert not any("<b>cats" in text for text in hover)


def test_the_command_can_be_pasted_into_a_shell(run: Path) -> None:
    words = ["vitnas", "run", "tour", "budget=macs<=40M and params<=1M"]
    replace(Manifest.read(run), command=shlex.join(words)).write(run)
    (command,) = re.findall(r"<pre><code>(vitnas run .*?)</code>", page_of(run))
    assert shlex.split(unescape(command)) == words


def test_nothing_is_loaded_from_elsewhere(finished: Path) -> None:
    page = page_of(finished)
    for link in re.findall(r"""(?:src|href)=["']([^"']+)|url\(([^)]+)""", page):
        assert not re.match(r"(?:https?:)?//", link[0] or link[1]), link
    assert "default-src 'none'" in page
    assert page.count("/* plotly.js */") == 1


def test_half_a_run_names_what_is_missing(tmp_path: Path) -> None:
    write_atomic(tmp_path / "run" / "run.yaml", "recipe: digits\n")
    page = page_of(tmp_path / "run")
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
    assert "with weights inherited from the Supernet; not retrained yet" in page
    assert "retrain: missing" in page
    assert "search: missing" not in page
    chosen = SearchRecord.read(run).chosen
    assert chosen is not None
    assert ArchFile.read(run / "front" / chosen).arch.describe() in page


def test_unmeasured_numbers_are_called_so(run: Path) -> None:
    folder = run / "models" / "chosen"
    replace(Result.read(folder), test_accuracy=None, n_test=None).write(folder)
    (run / "test_reads.json").unlink()
    page = page_of(run)
    assert re.search(r"% on 36 holdout images \(95 % CI [^)]*\); test not measured", page)
    assert "Test split read: never." in page


def test_few_pairs_are_too_few_to_tell(run: Path) -> None:
    assert "2 Archs of about equal cost are too few to tell" in page_of(run)


def test_files_that_cannot_be_read_are_named_and_not_fatal(run: Path) -> None:
    (run / "search.json").write_text("{")
    (run / "feasibility.json").write_text('"text"')
    (run / "correlation.json").write_text('{"points": 3}')
    (run / "models" / "chosen" / "arch.json").write_text('{"schema": 99}')
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write("not json\n")
    page = page_of(run)
    assert "search.json cannot be read" in page
    assert "feasibility.json cannot be read (&#34;text&#34; is not an object)" in page
    assert "correlation.json cannot be read (&#39;how&#39; is missing)" in page
    assert "models/chosen/arch.json cannot be read (the Arch&#39;s schema is 99" in page
    assert "metrics.jsonl cannot be read at line" in page
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
    search = SearchRecord.read(run)
    more = [
        replace(trial, number=n, arch_id=f"{trial.arch_id}-{n}") for n in range(50) for trial in search.trials
    ]
    trials = (*search.trials, *more)
    replace(search, trials=trials, num_scored=len(trials)).write(run)
    whole = figures_of(page_of(run))["front"]["data"]
    monkeypatch.setattr(plots, "MAX_POINTS", 100)
    page = page_of(run)
    thinned = figures_of(page)["front"]["data"]
    assert 70 <= len(thinned[0]["x"]) <= 100 < len(whole[0]["x"])
    assert thinned[1:] == whole[1:]
    assert "306 scored trials, thinned evenly for drawing" in page


def test_charts_are_what_plotly_reads(run: Path) -> None:
    """plotly's Python objects refuse an unknown name or a wrong value; plotly.js would pass over it in silence."""
    for figure in figures_of(page_of(run)).values():
        go.Figure(figure)


def make_arch(*stages: tuple[int, int], head_dim: int = 64) -> Arch:
    """An Arch with differing blocks; stages are (width, depth)."""
    rng = random.Random(0)
    made = [
        tuple(
            Block(
                num_heads=max(1, width // head_dim) + rng.choice((0, 1)),
                head_dim=head_dim,
                mlp_hidden=width * rng.choice((3, 4)),
            )
            for _ in range(depth)
        )
        for width, depth in stages
    ]
    built = [Stage(embed_dim=width, blocks=blocks) for (width, _), blocks in zip(stages, made, strict=True)]
    return Arch(image_size=64, patch_size=8, in_chans=3, num_classes=10, stages=tuple(built))


def test_block_costs_add_up_to_the_count() -> None:
    arch = make_arch((192, 5))
    rows, cost = block_costs(arch), count(arch)
    assert [row[0] for row in rows] == ["stem", "1", "2", "3", "4", "5", "head"]
    assert sum(sum(row[1:4]) for row in rows) == cost.macs
    assert sum(row[4] for row in rows) == cost.params
    assert rows[0][1:3] == (0, 0)
    assert min(rows[1][1:3]) > 0


def test_block_costs_of_what_stands_in_front_of_a_block_are_the_blocks() -> None:
    made = make_arch((192, 2), (192, 3))
    first, second, third = made.stages[1].blocks
    stage = replace(made.stages[1], blocks=(first, replace(second, keep=9), third))
    arch = replace(made, stages=(made.stages[0], stage), selector="predictor")
    rows, cost = block_costs(arch), count(arch)
    assert [row[0] for row in rows] == ["stem", "1", "2", "3", "4", "5", "head"]
    assert [row[3] > 0 for row in rows] == [True, False, False, True, True, False, True]
    assert sum(sum(row[1:4]) for row in rows) == cost.macs
    assert sum(row[4] for row in rows) == cost.params
    svg = draw(arch)
    assert svg.count("9 of 16 patches (predictor)") == 2  # seen, and told
    _check_frame(svg)


@pytest.mark.parametrize("depth", [1, 12, 30])
def test_drawing_has_a_row_per_block_inside_its_frame(depth: int) -> None:
    arch = make_arch((192, depth))
    svg = draw(arch)
    assert svg.count('class="attention"') == svg.count('class="mlp"') == depth
    assert svg.count('class="tick"') == sum(block.num_heads - 1 for block in arch.blocks)
    _check_frame(svg)


def test_drawing_of_several_stages_keeps_one_scale() -> None:
    made = make_arch((64, 2), (320, 4), (1280, 2), head_dim=32)
    arch = replace(made, image_size=(64, 96))
    svg = draw(arch)
    assert "image 64×96×3 → patches 8×8 → 97 tokens" in svg
    assert "stage 3" in svg
    assert "embedding 1280" in svg
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="\d+" rx="2" class="attention"', svg)]
    ratio = arch.blocks[-1].num_heads / arch.blocks[0].num_heads
    assert widths[-1] == pytest.approx(ratio * widths[0], rel=0.05)
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
