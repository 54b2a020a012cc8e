"""`vitnas bench tokens`: rows, break-even batches and counts, table and refusals."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from vitnas.cli import main
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.measure.tokens import PLAIN, TokenBench, bench_tokens, break_even, verdict

SMALL = TokenBench(
    selectors=("evit", "pool"), keep=(0.5,), tokens=(16,), batch=(1, 2), runtimes=("torch",),
    dim=16, depth=4, heads=2, runs=2, seconds=0.01,
)  # fmt: skip


def rows_of(speedups: dict[str, list[float]], axis: str) -> list[dict[str, Any]]:
    other = {"batch": "tokens", "tokens": "batch"}[axis]
    return [
        {"selector": word, "keep": 0.7, axis: 4**place, other: 1, "runtime": "torch", "speedup": speedup}
        for word, many in {PLAIN: [1.0] * 3, **speedups}.items()
        for place, speedup in enumerate(many)
    ]


@pytest.mark.parametrize("axis", ["batch", "tokens"])
def test_break_even_is_from_where_on_it_stays_faster(axis: str) -> None:
    rows = rows_of({"evit": [0.9, 1.1, 1.2], "pool": [1.5, 0.9, 1.2], "merge": [2, 2, 1.005]}, axis)
    want = {("evit", 0.7): 4, ("pool", 0.7): 16, ("merge", 0.7): None}
    assert break_even(rows, axis, "torch") == want
    assert break_even(rows, axis, "onnxruntime") == {}
    told = " ".join(verdict(rows))
    assert "evit 0.7 from 4, pool 0.7 from 16. Not faster at the largest: merge 0.7" in told


def test_the_defaults_can_be_measured() -> None:
    """No selector refuses them (pooling needs even sides)."""
    bench = TokenBench()
    for tokens in bench.tokens:
        archs = [arch for _, _, arch in bench.archs(tokens)]
        assert len(archs) == 1 + 3 * len(bench.selectors) - 2
        assert max(count(arch).macs for arch in archs) == count(archs[0]).macs


def test_rows_hold_every_network_beside_the_plain_one() -> None:
    rows = bench_tokens(SMALL)
    assert [(row["selector"], row["batch"], row["left"]) for row in rows] == [
        (word, batch, left) for batch in (1, 2) for word, left in ((PLAIN, 16), ("evit", 2), ("pool", 4))
    ]
    for row, (_, _, arch) in zip(rows, [*SMALL.archs(16)] * 2, strict=True):
        assert row["macs"] == count(arch).macs
        assert row["p25_ms"] <= row["median_ms"] <= row["p75_ms"]
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["median_ms"] * 1e3, rel=1e-3)


def test_the_command_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "selectors=first keep=0.5 tokens=16 batch=1 runtimes=torch dim=16 depth=4 heads=2 runs=1 seconds=0.01"
    )
    assert main(["bench", "tokens", *words.split(), f"folder={tmp_path}"]) == 0
    with open(tmp_path / "tokens.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["selector"] for row in rows] == [PLAIN, "first"]
    assert "torch: ms per image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"selectors": ("evt",)}, r"'evt'; .* Nearest: 'evit'"),
        ({"tokens": (50,)}, r"tokens has 50; it must be a square .* Nearest: 49"),
        ({"keep": (1.0,)}, r"keep has 1\.0; a share lies between 0 and 1"),
        ({"batch": (0,)}, r"batch has 0; it must be at least 1"),
        ({"depth": 1}, r"depth is 1; .* at least 2"),
        ({"runtimes": ()}, r"runtimes is empty"),
        ({"device": "gpu"}, r"device is 'gpu'; it must be cpu, cuda"),
        ({"dim": 10, "heads": 3}, r"dim is 10; it must be a multiple of heads 3\. Nearest: 9"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TokenBench(**options)
