"""`vitnas bench mixers`: rows, break-even counts, table, page and refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitnas.cli import main
from vitnas.errors import UserError
from vitnas.measure.memory import peak_bytes_of
from vitnas.measure.mixers import bench_mixers, break_even, growth, verdict


def rows_of(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"mixer": word, "tokens": 4**place, "direction": "forward", "median_ms": ms, "memory_bytes": 99 * 4**place}
        for word, many in times.items()
        for place, ms in enumerate(many, 2)
    ]  # fmt: skip


def test_break_even_is_from_where_on_it_stays_faster() -> None:
    rows = rows_of({"softmax": [1, 2, 3, 4], "a": [0.5, 3, 2, 1], "b": [2, 2, 4, 5], "c": [0, 0, 0, 9]})
    assert break_even(rows, "forward") == {"a": 256, "b": None, "c": None}
    assert growth(rows, "forward") == pytest.approx({"softmax": 1, "a": 1, "b": 1, "c": 1})
    told = " ".join(verdict(rows))
    assert "softmax is never the fastest" in told
    assert "a from 256" in told
    assert "Never faster up to 1024 tokens: b, c" in told
    told = " ".join(verdict([row for row in rows if row["mixer"] != "softmax"]))
    assert "softmax was not measured" in told
    assert "ever" not in told
    slow = rows_of({"softmax": [1, 1], "a": [2, 2]})
    assert "softmax is the fastest at 16, 64 tokens" in verdict(slow)[0]


def test_rows_hold_every_mixer_both_ways() -> None:
    rows = bench_mixers(tokens=(16, 36), dim=16, heads=2, seconds=0.001)
    assert len({(row["mixer"], row["tokens"], row["direction"]) for row in rows}) == len(rows) == 8 * 2 * 2
    assert all(row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["runs"] >= 5 for row in rows)
    for row in rows:
        if row["direction"] == "forward":
            both = next(
                other for other in rows if (other["mixer"], other["tokens"]) == (row["mixer"], row["tokens"])
                and other["direction"] != "forward"
            )  # fmt: skip
            assert 0 < row["memory_bytes"] <= both["memory_bytes"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tokens": (65,)}, r"tokens has 65; it must be a square .* Nearest: 64"),
        ({"tokens": (-4,)}, r"tokens has -4; .* Nearest: 4"),
        ({"tokens": ()}, r"tokens is empty"),
        ({"device": "gpu"}, r"device is 'gpu'; it must be cpu, cuda or cuda:NUMBER"),
        ({"device": "meta"}, r"device is 'meta'; it must be cpu"),
        ({"device": "cuda:x"}, r"device is 'cuda:x'; it must be cpu"),
        ({"device": "cuda:99"}, r"device is 'cuda:99', but torch sees"),
        ({"mixers": ["softmx"]}, r"mixers has 'softmx'; known are fourier"),
        ({"dim": 10, "heads": 4}, r"dim is 10; it must be a multiple of heads 4\. Nearest: 8"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bench_mixers(**options)


def test_what_is_named_twice_is_measured_once() -> None:
    rows = bench_mixers(tokens=(16, 16), mixers=["softmax", "softmax"], dim=16, heads=2, seconds=0.001)
    assert len(rows) == 2
    assert growth(rows, "forward") == {}


def test_gradients_of_an_earlier_call_are_not_held_before() -> None:
    """On a GPU they would be taken off what a call holds."""
    module, x = nn.Linear(4, 4), torch.ones(2, 4)
    module(x).sum().backward()
    seen: list[bool] = []
    peak_bytes_of(module, x, lambda: seen.append(module.weight.grad is None))
    assert seen == [True]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "mixers", "tokens=[16, 36]", "dim=16", "heads=2", "seconds=0.001", f"folder={tmp_path}"]
    assert main([*words, "mixers=softmax,nystrom"]) == 0
    told = capsys.readouterr().out
    assert "forward and backward" in told
    assert "nystrom" in told
    assert (tmp_path / "mixers.csv").read_text().startswith("mixer,tokens,direction")
    page = (tmp_path / "mixers.html").read_text()
    assert "Plotly.newPlot" in page
    # Plotly's code holds addresses.
    tags = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page, flags=re.DOTALL)
    assert not re.search(r"<[^>]+ (?:src|href)=.?http", tags)
    assert main(["bench", "mixers", "token=16"]) == 2
    assert "Nearest: 'tokens'" in capsys.readouterr().err
    assert main(["bench", "mixers", "dim=big"]) == 2
    assert "dim is 'big'" in capsys.readouterr().err
    assert main(["bench", "mixers", "seconds=inf"]) == 2
    assert "seconds is 'inf'" in capsys.readouterr().err
