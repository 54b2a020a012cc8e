"""Numbers as the report and the command line write them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import rich.console
from synthetic_run import make_run_folder, read

from vitnas.report import front_table, tables
from vitnas.report.plots import thin


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


def test_final_table_prints_brackets_as_they_are() -> None:
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(front_table({"rows": [{"name": "[red]x[/red]"}]}))
    assert "[red]x[/red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_long_curves_become_means_of_equal_runs() -> None:
    x, y = thin([(float(i), float(i % 2)) for i in range(6000)])
    assert len(x) == 600
    assert x[-1] == 5999
    assert set(y) == {0.5}
    assert thin([]) == ([], [])
