"""What a learned sampler has learned, as charts: does it keep to its budgets, has it made up its mind, on what."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import cycle
from typing import Any

from vitnas.budget import format_quantity, split_target
from vitnas.records import Family, FocusLook, Sample, SamplerSummary
from vitnas.reporting.plots import COLOURS, Figure, axis, figure, line, thin
from vitnas.reporting.tables import Table, percent, share

Looks = Sequence[tuple[float, FocusLook]]
"""(epoch, what the sampler said)."""


def cost_ratio(looks: Looks, quantity: str) -> Figure | None:
    """Mean cost of what the policy draws over the budget it was asked for, one line per anchor; 1 is on the spot."""
    watched = [(epoch, look) for epoch, look in looks if look.budgets]
    if not watched:
        return None
    data = []
    for place, (budget, colour) in enumerate(zip(watched[0][1].budgets, cycle(COLOURS))):
        points = thin([(epoch, look.cost_ratio[place]) for epoch, look in watched])
        name = text_of(budget, quantity)
        data.append(line(points, name, colour, f"{escape(name)}: %{{y:.2f}} of it at epoch %{{x:.1f}}"))
    return figure(data, axis("Epoch"), axis("Expected cost / budget"), legend=True)


def entropy(looks: Looks) -> Figure | None:
    """Mean entropy of the decisions of a kind, over all anchors, in nats: 0 when the mind is made up."""
    watched = [(epoch, look.entropy) for epoch, look in looks if look.entropy]
    if not watched:
        return None
    data = []
    for kind, colour in zip(watched[0][1], cycle(COLOURS)):
        points = [(epoch, sum(found[kind]) / len(found[kind])) for epoch, found in watched]
        data.append(line(thin(points), kind, colour, f"{escape(kind)}: %{{y:.2f}} nats at epoch %{{x:.1f}}"))
    return figure(data, axis("Epoch"), axis("Entropy per decision, nats", rangemode="tozero"), legend=True)


def gain(looks: Looks, span: int = 10) -> Figure | None:
    """Held-out loss of random Archs minus the policy's at equal cost; the mean over `span` looks beside the single
    ones."""
    points = [(epoch, look.gain) for epoch, look in looks if look.gain is not None]
    if not points:
        return None
    mean = [
        (points[i][0], sum(p[1] for p in points[max(0, i + 1 - span) : i + 1]) / min(span, i + 1))
        for i in range(len(points))
    ]
    single = {**line(points, "each look", COLOURS[1], "%{y:.3f} nats at epoch %{x:.1f}"), "mode": "markers"}
    smooth = line(thin(mean), f"mean of {span}", COLOURS[0], "%{y:.3f} nats at epoch %{x:.1f}")
    return figure([single, smooth], axis("Epoch"), axis("Loss saved at equal cost, nats"), legend=True)


def preferences(summary: SamplerSummary) -> Figure:
    """Per gene and budget the mean option, from the smallest (0) to the largest (1)."""
    found, options = summary.preferences, summary.options
    names = [name for name, values in options.items() if len(values) > 1]
    budgets = [text_of(budget, summary.quantity) for budget in summary.budgets]
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
    drawn = figure([heat], axis("Budget", type="category"), axis("", autorange="reversed", dtick=1))
    drawn["layout"]["height"] = 120 + 18 * len(names)
    return drawn


def _shares(options: Sequence[Any], row: Sequence[float]) -> str:
    return ", ".join(f"{option}: {share:.0%}" for option, share in zip(options, row, strict=True) if share)


def text_of(budget: float, quantity: str) -> str:
    """A budget as it would be typed."""
    return format_quantity(budget, split_target(quantity)[0])


def compared(summary: SamplerSummary, *, tells_numbers: bool = False) -> Table:
    """Archs that the policy drew against random ones of equal cost: held-out accuracy with inherited weights."""
    rows = tuple(
        (
            text_of(row.budget, summary.quantity),
            f"{row.cost_ratio:.2f}",
            _sample(row.policy, tells_numbers),
            _sample(row.random, tells_numbers),
        )
        for row in summary.compared
    )
    return Table(
        ("Budget", "Mean cost / budget", "Drawn by the policy", "Random, equal cost"), rows, numeric=(1, 2, 3)
    )


def _sample(sample: Sample, tells_numbers: bool) -> str:
    mean, std = percent(sample.mean), percent(sample.std)
    if tells_numbers:
        mean, std = f"R² {sample.mean:.3f}", f"{sample.std:.3f}"
    return f"{mean} (std {std}, n = {sample.n} draws)"


def family(found: Family) -> Table:
    """Answers to other budgets (`vitnas specialize`), cheapest first."""
    cells = tuple(
        (
            answer.budget,
            share(answer.accuracy, answer.error),
            format_quantity(answer.cost.macs, "macs"),
            format_quantity(answer.cost.params, "params"),
            answer.source,
            str(answer.evaluated),
            answer.arch_id,
        )
        for answer in sorted(found.answers, key=lambda answer: answer.cost.macs)
    )
    what = "Holdout R²" if any(answer.error is not None for answer in found.answers) else "Holdout accuracy"
    headers = ("Budget", what, "MACs", "Params", "Answered by", "Archs looked at", "Arch")
    return Table(headers, cells, numeric=(1, 2, 3, 5))
