"""The report's charts as plotly specifications; colours that depend on the page's scheme are set by its script.

They are plain dicts, as plotly.js reads them: building them through plotly's Python objects takes longer than all the
rest of a report. A test checks each against those objects.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from vitnas.budget import Budget
from vitnas.records import RankedArch
from vitnas.reporting.files import RunFiles
from vitnas.reporting.tables import number, percent, share, size
from vitnas.searching import Objective, SearchRecord, TrialRecord
from vitnas.searching.choosing import LOSS, cost_objective
from vitnas.train import metrics

Figure = dict[str, Any]
Point = tuple[float, float, TrialRecord]

# Mid tones: legible on white and on near-black.
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#4a86c5", "#d98836", "#3f9f78", "#8f74c9", "#cc5a5a", "#8b919c"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
# Early to late, all mid tones.
ORDER_SCALE = ((0.0, "#9cb4cc"), (0.5, "#5f8fc4"), (1.0, "#7f5fb8"))
SHOWN = {
    False: ("Accuracy", ".1%"),
    True: ("R²", ".3f"),
}  # where numbers are told: its name, and how it is written
MAX_POINTS = 4000  # more scored trials than this are thinned, evenly in search order
MAX_CURVE = 600  # longer curves are shown as means of equal runs of steps

COST_TITLES = {
    "macs": "MACs",
    "params": "Parameters",
    "memory": "Peak memory (bytes)",
    "latency": "Latency (ms)",
}


def front(run: RunFiles) -> Figure | None:
    """Every scored trial by cost and accuracy, the front as a line, the chosen one marked; None without any."""
    trials = [trial for trial in run.search.trials if trial.state == "scored"] if run.search else []
    if not run.search or not trials:
        return None
    score, cost = axes(run.search)
    points: list[Point] = [
        (cost.value(trial.values, trial.costs), score.value(trial.values, trial.costs), trial)
        for trial in trials
    ]
    front_ids = set(run.search.front)
    describe = describer(run)
    step = -(-len(points) // MAX_POINTS)
    others = [p for i, p in enumerate(points) if p[2].arch_id not in front_ids and i % step == 0]
    best = sorted((p for p in points if p[2].arch_id in front_ids), key=lambda p: p[:2])
    chosen = [p for p in points if p[2].arch_id == run.chosen_id]

    def marks(which: Sequence[Point], name: str, **more: Any) -> Figure:
        prefix = "" if name == "scored" else f"{name}<br>"
        return {
            "type": "scatter", "x": [p[0] for p in which], "y": [p[1] for p in which], "name": name,
            "customdata": [describe(p[2]) for p in which],
            "hovertemplate": prefix + "%{customdata}<extra></extra>", **more,
        }  # fmt: skip

    data = [
        marks(others, "scored", mode="markers", marker=_in_order(others)),
        marks(
            best, "front", mode="lines+markers", marker={"size": 8, "color": ORANGE},
            line={"color": ORANGE, "width": 2, "shape": "hv"},
        ),
        marks(
            chosen, "chosen", mode="markers+text", text=["chosen"] * len(chosen), textposition="top center",
            cliponaxis=False, marker={"size": 17, "symbol": "star", "color": RED},
        ),
    ]  # fmt: skip
    how = "inherited weights" if run.scores_are_inherited else "trained briefly"
    by_loss = score.name == LOSS
    what, _ = SHOWN[run.tells_numbers]
    shown = {"autorange": "reversed"} if by_loss else share_axis([p[1] for p in points], run.tells_numbers)
    y_axis = axis(f"{'Loss' if by_loss else what}, {how}", **shown)
    x_axis = {} if cost.quantity == "latency" else {"tickformat": "~s"}
    return figure(data, axis(COST_TITLES[cost.quantity], **x_axis), y_axis)


def _in_order(points: Sequence[Point]) -> dict[str, Any]:
    """Markers coloured from early to late: by generation where the searcher has them, else by trial number."""
    has_generations = any(trial.generation is not None for *_, trial in points)
    order = [(trial.generation or 0) if has_generations else trial.number for *_, trial in points]
    title = {"text": "generation" if has_generations else "trial", "side": "right", "font": {"size": 12}}
    return {
        "size": 6, "opacity": 0.75, "color": order, "colorscale": ORDER_SCALE, "showscale": len(set(order)) > 1,
        "colorbar": {"title": title, "thickness": 8, "len": 0.6, "outlinewidth": 0},
    }  # fmt: skip


def axes(search: SearchRecord) -> tuple[Objective, Objective]:
    """The objective drawn upwards (the first, accuracy or loss) and the cost drawn sideways: what the budget limits,
    unless the search was told another."""
    return search.objectives[0], cost_objective(search.objectives, Budget.parse(search.budget))


def describer(run: RunFiles) -> Callable[[TrialRecord], str]:
    """Return a function that says a trial in a few hover lines: id, values, costs, and its Arch or genes."""
    genes = [(gene.name, gene.options) for gene in run.space.genes] if run.space else []

    def describe(trial: TrialRecord) -> str:
        lines = [f"<b>{escape(trial.arch_id)}</b>  trial {trial.number}"]
        values, error = trial.values, trial.values.get("error")
        for name, value in values.items():
            if name == "accuracy" and error is not None:
                lines.append(escape(f"{share(value, error)} (standard error {error:.3f})"))
            elif name != "error":
                lines.append(escape(f"{name} {percent(value, 2) if name == 'accuracy' else number(value)}"))
        costs = trial.costs
        lines.append(
            f"{number(costs.macs, 'MACs')}, {number(costs.params)} params, {size(costs.memory_bytes)}"
        )
        lines += [escape(f"{target}: {value:.3g} ms") for target, value in costs.latency_ms.items()]
        if trial.arch_id in run.archs:
            return "<br>".join([*lines, escape(run.archs[trial.arch_id].describe())])
        return "<br>".join(lines + _gene_lines(genes, trial.genes))

    return describe


def _gene_lines(genes: Sequence[tuple[str, Sequence[Any]]], indices: Sequence[int]) -> list[str]:
    """Group genes that differ by a block's number only, for the blocks that are there: "num_heads: 3 4 3"."""
    if len(genes) != len(indices):
        return []
    grouped: dict[str, list[str]] = {}
    for (name, options), index in zip(genes, indices, strict=True):
        grouped.setdefault(re.sub(r"[.\[]?\d+\]?", "", name), []).append(str(options[index]))
    depth = grouped.get("depth", ["?"])[0]
    if depth.isdigit():
        grouped = {name: values[: int(depth)] for name, values in grouped.items()}
    return [escape(f"{name}: {' '.join(values)}") for name, values in grouped.items()][:8]


def hypervolume(search: SearchRecord) -> Figure | None:
    """Dominated hypervolume against the number of scored Archs."""
    if len(search.hypervolume) < 2:
        return None
    points = line(search.hypervolume, "hypervolume", BLUE, "%{y:.4g} after %{x} Archs")
    points["line"]["shape"] = "hv"
    return figure([points], axis("Scored Archs"), axis("Hypervolume"))


def curves(lines: Sequence[metrics.Line], stages: Mapping[str, str]) -> Figure | None:
    """Loss above learning rate against epochs, one line per stage. `stages` maps a stage to its label."""
    data: list[Figure] = []
    for (stage, label), colour in zip(stages.items(), itertools.cycle(COLOURS)):
        steps = [each for each in lines if isinstance(each, metrics.Step) and each.stage == stage]
        for side, key in (("y", "loss"), ("y2", "lr")):
            points = thin([(s.epoch, s.losses["loss"] if key == "loss" else s.lr) for s in steps])
            if points:
                hover = f"{escape(label)}: {key} %{{y:.4g}} at epoch %{{x:.1f}}"
                more = {"yaxis": side, "legendgroup": label, "showlegend": side == "y"}
                data.append({**line(points, label, colour, hover), **more})
    if not data:
        return None
    lr = axis("lr", rangemode="tozero", nticks=4, exponentformat="e")
    return figure(data, axis("Epoch", rangemode="tozero"), axis("Loss"), lr, legend=len(stages) > 1)


def monitor(lines: Sequence[metrics.Line]) -> Figure | None:
    """Accuracy of the smallest, middle, largest and random Archs while the Supernet trains."""
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    n, tells = 0, False
    for each in lines:
        if not isinstance(each, metrics.Monitored) or each.stage != "supernet":
            continue
        for arch in each.archs:
            series.setdefault((arch.role, arch.arch_id), []).append((each.epoch, arch.accuracy))
            n, tells = arch.n, arch.error is not None
    if not series:
        return None
    known = {"random": GREY, "smallest": ORANGE, "middle": BLUE, "largest": GREEN}
    data: list[Figure] = []
    what, form = SHOWN[tells]
    for (role, arch_id), points in sorted(series.items(), key=lambda item: list(known).index(item[0][0])):
        hover = f"{role} {escape(arch_id)}<br>%{{y:{form}}} at epoch %{{x:.1f}}, n = {n} images"
        first = all(other["name"] != role for other in data)
        drawn = line(points, role, known[role], hover, dots=True)
        data.append({**drawn, "legendgroup": role, "showlegend": first})
    values = [value for points in series.values() for _, value in points]
    y_axis = axis(f"{what}, inherited weights", **share_axis(values, tells))
    return figure(data, axis("Epoch"), y_axis, legend=True)


def retrain_accuracy(lines: Sequence[metrics.Line], stages: Mapping[str, str]) -> Figure | None:
    """Accuracy on the holdout during retraining, where `retrain.train.monitor_every` asks for it."""
    data, values, tells = [], list[float](), False
    for (stage, label), colour in zip(stages.items(), itertools.cycle(COLOURS)):
        watched = [each for each in lines if isinstance(each, metrics.Monitored) and each.stage == stage]
        points = [(each.epoch, each.archs[0].accuracy) for each in watched]
        if points:
            values += [value for _, value in points]
            tells = watched[0].archs[0].error is not None
            hover = f"{escape(label)}: %{{y:{SHOWN[tells][1]}}} at epoch %{{x:.1f}}, n = {watched[0].archs[0].n} images"
            data.append(line(points, label, colour, hover, dots=True))
    if not data:
        return None
    what = "Holdout R²" if tells else "Holdout accuracy"
    return figure(data, axis("Epoch"), axis(what, **share_axis(values, tells)), legend=True)


def correlation(
    points: Sequence[RankedArch], chosen_id: str, *, tells_numbers: bool = False
) -> Figure | None:
    """Accuracy after training against the Supernet's prediction, the chosen Arch named."""
    if not points:
        return None
    x, y = [p.supernet_accuracy for p in points], [p.trained_accuracy for p in points]
    what, form = SHOWN[tells_numbers]
    is_chosen = [p.arch_id == chosen_id for p in points]
    marks = {
        "type": "scatter", "x": x, "y": y, "mode": "markers+text", "name": "Archs",
        "marker": {"size": 9, "color": [RED if chosen else BLUE for chosen in is_chosen]},
        "text": ["chosen" if chosen else "" for chosen in is_chosen], "textposition": "top center",
        "customdata": [escape(f"{p.arch_id}, {number(p.macs, 'MACs')}") for p in points],
        "hovertemplate": f"%{{customdata}}<br>predicted %{{x:{form}}}, trained %{{y:{form}}}<extra></extra>",
    }  # fmt: skip
    x_axis = axis("Supernet's prediction", **share_axis(x, tells_numbers))
    return figure([marks], x_axis, axis(f"{what} after training", **share_axis(y, tells_numbers)))


def costs(blocks: Sequence[tuple[str, int, int, int, int]]) -> Figure:
    """MACs and params of the stem, every block and the head, stacked.

    Args:
        blocks: (label, attention MACs, MLP MACs, other MACs, params) in order.
    """
    data = []
    columns = (
        ("attention", 1, BLUE),
        ("MLP", 2, ORANGE),
        ("stem, head, other", 3, GREY),
        ("params", 4, GREEN),
    )
    for name, column, colour in columns:
        unit = "params" if name == "params" else f"{name} MACs"
        data.append(
            {
                "type": "bar", "x": [b[0] for b in blocks], "y": [b[column] for b in blocks], "name": name,
                "marker": {"color": colour}, "hovertemplate": f"%{{x}}: %{{y:.4s}} {unit}<extra></extra>",
                "yaxis": "y2" if name == "params" else "y", "showlegend": name != "params",
            }
        )  # fmt: skip
    axes_xy = (axis("", type="category"), axis("MACs", tickformat="~s"), axis("Params", tickformat="~s"))
    drawn = figure(data, *axes_xy, legend=True)
    drawn["layout"] |= {"barmode": "stack", "bargap": 0.25}
    drawn["layout"]["legend"]["traceorder"] = "normal"
    return drawn


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Replace a long curve by the means of equal runs of points, at most `MAX_CURVE` of them."""
    step = -(-len(points) // MAX_CURVE) if points else 1
    groups = [points[i : i + step] for i in range(0, len(points), step)]
    return [(g[-1][0], sum(p[1] for p in g) / len(g)) for g in groups]


def line(
    points: Sequence[tuple[float, float]], name: str, colour: str, hover: str, *, dots: bool = False
) -> Figure:
    mode = "lines+markers" if dots or len(points) == 1 else "lines"
    return {
        "type": "scatter", "x": [p[0] for p in points], "y": [p[1] for p in points], "name": name, "mode": mode,
        "line": {"color": colour, "width": 2}, "marker": {"size": 5, "color": colour},
        "hovertemplate": f"{hover}<extra></extra>",
    }  # fmt: skip


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 12}, "automargin": True, "zeroline": False, **more}


def figure(
    data: list[Figure],
    x: dict[str, Any],
    y: dict[str, Any],
    below: dict[str, Any] | None = None,
    *,
    legend: bool = False,
) -> Figure:
    """One chart, or two over one x axis when `below` is the lower one's y axis (named "y2" in its traces)."""
    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "showlegend": legend,
        "margin": {"l": 8, "r": 8, "t": 30 if legend else 12, "b": 8}, "hovermode": "closest", "dragmode": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, "xaxis": x, "yaxis": y,
    }  # fmt: skip
    if below is not None:
        layout |= {
            "xaxis": {**x, "anchor": "y2"},
            "yaxis": {**y, "domain": [0.4, 1]},
            "yaxis2": {**below, "domain": [0, 0.32]},
        }  # fmt: skip
    return {"data": data, "layout": layout}


def share_axis(values: Sequence[float], tells_numbers: bool = False) -> dict[str, Any]:
    """Percentages, or R^2 as it is. Room around the values, more above for labels, and never a hair's width."""
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.004)
    return {
        "tickformat": ".2f" if tells_numbers else f".{1 if high - low < 0.08 else 0}%",
        "range": [low - margin, high + 1.6 * margin],
        "nticks": 7,
    }
