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

from vitnas.errors import UserError
from vitnas.reporting.files import Record, RunFiles
from vitnas.reporting.tables import is_number, number, percent, size
from vitnas.space import space_from_json

Figure = dict[str, Any]
Point = tuple[float, float, Record]

# Mid tones: legible on white and on near-black.
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#4a86c5", "#d98836", "#3f9f78", "#8f74c9", "#cc5a5a", "#8b919c"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
# Early to late, all mid tones.
ORDER_SCALE = ((0.0, "#9cb4cc"), (0.5, "#5f8fc4"), (1.0, "#7f5fb8"))
MAX_POINTS = 4000  # more scored trials than this are thinned, evenly in search order
MAX_CURVE = 600  # longer curves are shown as means of equal runs of steps

COST_TITLES = {
    "macs": "MACs",
    "params": "Parameters",
    "memory": "Peak memory (bytes)",
    "latency_ms": "Latency (ms)",
    "latency": "Latency (ms)",
}


def front(run: RunFiles) -> Figure | None:
    """Every scored trial by cost and accuracy, the front as a line, the chosen one marked; None without any."""
    trials = [trial for trial in run.search.get("trials", []) if trial.get("state") == "scored"]
    score, cost = axes(run.search)
    points = [
        (x, y, trial)
        for trial in trials
        if (x := _of(trial, cost)) is not None and (y := _of(trial, score)) is not None
    ]
    if not points:
        return None
    front_ids = set(run.search.get("front", []))
    describe = describer(run)
    step = -(-len(points) // MAX_POINTS)
    others = [p for i, p in enumerate(points) if p[2].get("arch_id") not in front_ids and i % step == 0]
    best = _unique(sorted((p for p in points if p[2].get("arch_id") in front_ids), key=lambda p: p[:2]))
    chosen = [p for p in best or points if p[2].get("arch_id") == run.chosen_id][:1]

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
    y_axis = _percent_axis([p[1] for p in points]) if score == "accuracy" else {}
    y_title = "Accuracy, inherited weights" if score == "accuracy" else score
    x_axis = {} if "latency" in cost else {"tickformat": "~s"}
    return _figure(data, _axis(COST_TITLES.get(cost, cost), **x_axis), _axis(y_title, **y_axis))


def _in_order(points: Sequence[Point]) -> dict[str, Any]:
    """Markers coloured from early to late: by generation where the searcher has them, else by trial number."""
    name = "generation" if any(is_number(p[2].get("generation")) for p in points) else "number"
    order = [p[2].get(name) or 0 for p in points]
    title = {"text": "trial" if name == "number" else name, "side": "right", "font": {"size": 12}}
    return {
        "size": 6, "opacity": 0.75, "color": order, "colorscale": ORDER_SCALE, "showscale": len(set(order)) > 1,
        "colorbar": {"title": title, "thickness": 8, "len": 0.6, "outlinewidth": 0},
    }  # fmt: skip


def axes(search: Record) -> tuple[str, str]:
    """Return the names of the objective drawn upwards and of the cost drawn sideways."""
    objectives = [(str(o.get("name", "")), o.get("direction")) for o in search.get("objectives", [])]
    score = next((name for name, direction in objectives if direction == "maximize"), "accuracy")
    cost = next((name for name, direction in objectives if direction == "minimize"), "macs")
    return score, cost


def describer(run: RunFiles) -> Callable[[Record], str]:
    """Return a function that says a trial in a few hover lines: id, values, costs, and its Arch or genes."""
    genes = _genes(run)

    def describe(trial: Record) -> str:
        costs, values, arch_id = (
            trial.get("costs", {}),
            trial.get("values", {}),
            str(trial.get("arch_id", "")),
        )
        lines = [f"<b>{escape(arch_id)}</b>  trial {trial.get('number', '?')}"]
        for name, value in values.items():
            if name not in costs:
                lines.append(
                    f"{escape(str(name))} {percent(value, 2) if name == 'accuracy' else number(value)}"
                )
        params = f"{number(costs.get('params'))} params"
        lines.append(", ".join((number(costs.get("macs"), "MACs"), params, size(costs.get("memory")))))
        if "latency_ms" in costs:
            latency = costs["latency_ms"]
            named = latency.items() if isinstance(latency, Mapping) else [("latency", latency)]
            lines += [f"{escape(str(name))}: {value:.3g} ms" for name, value in named if is_number(value)]
        if arch_id in run.archs:
            return "<br>".join([*lines, escape(run.archs[arch_id].describe())])
        return "<br>".join(lines + _gene_lines(genes, trial.get("genes") or []))

    return describe


def _genes(run: RunFiles) -> list[tuple[str, Sequence[Any]]]:
    """Names and options of the Space's genes: as space.json lists them, else from the Space that it says."""
    if "genes" in run.space:
        return [(str(gene.get("name", "")), gene.get("options", ())) for gene in run.space["genes"]]
    try:
        return [(gene.name, gene.options) for gene in space_from_json(run.space).genes] if run.space else []
    except UserError as error:
        run.problems.append(f"space.json: {error}")
        return []


def _gene_lines(genes: Sequence[tuple[str, Sequence[Any]]], indices: Sequence[int]) -> list[str]:
    """Group genes that differ by a block's number only, for the blocks that are there: "num_heads: 3 4 3"."""
    if len(genes) != len(indices):
        return []
    grouped: dict[str, list[str]] = {}
    for (name, options), index in zip(genes, indices, strict=True):
        value = str(options[index]) if 0 <= index < len(options) else "?"
        grouped.setdefault(re.sub(r"[.\[]?\d+\]?", "", name), []).append(value)
    depth = grouped.get("depth", ["?"])[0]
    if depth.isdigit():
        grouped = {name: values[: int(depth)] for name, values in grouped.items()}
    return [escape(f"{name}: {' '.join(values)}") for name, values in grouped.items()][:8]


def hypervolume(search: Record) -> Figure | None:
    """Dominated hypervolume against the number of scored Archs."""
    points = [p for p in search.get("hypervolume", []) if len(p) == 2 and is_number(p[0]) and is_number(p[1])]
    if len(points) < 2:
        return None
    line = _line([(p[0], p[1]) for p in points], "hypervolume", BLUE, "%{y:.4g} after %{x} Archs")
    line["line"]["shape"] = "hv"
    return _figure([line], _axis("Scored Archs"), _axis("Hypervolume"))


def curves(metrics: Sequence[Record], stages: Mapping[str, str]) -> Figure | None:
    """Loss above learning rate against epochs, one line per stage. `stages` maps a stage to its label."""
    data: list[Figure] = []
    for (stage, label), colour in zip(stages.items(), itertools.cycle(COLOURS)):
        lines = [line for line in metrics if line.get("stage") == stage and is_number(line.get("loss"))]
        for axis, key in (("y", "loss"), ("y2", "lr")):
            points = thin([(_when(line), line[key]) for line in lines if is_number(line.get(key))])
            if points:
                hover = f"{escape(label)}: {key} %{{y:.4g}} at epoch %{{x:.1f}}"
                more = {"yaxis": axis, "legendgroup": label, "showlegend": axis == "y"}
                data.append({**_line(points, label, colour, hover), **more})
    if not data:
        return None
    lr = _axis("lr", rangemode="tozero", nticks=4, exponentformat="e")
    return _figure(data, _axis("Epoch", rangemode="tozero"), _axis("Loss"), lr, legend=len(stages) > 1)


def monitor(metrics: Sequence[Record]) -> Figure | None:
    """Accuracy of the smallest, middle, largest and random Archs while the Supernet trains."""
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    n = 0
    for line in metrics:
        if line.get("event") == "monitor" and line.get("stage", "supernet") == "supernet":
            for arch in line.get("archs", []):
                if is_number(arch.get("accuracy")):
                    key = str(arch.get("role", "?")), str(arch.get("arch_id", ""))
                    series.setdefault(key, []).append((_when(line), float(arch["accuracy"])))
                    n = arch.get("n", n)
    if not series:
        return None
    known = {"random": GREY, "smallest": ORANGE, "middle": BLUE, "largest": GREEN}
    data: list[Figure] = []
    for (role, arch_id), points in sorted(
        series.items(), key=lambda item: [*known, item[0][0]].index(item[0][0])
    ):
        hover = f"{escape(role)} {escape(arch_id)}<br>%{{y:.1%}} at epoch %{{x:.1f}}{f', n = {n} images' if n else ''}"
        line = _line(points, role, known.get(role, PURPLE), hover, dots=True)
        first = all(other["name"] != role for other in data)
        data.append({**line, "legendgroup": role, "showlegend": first})
    values = [value for points in series.values() for _, value in points]
    y_axis = _axis("Accuracy, inherited weights", **_percent_axis(values))
    return _figure(data, _axis("Epoch"), y_axis, legend=True)


def retrain_accuracy(metrics: Sequence[Record], stages: Mapping[str, str]) -> Figure | None:
    """Accuracy on the holdout during retraining, where the metrics hold one."""
    data, values = [], []
    for (stage, label), colour in zip(stages.items(), itertools.cycle(COLOURS)):
        points = [
            (_when(line), float(value))
            for line in metrics
            if line.get("stage") == stage and is_number(value := _accuracy(line)) and value is not None
        ]
        if points:
            values += [p[1] for p in points]
            hover = f"{escape(label)}: %{{y:.1%}} at epoch %{{x:.1f}}"
            data.append(_line(points, label, colour, hover, dots=True))
    if not data:
        return None
    return _figure(data, _axis("Epoch"), _axis("Holdout accuracy", **_percent_axis(values)), legend=True)


def correlation(points: Sequence[Record], chosen_id: str) -> Figure | None:
    """Accuracy after training against the Supernet's prediction, the chosen Arch named."""
    pairs = [
        p for p in points if is_number(p.get("supernet_accuracy")) and is_number(p.get("trained_accuracy"))
    ]
    if not pairs:
        return None
    x, y = [p["supernet_accuracy"] for p in pairs], [p["trained_accuracy"] for p in pairs]
    is_chosen = [p.get("arch_id") == chosen_id for p in pairs]
    marks = {
        "type": "scatter", "x": x, "y": y, "mode": "markers+text", "name": "Archs",
        "marker": {"size": 9, "color": [RED if chosen else BLUE for chosen in is_chosen]},
        "text": ["chosen" if chosen else "" for chosen in is_chosen], "textposition": "top center",
        "customdata": [escape(f"{p.get('arch_id', '')}, {number(p.get('macs'), 'MACs')}") for p in pairs],
        "hovertemplate": "%{customdata}<br>predicted %{x:.1%}, trained %{y:.1%}<extra></extra>",
    }  # fmt: skip
    x_axis = _axis("Supernet's prediction", **_percent_axis(x))
    return _figure([marks], x_axis, _axis("Accuracy after training", **_percent_axis(y)))


def costs(blocks: Sequence[tuple[str, int, int, int, int]]) -> Figure | None:
    """MACs and params of the stem, every block and the head, stacked.

    Args:
        blocks: (label, attention MACs, MLP MACs, other MACs, params) in order.
    """
    if not blocks:
        return None
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
    axes_xy = (_axis("", type="category"), _axis("MACs", tickformat="~s"), _axis("Params", tickformat="~s"))
    figure = _figure(data, *axes_xy, legend=True)
    figure["layout"] |= {"barmode": "stack", "bargap": 0.25}
    figure["layout"]["legend"]["traceorder"] = "normal"
    return figure


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Replace a long curve by the means of equal runs of points, at most `MAX_CURVE` of them."""
    step = -(-len(points) // MAX_CURVE) if points else 1
    groups = [points[i : i + step] for i in range(0, len(points), step)]
    return [(g[-1][0], sum(p[1] for p in g) / len(g)) for g in groups]


def _accuracy(line: Record) -> Any:
    """The accuracy that a line holds, bare or of the one Arch that was monitored."""
    archs = line.get("archs", [])
    return archs[0].get("accuracy") if len(archs) == 1 else line.get("accuracy", line.get("holdout_accuracy"))


def _when(line: Record) -> float:
    epoch = line.get("epoch")
    return float(epoch) if epoch is not None and is_number(epoch) else float(line.get("step", 0))


def _of(trial: Record, name: str) -> float | None:
    value = trial.get("values", {}).get(name, trial.get("costs", {}).get(name))
    return float(value) if is_number(value) else None


def _unique(points: list[tuple[float, float, Record]]) -> list[tuple[float, float, Record]]:
    """Drop repeats of one Arch: a front has each once."""
    return list({str(point[2].get("arch_id")): point for point in points}.values())


def _line(
    points: Sequence[tuple[float, float]], name: str, colour: str, hover: str, *, dots: bool = False
) -> Figure:
    mode = "lines+markers" if dots or len(points) == 1 else "lines"
    return {
        "type": "scatter", "x": [p[0] for p in points], "y": [p[1] for p in points], "name": name, "mode": mode,
        "line": {"color": colour, "width": 2}, "marker": {"size": 5, "color": colour},
        "hovertemplate": f"{hover}<extra></extra>",
    }  # fmt: skip


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 12}, "automargin": True, "zeroline": False, **more}


def _figure(
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


def _percent_axis(values: Sequence[float]) -> dict[str, Any]:
    """Room around the values, more above for labels, and never a hair's width."""
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.004)
    return {
        "tickformat": f".{1 if high - low < 0.08 else 0}%",
        "range": [low - margin, high + 1.6 * margin],
        "nticks": 7,
    }
