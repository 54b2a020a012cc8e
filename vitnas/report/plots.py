"""The report's charts as plotly figures; colours that depend on the page's scheme are set by its script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vitnas.report.files import Record, RunFiles
from vitnas.report.tables import is_number, number, percent, size

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


def front(run: RunFiles) -> go.Figure | None:
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
    others = [
        point for i, point in enumerate(points) if point[2].get("arch_id") not in front_ids and i % step == 0
    ]
    best = _unique(
        sorted(
            (point for point in points if point[2].get("arch_id") in front_ids), key=lambda point: point[:2]
        )
    )
    chosen = [point for point in best or points if point[2].get("arch_id") == run.chosen_id][:1]
    by_generation = any(is_number(point[2].get("generation")) for point in points)
    order = [point[2].get("generation" if by_generation else "number") or 0 for point in others]
    order_name = "generation" if by_generation else "trial"
    figure = _figure(COST_TITLES.get(cost, cost), _title(score))
    figure.add_scatter(
        x=[p[0] for p in others], y=[p[1] for p in others], mode="markers", name="scored",
        text=[describe(p[2]) for p in others], hovertemplate="%{text}<extra></extra>",
        marker={
            "size": 6, "opacity": 0.75, "color": order, "colorscale": ORDER_SCALE,
            "showscale": len(set(order)) > 1,
            "colorbar": {
                "title": {"text": order_name, "side": "right", "font": {"size": 12}},
                "thickness": 8, "len": 0.6, "outlinewidth": 0,
            },
        },
    )  # fmt: skip
    figure.add_scatter(
        x=[p[0] for p in best], y=[p[1] for p in best], mode="lines+markers", name="front",
        text=[describe(p[2]) for p in best], hovertemplate="front<br>%{text}<extra></extra>",
        line={"color": ORANGE, "width": 2, "shape": "hv"}, marker={"size": 8, "color": ORANGE},
    )  # fmt: skip
    if chosen:
        figure.add_scatter(
            x=[chosen[0][0]], y=[chosen[0][1]], mode="markers+text", name="chosen",
            text=["chosen"], textposition="top center", cliponaxis=False,
            customdata=[describe(chosen[0][2])], hovertemplate="chosen<br>%{customdata}<extra></extra>",
            marker={"size": 17, "symbol": "star", "color": RED},
        )  # fmt: skip
    if score == "accuracy":
        _percent_axis(figure, [p[1] for p in points])
    return figure


def axes(search: Record) -> tuple[str, str]:
    """Return the names of the objective drawn upwards and of the cost drawn sideways."""
    objectives = [(str(o.get("name", "")), o.get("direction")) for o in search.get("objectives", [])]
    score = next((name for name, direction in objectives if direction == "maximize"), "accuracy")
    cost = next((name for name, direction in objectives if direction == "minimize"), "macs")
    return score, cost


def describer(run: RunFiles) -> Callable[[Record], str]:
    """Return a function that says a trial in a few hover lines: id, costs and, from space.json, its genes."""
    genes = [gene for gene in run.space.get("genes", []) if isinstance(gene, Mapping)]

    def describe(trial: Record) -> str:
        costs = trial.get("costs", {})
        values = trial.get("values", {})
        lines = [f"<b>{escape(str(trial.get('arch_id', '')))}</b>  trial {trial.get('number', '?')}"]
        lines += [
            f"{escape(str(k))} {percent(v, 2) if k == 'accuracy' else number(v)}"
            for k, v in values.items()
            if k not in costs
        ]
        shown = (
            number(costs.get("macs"), "MACs"),
            f"{number(costs.get('params'))} params",
            size(costs.get("memory")),
        )
        lines.append(", ".join(shown))
        return "<br>".join(lines + _gene_lines(genes, trial.get("genes") or []))

    return describe


def _gene_lines(genes: Sequence[Record], indices: Sequence[int]) -> list[str]:
    """Group genes that differ by a block number only: "heads 3 4 3 3"."""
    if len(genes) != len(indices):
        return []
    grouped: dict[str, list[str]] = {}
    for gene, index in zip(genes, indices, strict=True):
        options = gene.get("options", [])
        name = "".join(c for c in str(gene.get("name", "")) if not c.isdigit()).strip("._-[] ")
        grouped.setdefault(name, []).append(str(options[index]) if 0 <= index < len(options) else "?")
    return [escape(f"{name.replace('..', '.')}: {' '.join(values)}") for name, values in grouped.items()][:8]


def hypervolume(search: Record) -> go.Figure | None:
    """Dominated hypervolume against the number of scored Archs."""
    points = [p for p in search.get("hypervolume", []) if len(p) == 2 and is_number(p[0]) and is_number(p[1])]
    if len(points) < 2:
        return None
    figure = _figure("Scored Archs", "Hypervolume")
    figure.add_scatter(
        x=[p[0] for p in points], y=[p[1] for p in points], mode="lines", name="hypervolume",
        line={"color": BLUE, "width": 2, "shape": "hv"},
        hovertemplate="%{y:.4g} after %{x} Archs<extra></extra>",
    )  # fmt: skip
    return figure


def curves(metrics: Sequence[Record], stages: Mapping[str, str]) -> go.Figure | None:
    """Loss above learning rate against epochs, one line per stage. `stages` maps a stage to its label."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.7, 0.3], vertical_spacing=0.08)
    drawn = 0
    for index, (stage, label) in enumerate(stages.items()):
        lines = [line for line in metrics if line.get("stage") == stage and is_number(line.get("loss"))]
        if not lines:
            continue
        drawn += 1
        colour = COLOURS[index % len(COLOURS)]
        for row, key in ((1, "loss"), (2, "lr")):
            x, y = thin([(_when(line), line[key]) for line in lines if is_number(line.get(key))])
            figure.add_scatter(
                x=x, y=y, mode="lines" if len(x) > 1 else "markers", name=label,
                legendgroup=label, row=row, col=1,
                showlegend=row == 1, line={"color": colour, "width": 1.8}, marker={"color": colour},
                hovertemplate=f"{escape(label)}: %{{y:.4g}} at epoch %{{x:.1f}}<extra></extra>",
            )  # fmt: skip
    if not drawn:
        return None
    _layout(figure, legend=drawn > 1)
    figure.update_yaxes(title_text="Loss", title_standoff=12, row=1, col=1)
    figure.update_yaxes(
        title_text="lr", title_standoff=12, rangemode="tozero", nticks=4, exponentformat="e", row=2, col=1
    )
    figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(title_text="Epoch", row=2, col=1)
    return figure


def monitor(metrics: Sequence[Record]) -> go.Figure | None:
    """Accuracy of the smallest, middle, largest and random Archs while the Supernet trains."""
    lines = [
        line
        for line in metrics
        if line.get("event") == "monitor" and line.get("stage", "supernet") == "supernet"
    ]
    series: dict[str, list[tuple[float, float, str]]] = {}
    for line in lines:
        for arch in line.get("archs", []):
            if is_number(arch.get("accuracy")):
                n = arch.get("n", line.get("n"))
                what = f"{arch.get('arch_id', '')}{f', n = {n} images' if is_number(n) else ''}"
                point = (_when(line), float(arch["accuracy"]), what)
                series.setdefault(str(arch.get("role", "?")), []).append(point)
    if not series:
        return None
    figure = _figure("Epoch", "Accuracy, inherited weights")
    known = {"largest": GREEN, "middle": BLUE, "smallest": ORANGE, "random": GREY}
    for role in sorted(series, key=lambda role: list(known).index(role) if role in known else 9):
        points, colour = series[role], known.get(role, PURPLE)
        loose = role == "random"
        figure.add_scatter(
            x=[p[0] for p in points], y=[p[1] for p in points], name=role,
            mode="markers" if loose else "lines+markers", text=[escape(p[2]) for p in points],
            line={"color": colour, "width": 2},
            marker={"color": colour, **({"size": 8, "symbol": "diamond-open"} if loose else {"size": 5})},
            hovertemplate=f"{escape(role)} %{{text}}<br>%{{y:.1%}} at epoch %{{x:.1f}}<extra></extra>",
        )  # fmt: skip
    _layout(figure, legend=True)
    _percent_axis(figure, [p[1] for points in series.values() for p in points])
    return figure


def retrain_accuracy(metrics: Sequence[Record], stages: Mapping[str, str]) -> go.Figure | None:
    """Accuracy on the holdout during retraining, where the metrics hold one."""
    figure, values = _figure("Epoch", "Holdout accuracy"), []
    for index, (stage, label) in enumerate(stages.items()):
        points = [
            (_when(line), float(value))
            for line in metrics
            if line.get("stage") == stage
            and is_number(value := line.get("accuracy", line.get("holdout_accuracy")))
        ]
        if points:
            values += [p[1] for p in points]
            colour = COLOURS[index % len(COLOURS)]
            figure.add_scatter(
                x=[p[0] for p in points], y=[p[1] for p in points], mode="lines+markers", name=label,
                line={"color": colour, "width": 2}, marker={"size": 5},
                hovertemplate=f"{escape(label)}: %{{y:.1%}} at epoch %{{x:.1f}}<extra></extra>",
            )  # fmt: skip
    if not values:
        return None
    _layout(figure, legend=True)
    _percent_axis(figure, values)
    return figure


def correlation(points: Sequence[Record], chosen_id: str) -> go.Figure | None:
    """Accuracy after training against the Supernet's prediction, the chosen Arch named."""
    pairs = [
        p for p in points if is_number(p.get("supernet_accuracy")) and is_number(p.get("trained_accuracy"))
    ]
    if not pairs:
        return None
    x, y = [p["supernet_accuracy"] for p in pairs], [p["trained_accuracy"] for p in pairs]
    figure = _figure("Supernet's prediction", "Accuracy after training")
    colours = [RED if p.get("arch_id") == chosen_id else BLUE for p in pairs]
    figure.add_scatter(
        x=x, y=y, mode="markers+text", name="Archs", marker={"size": 9, "color": colours},
        texttemplate=["chosen" if colour == RED else "" for colour in colours], textposition="top center",
        text=[escape(f"{p.get('arch_id', '')}, {number(p.get('macs'), 'MACs')}") for p in pairs],
        hovertemplate="%{text}<br>predicted %{x:.1%}, trained %{y:.1%}<extra></extra>",
    )  # fmt: skip
    _percent_axis(figure, y)
    figure.update_xaxes(tickformat=".1%" if max(x) - min(x) < 0.05 else ".0%", nticks=7)
    return figure


def costs(blocks: Sequence[tuple[str, int, int, int, int]]) -> go.Figure | None:
    """MACs and params of the stem, every block and the head, stacked.

    Args:
        blocks: (label, attention MACs, MLP MACs, other MACs, params) in order.
    """
    if not blocks:
        return None
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.62, 0.38], vertical_spacing=0.08)
    labels = [b[0] for b in blocks]
    for name, column, colour in (("attention", 1, BLUE), ("MLP", 2, ORANGE), ("stem, head, other", 3, GREY)):
        figure.add_bar(
            x=labels, y=[b[column] for b in blocks], name=name, marker={"color": colour}, row=1, col=1,
            hovertemplate=f"%{{x}}: {name} %{{y:.4s}} MACs<extra></extra>",
        )  # fmt: skip
    figure.add_bar(
        x=labels, y=[b[4] for b in blocks], name="params", marker={"color": GREEN}, showlegend=False,
        row=2, col=1,
        hovertemplate="%{x}: %{y:.4s} params<extra></extra>",
    )  # fmt: skip
    _layout(figure, legend=True)
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_xaxes(type="category")
    figure.update_yaxes(title_text="MACs", tickformat="~s", row=1, col=1)
    figure.update_yaxes(title_text="Params", tickformat="~s", row=2, col=1)
    return figure


def thin(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Replace a long curve by the means of equal runs of points, at most `MAX_CURVE` of them."""
    step = -(-len(points) // MAX_CURVE) if points else 1
    groups = [points[i : i + step] for i in range(0, len(points), step)]
    return [g[-1][0] for g in groups], [sum(p[1] for p in g) / len(g) for g in groups]


def _when(line: Record) -> float:
    epoch = line.get("epoch")
    return float(epoch) if epoch is not None and is_number(epoch) else float(line.get("step", 0))


def _of(trial: Record, name: str) -> float | None:
    value = trial.get("values", {}).get(name, trial.get("costs", {}).get(name))
    return float(value) if is_number(value) else None


def _unique(points: list[tuple[float, float, Record]]) -> list[tuple[float, float, Record]]:
    """Drop repeats of one Arch: a front has each once."""
    return list({str(point[2].get("arch_id")): point for point in points}.values())


def _title(score: str) -> str:
    return "Accuracy, inherited weights" if score == "accuracy" else score


def _figure(x: str, y: str) -> go.Figure:
    figure = go.Figure()
    _layout(figure, legend=False)
    figure.update_xaxes(title_text=x, tickformat="~s" if x in COST_TITLES.values() and "ms" not in x else "")
    figure.update_yaxes(title_text=y)
    return figure


def _layout(figure: go.Figure, *, legend: bool) -> None:
    figure.update_layout(
        template="none", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", showlegend=legend,
        margin={"l": 8, "r": 8, "t": 30 if legend else 12, "b": 8}, hovermode="closest", dragmode=False,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    figure.update_xaxes(automargin=True, zeroline=False)
    figure.update_yaxes(automargin=True, zeroline=False)


def _percent_axis(figure: go.Figure, values: Sequence[float]) -> None:
    """Room around the values, never past 0 or 100 % by more than the marks need, and never a hair's width."""
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.004)
    digits = 1 if high - low < 0.08 else 0
    figure.update_yaxes(tickformat=f".{digits}%", range=[low - margin, high + 1.6 * margin], nticks=7)
