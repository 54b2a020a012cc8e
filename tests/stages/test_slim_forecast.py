"""What `vitnas slim` says beforehand of the time that it takes, and what it does with the time that is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vitnas.recipes.slim import slim
from vitnas.records import Forecast
from vitnas.stages.slim.forecast import CALIBRATION, Amounts, Steps, forecast, to_shorten

STEPS = Steps(forward=0.02, train=0.1, fold_block=0.5, fold_image=0.01, export=2.0)
AMOUNTS = Amounts(
    images=None, holdout=100, test=1000, train=4000, batch_size=64, options=100, folded_options=0, blocks=12,
    members=5, formats=("onnx",), tables=0, clocks=1,
)  # fmt: skip


def told(time: str, effort: str | None = "fold", **amounts: Any) -> Forecast:
    run = slim()
    run = replace(run, slim=replace(run.slim, time=time, effort=effort))
    return forecast(run, STEPS, replace(AMOUNTS, **amounts))


def test_all_that_is_done_is_told() -> None:
    """Networks on the test split too, which can take longer than all else; what stays as it is with more images."""
    parts = told("10h", images=256).taken.parts
    assert parts["results"] == pytest.approx((1 + 5 * 2 / 3) * 1000 * 0.02)
    twice = told("10h", images=256, test=2000).taken
    assert twice.parts["results"] == pytest.approx(2 * parts["results"])
    assert twice.seconds == pytest.approx(sum(twice.parts.values()))
    more = told("10h", images=1024).taken.parts
    assert {name for name in parts if parts[name] != more[name]} == {"fold"}
    assert more["fold"] - parts["fold"] == pytest.approx(7 * 12 * 768 * 0.01)


def test_as_many_images_are_folded_by_as_there_is_time_for() -> None:
    """Never fewer than the least, nor more than there are; where there is training it has half of the time at least."""
    seconds = {n: told("10h", images=n).taken.seconds for n in CALIBRATION}
    for n in CALIBRATION:
        found = told(f"{seconds[n] + 1}s")
        assert (found.images, found.taken.seconds) == (n, seconds[n])
        assert told(f"{seconds[n] + 1}s", "recover").images <= n
        assert told(f"{2 * seconds[n] + 1}s", "recover").images == n
    assert told("1s").images == CALIBRATION[0]
    assert told("10h", train=700).images == 700
    assert told("10h", images=64).images == 64
    assert told(f"{seconds[512] + 1}s", None).effort == "fold"


def test_an_8_bit_file_takes_longer_and_what_shortens_a_run_is_told() -> None:
    """Ranges of half of 100 held-out images, twice; 48 layers by 50 of them, and all 100; of six networks."""
    plain, precise = told("10h", images=256), told("10h", images=256, formats=("onnx", "onnx_int8"))
    assert precise.taken.parts["files"] - plain.taken.parts["files"] == pytest.approx(
        6 * (2.0 + 0.02 * (2 * 50 + 48 * 50 + 100))
    )
    assert to_shorten(plain) == "what takes longest, fold, is shorter with fewer images="
    assert to_shorten(precise) == "what takes longest, files, is shorter with export.formats=[]"
    trained = told("10h", "recover", images=256)
    assert to_shorten(trained) == f"half as long: time={round(trained.taken.seconds / 120)}m"
