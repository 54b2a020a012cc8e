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


@pytest.mark.parametrize(
    ("text", "low", "high", "written"),
    [
        ("macs<=50%", None, 0.5, "macs<=50%"),
        ("macs <= 50 %", None, 0.5, "macs<=50%"),
        ("50%>=macs", None, 0.5, "macs<=50%"),
        ("macs<=0.5x", None, 0.5, "macs<=50%"),
        ("macs<=.5 X", None, 0.5, "macs<=50%"),
        ("macs<=1x", None, 1.0, "macs<=100%"),
        ("macs>=12.5%", 0.125, None, "macs>=12.5%"),
        ("30%<=macs<=0.5x", 0.3, 0.5, "30%<=macs<=50%"),
        ("macs in 30%..50%", 0.3, 0.5, "30%<=macs<=50%"),
        ("macs>=30% and macs<=50%", 0.3, 0.5, "30%<=macs<=50%"),
    ],
)
def test_shares(text: str, low: float | None, high: float | None, written: str) -> None:
    budget = Budget.parse(text)
    assert budget.limits == (Limit("macs", low, high, is_share=True),)
    assert (budget.text, budget.has_shares) == (written, True)


def test_shares_become_numbers_by_what_the_network_costs() -> None:
    full = Cost(macs=1001, params=100, memory_bytes=4000, latency_ms={"torch,batch=1": 8.5})
    budget = Budget.parse("30%<=macs<=50% and params<=29% and memory<=1KB and latency<=0.5x@torch,batch=1")
    found = budget.resolved(full)
    # 0.29 of 100 are 29 exactly, which floats would make 28.999...
    assert found.text == "301<=macs<=500 and params<=29 and memory<=1KB and latency<=4.25ms@torch,batch=1"
    assert found.resolved(full) == found
    assert not found.has_shares
    assert Budget.parse("latency<=50%").latency_targets == ("onnxruntime,batch=1",)
    with pytest.raises(UserError, match="latency on onnxruntime,batch=1 was not measured"):
        Budget.parse("latency<=50%").resolved(full)
    assert Budget.parse("params<=0.1%").resolved(full).text == "params<=1"


def test_shares_of_any_size_round_trip() -> None:
    rng = random.Random(0)
    for _ in range(300):
        low, high = sorted(rng.choice((rng.random(), 10 ** rng.uniform(-12, 0))) for _ in range(2))
        limits = (
            Limit("macs", low, high, is_share=True),
            Limit("params", None, round(high, 4), is_share=True)
            if round(high, 4)
            else Limit("params", None, 6),
            Limit("memory", low, None, is_share=True),
            Limit("latency", low, high, "torch,batch=1", is_share=True),
        )
        budget = Budget.of(limits)
        assert Budget.parse(budget.text) == budget
        macs = rng.randrange(10**12, 10**14)
        (limit,) = Budget.of((Limit("macs", None, high, is_share=True),)).resolved(Cost(macs, 1, 1)).limits
        assert limit.high is not None
        assert 0 <= high * macs - limit.high <= 1.01 or limit.high == 1


def test_shares_judge_nothing_before_they_are_numbers() -> None:
    budget = Budget.parse("macs<=50%")
    match = r"the limit macs<=50% is a share of what a network costs, and which network is not said\. Write"
    with pytest.raises(UserError, match=match):
        budget.misses(COST)
    with pytest.raises(UserError, match=match):
        budget.violation(COST)
    with pytest.raises(UserError, match=match):
        budget.mask({"macs": np.array([1.0])})


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
        (
            "macs<=150%",
            r"a share of macs is 150%; it must be above 0% and at most 100% of what the network costs",
        ),
        ("latency<=2x@torch,batch=1", r"a share of latency is 200%; it must be above 0%"),
        ("params<=0%", r"a share of params is 0%; it must be above 0%"),
        ("memory<=-5%", r"a share of memory is -5%; it must be above 0%"),
        ("macs<=1e-400%", r"a share of macs is 0%"),
        ("60%<=macs<=50%", r"the limit on macs is at least 60% and at most 50%; nothing meets both"),
        ("macs<=50%%", "cannot be read"),
        ("macs<=%", "cannot be read"),
        ("1M<=macs<=50%", r"has a share and a number; give both bounds in one way"),
        ("macs>=1M and macs<=50%", r"macs has a share and a number \(macs>=1M and macs<=50%\); give both"),
        ("latency<=50", r"latency takes us, ms, s, or a share as 50% or 0\.5x"),
        ("macs<=1M and", "budget part '' cannot be read; .* join several with ' and '"),
        ("and macs<=1M", "budget part '' cannot be read; .* join several with ' and '"),
        ("macs<=1M & & params<=1M", "budget part '' cannot be read; .* join several with ' and '"),
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
