"""A slimmed network in tables: what each effort takes, and the original beside what was made of it."""

from __future__ import annotations

from collections.abc import Sequence

from vitnas.budget import Budget, Cost, format_quantity
from vitnas.measure.latency import Latency
from vitnas.records import Forecast, Member, SlimResults, SlimRow
from vitnas.reporting.tables import MISSING, Table, number, percent, significant
from vitnas.searching import Feasibility
from vitnas.slimming import Agreement
from vitnas.train.progress import duration

EFFORTS = {
    "fold": "what is removed is made up for in closed form; nothing is trained",
    "recover": "the same, and the chosen one learns from MODEL",
    "search": "a supernet learns from MODEL first; then search and recovery",
}


def cost_text(cost: Cost) -> str:
    """`1.26 GMACs, 5.7M params, 12.3 ms on onnxruntime,batch=1`."""
    times = [f"{significant(ms)} ms on {target}" for target, ms in cost.latency_ms.items()]
    return ", ".join([number(cost.macs, "MACs"), f"{number(cost.params)} params", *times])


def reach(found: Feasibility) -> list[str]:
    """For each limit, what networks can be had."""
    lines = []
    for row in found.rows:
        if row.space_min is not None and row.space_max is not None:
            quantity = row.quantity.partition(" ")[0]
            ends = [_amount(end, quantity) for end in (row.space_min, row.space_max)]
            (limit,) = Budget.parse(row.requested).limits
            asked = [
                f"{word} {_amount(bound, quantity)}"
                for word, bound in (("at least", limit.low), ("at most", limit.high))
                if bound is not None
            ]
            lines.append(f"{limit.name} {' and '.join(asked)}: from {ends[0]} to {ends[1]} can be had")
    return lines


def _amount(value: float, quantity: str) -> str:
    """As `format_quantity`, but small networks take hundredths of a millisecond, which shares of them show."""
    return f"{significant(value)}ms" if quantity == "latency" else format_quantity(value, quantity)


def forecast(found: Forecast, *, short: bool = False) -> Table:
    """Each effort's time on this machine; the one that is taken stands out. `short`: without what an effort does."""
    rows = []
    for row in found.efforts:
        epochs = ", ".join(f"{name} {significant(epochs, 2)} epochs" for name, epochs in row.epochs.items())
        note = "asked for" if found.asked else "the largest that fits"
        taken = note if row.effort == found.effort else "" if row.fits else "does not fit"
        does = () if short else (EFFORTS[row.effort],)
        rows.append((row.effort, duration(row.seconds), epochs, *does, taken))
    strong = [row.effort for row in found.efforts].index(found.effort)
    does = () if short else ("What it does",)
    headers = ("Effort", "Takes about", "Training", *does, f"In {duration(found.time_s)}")
    return Table(headers, tuple(rows), numeric=(1,), strong=strong)


def comparison(results: SlimResults) -> Table:
    """The original, the chosen one and the front: cost, agreement, accuracy, latency."""
    original = results.rows[0]
    targets = list(dict.fromkeys(target for row in results.rows for target in row.latency_ms))
    labelled, classed = original.accuracy is not None, original.agreement.top1 is not None
    headers = ["Network", "MACs", "Params", "Cosine"]
    headers += ["Same top-1"] * classed + ["Accuracy"] * labelled
    headers += [each for target in targets for each in (f"ms, {target.replace(',', ', ')}", "Faster")]
    rows = []
    for row in results.rows:
        found, share = row.agreement, percent(row.cost.macs / original.cost.macs, 0)
        cells = [_name(row), f"{number(row.cost.macs)} ({share})", number(row.cost.params), cosine(found)]
        cells += [percent(found.top1)] * classed + [percent(row.accuracy)] * labelled
        for target in targets:
            cells += _against(row.latency_ms.get(target), original.latency_ms.get(target))
        rows.append(tuple(cells))
    return Table(tuple(headers), tuple(rows), numeric=tuple(range(1, len(headers))), strong=1)


def members(found: Sequence[Member]) -> Table:
    """Networks of the front, each with the budget that it was made for; agreement is on held-out images."""
    classed = any(each.agreement.top1 is not None for each in found)
    rows = []
    for each in found:
        agreed = each.agreement
        cells = [each.folder, each.budget, number(each.cost.macs), number(each.cost.params), cosine(agreed)]
        rows.append((*cells, *[percent(agreed.top1)] * classed))
    headers = ("Network", "Budget", "MACs", "Params", "Cosine", *["Same top-1"] * classed)
    return Table(headers, tuple(rows), numeric=(2, 3, 4, 5))


def cosine(found: Agreement) -> str:
    """Of the final tokens, or where some are gone of what is pooled."""
    return f"{found.cosine:.3f}"


def _name(row: SlimRow) -> str:
    return "MODEL" if row.role == "original" else row.role


def _against(own: Latency | None, first: Latency | None) -> Sequence[str]:
    if own is None or first is None:
        return MISSING, ""
    return significant(own.median_ms), f"{first.median_ms / own.median_ms:.2f}x"
