"""What a learned sampler has learned, as charts: does it keep to its budgets, has it made up its mind, on what."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import cycle
from typing import Any

from vitnas.budget import format_quantity
from vitnas.reporting.files import Record
from vitnas.reporting.plots import COLOURS, Figure, _axis, _figure, _line, _when, thin
from vitnas.reporting.tables import MISSING, Table, is_number, percent


def told(metrics: Sequence[Record]) -> list[Record]:
    """The lines that the sampler wrote while it learned."""
    return [line for line in metrics if line.get("event") == "focus"]


def watched(metrics: Sequence[Record]) -> list[Record]:
    """Those that also say what the policy would draw per budget."""
    return [line for line in told(metrics) if line.get("budgets")]


def cost_ratio(metrics: Sequence[Record], quantity: str) -> Figure | None:
    """Mean cost of what the policy draws over the budget it was asked for, one line per anchor; 1 is on the spot."""
    lines = watched(metrics)
    if not lines:
        return None
    data = []
    for place, (budget, colour) in enumerate(zip(lines[0]["budgets"], cycle(COLOURS))):
        points = thin([(_when(line), line["cost_ratio"][place]) for line in lines])
        name = text_of(budget, quantity)
        data.append(_line(points, name, colour, f"{escape(name)}: %{{y:.2f}} of it at epoch %{{x:.1f}}"))
    return _figure(data, _axis("Epoch"), _axis("Expected cost / budget"), legend=True)


def entropy(metrics: Sequence[Record]) -> Figure | None:
    """Mean entropy of the decisions of a kind, over all anchors, in nats: 0 when the mind is made up."""
    lines = watched(metrics)
    if not lines:
        return None
    data = []
    for kind, colour in zip(lines[0]["entropy"], cycle(COLOURS)):
        points = [(_when(line), sum(line["entropy"][kind]) / len(line["entropy"][kind])) for line in lines]
        data.append(_line(thin(points), kind, colour, f"{escape(kind)}: %{{y:.2f}} nats at epoch %{{x:.1f}}"))
    return _figure(data, _axis("Epoch"), _axis("Entropy per decision, nats", rangemode="tozero"), legend=True)


def gain(metrics: Sequence[Record], span: int = 10) -> Figure | None:
    """Held-out loss of random Archs minus the policy's at equal cost; the mean over `span` looks beside the single
    ones."""
    points = [(_when(line), float(line["gain"])) for line in told(metrics) if is_number(line.get("gain"))]
    if not points:
        return None
    mean = [
        (points[i][0], sum(p[1] for p in points[max(0, i + 1 - span) : i + 1]) / min(span, i + 1))
        for i in range(len(points))
    ]
    single = {**_line(points, "each look", COLOURS[1], "%{y:.3f} nats at epoch %{x:.1f}"), "mode": "markers"}
    smooth = _line(thin(mean), f"mean of {span}", COLOURS[0], "%{y:.3f} nats at epoch %{x:.1f}")
    return _figure([single, smooth], _axis("Epoch"), _axis("Loss saved at equal cost, nats"), legend=True)


def preferences(summary: Record) -> Figure | None:
    """Per gene and budget the mean option, from the smallest (0) to the largest (1)."""
    found, options = summary.get("preferences"), summary.get("options")
    if not found or not options:
        return None
    names = [name for name, values in options.items() if len(values) > 1]
    budgets = [text_of(budget, str(summary.get("quantity", ""))) for budget in summary["budgets"]]
    shades, texts = [], []
    for name in names:
        last = len(options[name]) - 1
        # Where no Arch drawn has the block, the gene has no options to prefer: an empty cell, not the smallest one.
        shades.append(
            [
                sum(i * share for i, share in enumerate(row)) / last if any(row) else None
                for row in found[name]
            ]
        )
        texts.append([_shares(options[name], row) for row in found[name]])
    heat: Figure = {
        "type": "heatmap", "z": shades, "x": budgets, "y": names, "text": texts, "zmin": 0, "zmax": 1,
        "colorscale": "Viridis", "colorbar": {"title": {"text": "option"}, "tickvals": [0, 1], "ticktext":
        ["least", "most"]}, "hovertemplate": "%{y} at %{x}<br>%{text}<extra></extra>",
    }  # fmt: skip
    figure = _figure([heat], _axis("Budget", type="category"), _axis("", autorange="reversed", dtick=1))
    figure["layout"]["height"] = 120 + 18 * len(names)
    return figure


def _shares(options: Sequence[Any], row: Sequence[float]) -> str:
    return ", ".join(f"{option}: {share:.0%}" for option, share in zip(options, row, strict=True) if share)


def text_of(budget: float, quantity: str) -> str:
    """A budget as it would be typed."""
    kind = quantity.partition("@")[0] or "macs"
    return format_quantity(budget, kind)


def compared(summary: Record) -> Table:
    """Archs that the policy drew against random ones of equal cost: held-out accuracy with inherited weights."""
    rows = []
    for row in summary.get("compared", []):
        sides = [_side(row.get(side)) for side in ("policy", "random")]
        ratio = f"{row['cost_ratio']:.2f}" if is_number(row.get("cost_ratio")) else MISSING
        rows.append((text_of(row["budget"], str(summary.get("quantity", ""))), ratio, *sides))
    headers = ("Budget", "Mean cost / budget", "Drawn by the policy", "Random, equal cost")
    return Table(headers, tuple(rows), numeric=(1, 2, 3))


def _side(record: Any) -> str:
    if not isinstance(record, dict):
        return MISSING
    return f"{percent(record.get('mean'))} (std {percent(record.get('std'))}, n = {record.get('n')} draws)"


def family(rows: Sequence[Record]) -> Table:
    """Answers to other budgets (`vitnas specialize`), cheapest first."""
    ordered = sorted(rows, key=lambda row: row.get("cost", {}).get("macs", 0))
    cells = tuple(
        (
            str(row.get("budget", "")),
            percent(row.get("accuracy")),
            format_quantity(row.get("cost", {}).get("macs", 0), "macs"),
            format_quantity(row.get("cost", {}).get("params", 0), "params"),
            str(row.get("source", "")),
            str(row.get("evaluated", "")),
            str(row.get("arch_id", "")),
        )
        for row in ordered
    )
    headers = ("Budget", "Holdout accuracy", "MACs", "Params", "Answered by", "Archs looked at", "Arch")
    return Table(headers, cells, numeric=(1, 2, 3, 5))
