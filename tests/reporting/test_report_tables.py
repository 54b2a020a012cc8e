"""Numbers as the report and the command line write them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import rich.console
from synthetic_run import make_run_folder, read

from vitnas.reporting import front_table, tables
from vitnas.reporting.files import RunFiles
from vitnas.reporting.plots import describer, thin
from vitnas.space import autoformer


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (352, 360, 0.9568, 0.9887), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_meets_published_values(correct: int, n: int, low: float, high: float) -> None:
    """81 of 263 is the worked example of Newcombe (1998), method 3; the first two are closed forms."""
    assert tables.wilson(correct, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"correct is {correct} of n = {n}; an interval needs"):
        tables.wilson(correct, n)


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
        (float("nan"), "MACs", "not measured"),
        (True, "", "not measured"),
    ],
)
def test_number(value: object, unit: str, text: str) -> None:
    assert tables.number(value, unit) == text


def test_accuracy_names_split_and_n() -> None:
    assert tables.accuracy_text(352 / 360, 360, "test") == "97.8 % on 360 test images (95 % CI 95.7–98.9 %)"
    assert tables.accuracy_text(0.5, None, "test") == "50.0 % on test images (n not recorded)"
    assert tables.accuracy_text(None, 360, "test") == "not measured"
    assert tables.percent(97.8) == "97.8 (not a fraction)"


def test_latency_always_has_a_spread_or_says_so() -> None:
    assert (
        tables.latency_text({"median_ms": 7.41, "p10_ms": 7.2, "p90_ms": 7.8})
        == "7.41 ms (p10 7.20, p90 7.80)"
    )
    assert tables.latency_text(7.41) == "7.41 ms (spread not measured)"
    assert (
        tables.latency_text({"onnxruntime": {"median": 7}, "torch": None})
        == "onnxruntime: 7.00 ms (spread not measured)"
    )
    assert tables.latency_text({}) == "not measured"


def test_final_table_lists_the_three_models(tmp_path: Path) -> None:
    results = read(make_run_folder(tmp_path, num_trials=5) / "results.json")
    results["rows"][0] |= {
        "test_accuracy": 352 / 360,
        "n_test": 360,
        "params": 5_912_000,
        "macs": 1_281_000_000,
    }
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(front_table(results))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "hand-scaled ViT" in text
    assert "random search" in text
    assert "97.8 %" in text
    assert "95.7–98.9 %" in text
    assert "not measured" in text  # the other rows hold no accuracy


def test_final_table_is_whole_in_80_columns() -> None:
    latency = {f"{runtime},batch=1": {"median_ms": 10.04} for runtime in ("onnxruntime", "torch")}
    common = {
        "test_accuracy": 0.975,
        "n_test": 360,
        "params": 45_700,
        "macs": 1_160_000,
        "latency_ms": latency,
    }
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(front_table({"rows": [{"role": role, **common} for role in ("chosen", "hand_scaled")]}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert "accuracy on 360 test images" in text


def test_final_table_prints_brackets_as_they_are() -> None:
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(front_table({"rows": [{"name": "[red]x[/red]"}]}))
    assert "[red]x[/red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_long_curves_become_means_of_equal_runs() -> None:
    points = thin([(float(i), float(i % 2)) for i in range(6000)])
    assert len(points) == 600
    assert points[-1] == (5999, 0.5)
    assert thin([]) == []


def test_hover_shows_the_genes_of_the_blocks_that_are_there(tmp_path: Path) -> None:
    space = autoformer("tiny", image_size=32, patch_size=4, num_classes=10)
    run = RunFiles(tmp_path, space=json.loads(json.dumps(space.to_json())))
    genes = space.encode(space.smallest())
    text = describer(run)({"arch_id": "a", "number": 3, "genes": list(genes), "values": {"accuracy": 0.5}})
    depth = space.smallest().depth
    assert "trial 3" in text
    assert "accuracy 50.00 %" in text
    assert f"depth: {depth}<br>num_heads: {' '.join(['3'] * depth)}<br>" in text


def test_manifest_lists_are_cut_and_say_so() -> None:
    rows = tables.keyed({"data": {"counts": list(range(1000))}, "git": None}).rows
    assert rows[0][0] == "data.counts"
    assert rows[0][1].endswith("18, 19, … 1000 in all")
    assert rows[1] == ("git", "none")


def test_latency_shows_the_percentiles_it_has() -> None:
    record = {"runtime": "torch", "batch": 1, "median_ms": 2.0, "p25_ms": 1.9, "p75_ms": 2.1, "trusted": True}
    table = tables.latency([record])
    cells = dict(zip(table.headers, table.rows[0], strict=True))
    assert cells["Median"] == "2.00 ms"
    assert cells["Spread"] == "p25 1.90, p75 2.10"
    assert cells["Trusted"] == "yes"
    assert cells["Device"] == "not measured"
