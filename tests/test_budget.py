"""Budgets: the text people type, exact round trips, reasons, and what is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest

from vitnas.budget import Budget, Cost, Limit, exact_quantity, format_quantity
from vitnas.errors import UserError

COST = Cost(macs=1_410_000_000, params=5_868_136, memory_bytes=180_000_000)


@pytest.mark.parametrize(
    ("text", "quantity", "low", "high", "target"),
    [
        ("macs<=1.3G", "macs", None, 1.3e9, ""),
        ("macs < 1.3g", "macs", None, 1.3e9, ""),
        ("1.3G>=macs", "macs", None, 1.3e9, ""),
        ("macs≤1300M", "macs", None, 1.3e9, ""),
        ("params<=6M", "params", None, 6e6, ""),
        ("params >= 6_000_000", "params", 6e6, None, ""),
        ("6e6<=params", "params", 6e6, None, ""),
        ("0.9G<=macs<=1.0G", "macs", 0.9e9, 1e9, ""),
        ("1.0G >= macs >= 0.9G", "macs", 0.9e9, 1e9, ""),
        ("macs in 0.9G..1.0G", "macs", 0.9e9, 1e9, ""),
        ("macs in 1..2", "macs", 1, 2, ""),
        ("memory<=200MB", "memory", None, 200e6, ""),
        ("memory<=200MiB", "memory", None, 200 * 2**20, ""),
        ("latency<=8ms@onnxruntime,batch=1", "latency", None, 8.0, "onnxruntime,batch=1"),
        ("latency<=8ms @ torch, batch = 4", "latency", None, 8.0, "torch,batch=4"),
        ("latency<=8ms", "latency", None, 8.0, "onnxruntime,batch=1"),
        ("latency<=0.5s", "latency", None, 500.0, "onnxruntime,batch=1"),
        ("250µs<=latency<=1ms", "latency", 0.25, 1.0, "onnxruntime,batch=1"),
    ],
)
def test_one_limit(text: str, quantity: str, low: float | None, high: float | None, target: str) -> None:
    assert Budget.parse(text).limits == (Limit(quantity, low, high, target),)


@pytest.mark.parametrize("join", [" and ", "&", " ; ", "\n", ", ", ","])
def test_several_limits(join: str) -> None:
    parts = [
        "latency<=8ms@onnxruntime,batch=1,threads=2",
        "macs<=1.3G",
        "params<=6M",
        "latency>=1ms@torch,batch=1",
    ]
    budget = Budget.parse(join.join(parts))
    assert budget == Budget.parse(join.join(reversed(parts)))
    assert [limit.name for limit in budget.limits] == [
        "macs",
        "params",
        "latency on onnxruntime,batch=1,threads=2",
        "latency on torch,batch=1",
    ]
    assert budget.latency_targets == ("onnxruntime,batch=1,threads=2", "torch,batch=1")
    assert [limit.quantity for limit in budget.counted.limits] == ["macs", "params"]


def test_keywords_and_joined_bounds_equal_text() -> None:
    assert Budget(macs=(0.9e9, 1.0e9), params=6e6) == Budget.parse("params<=6M; 0.9G<=macs<=1.0G")
    assert Budget.parse("macs>=0.9G and macs<=1G") == Budget(macs=(0.9e9, 1e9))
    assert Budget(latency_ms={"torch,batch=1": (None, 8)}) == Budget.parse("latency<=8ms@torch,batch=1")
    assert Budget(latency_ms=8) == Budget.parse("latency<=8ms")
    assert Budget(memory_bytes=2e8) == Budget.parse("memory<=0.2GB")
    assert not Budget.parse("  ")
    assert Budget() == Budget.parse("")
    assert str(Budget()) == ""


def test_text_round_trips_exactly() -> None:
    rng = random.Random(0)
    for _ in range(300):
        low, high = sorted(rng.uniform(1, 10 ** rng.uniform(1, 12)) for _ in range(2))
        limits = (
            Limit("macs", float(round(low)), float(round(high) + 1)),
            Limit("params", None, high),
            Limit("memory", low, None),
            Limit("latency", low, high, "torch,batch=1"),
        )
        budget = Budget.of(limits)
        assert Budget.parse(budget.text) == budget


def test_reasons() -> None:
    assert Budget.parse("macs<=1.3G").misses(COST) == ["macs are 1.41G; the budget allows at most 1.30G"]
    assert Budget.parse("params>=6M").misses(COST) == ["params are 5.87M; the budget allows at least 6.00M"]
    assert Budget.parse("memory<=100MB").misses(COST) == [
        "memory is 180.00MB; the budget allows at most 100.00MB"
    ]
    assert Budget.parse("macs<=1.3G and params<=5M and memory<=1GB").misses(COST) == [
        "macs are 1.41G; the budget allows at most 1.30G",
        "params are 5.87M; the budget allows at most 5.00M",
    ]
    # Numbers that would look alike get more digits.
    assert Budget.parse("macs<=1409999000").misses(COST) == [
        "macs are 1.410000G; the budget allows at most 1.409999G"
    ]
    timed = Cost(macs=1, params=1, memory_bytes=1, latency_ms={"onnxruntime,batch=1": 9.1})
    assert Budget.parse("latency<=8ms").misses(timed) == [
        "latency on onnxruntime,batch=1 is 9.10ms; the budget allows at most 8.00ms"
    ]
    assert Budget.parse("0.9G<=macs<=1.41G").misses(COST) == []  # bounds are inside


def test_violation_is_normalised_and_sums() -> None:
    cost = Cost(macs=120, params=50, memory_bytes=1)
    assert Budget(macs=100, params=(100, None)).violation(cost) == pytest.approx(0.2 + 0.5)
    assert Budget(macs=120, params=(50, None)).violation(cost) == 0
    assert Budget(macs=100, params=50).violations(cost) == pytest.approx(
        {"macs<=100": 0.2, "params<=50": 0.0}
    )


def test_mask_agrees_with_misses() -> None:
    rng = np.random.default_rng(0)
    costs = {name: rng.integers(1, 100, 500) for name in ("macs", "params", "memory")}
    budget = Budget(macs=(20, 70), params=(None, 80), memory_bytes=(10, None))
    expected = [
        not budget.misses(Cost(int(m), int(p), int(b)))
        for m, p, b in zip(costs["macs"], costs["params"], costs["memory"], strict=True)
    ]
    assert budget.mask(costs).tolist() == expected
    assert 0 < sum(expected) < 500
    assert Budget().mask(costs).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flops<=2G", r"flops is ambiguous; a budget counts MACs, and 1 MAC = 2 FLOPs\. Write macs"),
        ("GFLOPs<=2", "1 MAC = 2 FLOPs"),
        ("parms<=6M", r"quantity is 'parms'; a budget limits macs, params, .* Nearest: 'params'"),
        ("macs<=1.3Q", r"has unit 'Q'; macs takes K, M, G, T"),
        ("memory<=200Mb/s", "cannot be read"),
        ("memory<=200KiBs", r"memory takes B, KB, .* Nearest: 'KiB'"),
        ("memory<=200", r"has no unit; memory takes"),
        ("latency<=8", r"has no unit; latency takes us, ms, s"),
        ("macs=1G", r"budget part 'macs=1G' cannot be read; write quantity<=number"),
        ("macs<=1G params<=6M", "join several with ' and '"),
        ("macs<=", "cannot be read"),
        ("macs<=1.2.3G", r"has the number '1\.2\.3'"),
        ("macs<=-1G", "it must be a positive number"),
        ("macs<=0", "it must be a positive number"),
        ("macs>=2G and macs<=1G", r"at least 2G and at most 1G; nothing meets both"),
        ("macs<=2G and macs<=1G", "macs has two upper bounds"),
        ("macs<=1G@torch", "only latency has one"),
        ("latency<=8ms@", "has nothing after '@'"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Budget.parse(text)


def test_refused_keywords() -> None:
    with pytest.raises(UserError, match="nothing meets both"):
        Budget(macs=(2, 1))
    with pytest.raises(UserError, match="has no bound"):
        Budget(macs=(None, None))
    with pytest.raises(UserError, match="one upper bound or a pair"):
        Budget(macs=(1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="it must be a positive number"):
        Budget(params=float("nan"))


def test_latency_that_was_not_measured_is_an_error_not_a_pass() -> None:
    with pytest.raises(UserError, match=r"onnxruntime,batch=1 was not measured \(measured: none\)"):
        Budget.parse("latency<=8ms").misses(COST)


@pytest.mark.parametrize(
    ("value", "quantity", "text"),
    [
        (1_283_000_000, "macs", "1.28G"),
        (999_999_999, "macs", "1.00G"),
        (5_868_136, "params", "5.87M"),
        (812, "params", "812"),
        (45_210, "params", "45.21K"),
        (200_000_000, "memory", "200.00MB"),
        (7.9, "latency", "7.90ms"),
    ],
)
def test_format(value: float, quantity: str, text: str) -> None:
    assert format_quantity(value, quantity) == text


def test_exact_text() -> None:
    assert exact_quantity(1.3e9, "macs") == "1.3G"
    assert exact_quantity(1_300_000_001, "macs") == "1.300000001G"
    with pytest.raises(UserError, match="quantity is 'watts'"):
        format_quantity(1, "watts")


def test_cost_is_hashable() -> None:
    assert len({COST, Cost(macs=1_410_000_000, params=5_868_136, memory_bytes=180_000_000)}) == 1
