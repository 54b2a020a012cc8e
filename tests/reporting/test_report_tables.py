"""Numbers as the report and the command line write them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import rich.console

from vitnas.records import LatencyRecord, Manifest, Results
from vitnas.reporting import front_table, tables
from vitnas.reporting.files import read_run
from vitnas.reporting.plots import describer, thin
from vitnas.space import space_from_json
from vitnas.train.evaluate import wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (352, 360, 0.9568, 0.9887), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_meets_published_values(correct: int, n: int, low: float, high: float) -> None:
    """81 of 263 is the worked example of Newcombe (1998), method 3; the first two are closed forms."""
    assert wilson(correct, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"correct is {correct} of n = {n}; an interval needs"):
        wilson(correct, n)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1_280_000_000, "MACs", "1.28 GMACs"),
        (5_912_000, "", "5.91M"),
        (999_600, "", "1.00M"),
        (42, "", "42"),
        (48.2, "s", "48.2 s"),
        (0, "B", "0 B"),
        (None, "MACs", "not measured"),
    ],
)
def test_number(value: float | None, unit: str, text: str) -> None:
    assert tables.number(value, unit) == text


def test_accuracy_names_split_and_n() -> None:
    assert tables.accuracy_text(352 / 360, 360, "test") == "97.8 % on 360 test images (95 % CI 95.7–98.9 %)"
    assert tables.percent(None) == "not measured"


def text_of(results: Results, width: int = 160) -> str:
    """The final table as a terminal of that width shows it."""
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(front_table(results))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_final_table_lists_the_three_models(finished: Path) -> None:
    results = Results.read(finished)
    first = replace(results.rows[0], test_accuracy=352 / 360, n_test=360, start="inherited")
    text = text_of(replace(results, rows=(first, *(replace(row, n_test=360) for row in results.rows[1:]))))
    assert "hand-scaled ViT" in text
    assert "random search" in text
    assert "chosen, from the supernet" in text
    assert "97.8 %" in text
    assert "95.7–98.9 %" in text
    assert "Same budget, three ways to spend it; accuracy on 360 test images" in text


def test_final_table_says_what_it_holds(finished: Path) -> None:
    results = Results.read(finished)
    alone = text_of(replace(results, rows=results.rows[:1]))
    assert "Accuracy on 240 test images" in alone
    assert "ways" not in alone
    assert "Same budget, two ways" in text_of(replace(results, rows=results.rows[:2]))
    other = replace(results.rows[1], role="mine", asked="vitas_a")  # of whatever budget
    assert "Same budget" not in text_of(replace(results, rows=(results.rows[0], other)))


def test_final_table_is_whole_in_80_columns(finished: Path) -> None:
    results = Results.read(finished)
    latency = replace(results.rows[0].latency_ms["onnxruntime"], median_ms=10.04)
    timed = {f"{runtime},batch=1": latency for runtime in ("onnxruntime", "torch")}
    rows = tuple(replace(row, latency_ms=timed, params=45_700, macs=1_160_000) for row in results.rows)
    text = text_of(replace(results, rows=rows), width=80)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count("1.16M") == 3


def test_final_table_prints_brackets_as_they_are(finished: Path) -> None:
    results = Results.read(finished)
    odd = replace(results.rows[0], role="[red]x[/red]")
    assert "[red]x[/red]" in text_of(replace(results, rows=(odd,)))


def test_long_curves_become_means_of_equal_runs() -> None:
    points = thin([(float(i), float(i % 2)) for i in range(6000)])
    assert len(points) == 600
    assert points[-1] == (5999, 0.5)
    assert thin([]) == []


def test_hover_shows_the_genes_of_the_blocks_that_are_there(finished: Path) -> None:
    run = read_run(finished)
    assert run.search is not None
    assert run.space is not None
    space, trial = space_from_json(run.space.space), run.search.trials[0]
    for arch in (space.smallest(), space.largest()):
        text = describer(run)(replace(trial, arch_id="other", genes=space.encode(arch)))
        assert f"trial {trial.number}" in text
        assert f"accuracy {100 * trial.values['accuracy']:.2f} %" in text
        heads = " ".join(str(block.num_heads) for block in arch.blocks)
        assert f"depth: {arch.depth}<br>num_heads: {heads}<br>" in text


def test_manifest_lists_are_cut_and_say_so(finished: Path) -> None:
    manifest = Manifest.read(finished)
    data = replace(manifest.data, counts={"train": tuple(range(1000))})
    rows = dict(tables.keyed(replace(manifest, data=data, git=None)).rows)
    assert rows["data.counts.train"].endswith("18, 19, … 1000 in all")
    assert rows["git"] == "none"
    assert "environment.torch" in rows


def test_latency_says_what_it_depends_on(finished: Path) -> None:
    row = LatencyRecord.read(finished / "export").rows[0]
    calm = replace(row.latency, median_ms=2.0, p25_ms=1.9, p75_ms=2.1, p05_ms=1.8, p95_ms=2.2, trusted=True)
    wild = replace(calm, p75_ms=2.3, trusted=False)
    table = tables.latency(LatencyRecord(tuple(replace(row, latency=each) for each in (calm, wild))))
    first, second = (dict(zip(table.headers, cells, strict=True)) for cells in table.rows)
    assert first["Median"] == "2.00 ms"
    assert first["Spread"] == "p5 1.80, p95 2.20"
    assert (first["Trusted"], second["Trusted"]) == ("yes", "no: IQR 20 % of median")
    assert (first["Model"], first["Device"]) == ("chosen", "cpu")
