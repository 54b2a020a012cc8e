"""The page of a pretraining: what its features are worth, how they came about, and whether the teacher lived."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from vitnas.probing import Pretrained, looks_of
from vitnas.reporting import plots
from vitnas.reporting.drawing import draw
from vitnas.reporting.files import RunFiles
from vitnas.reporting.plots import BLUE, GREEN, GREY, ORANGE, Figure, axis, figure, share_axis
from vitnas.reporting.pretraining import described, forecast, outcome
from vitnas.reporting.tables import Table, percent
from vitnas.train import metrics

STAGES = {
    "forecast": "pretrain_forecast.json",
    "train": "pretrained.json",
    "export": "export/export.json",
}
BEFORE = "Before is the network as it began."
PROBED = (
    f"{BEFORE} For the test images, neighbours and penalty were chosen on held-out train images; on the way there are "
    "20 neighbours, at temperature 0.07."
)


def pretrain_context(run: RunFiles, figures: dict[str, Figure]) -> dict[str, Any]:
    """What the page's template asks for, beside what all pages have; draws into `figures`."""
    found = run.pretrain
    figures |= {name: drawn for name, drawn in _figures(run).items() if drawn is not None}
    arch = next(iter(run.archs.values()), None)
    return {
        "stages": [
            *((name, (run.folder / path).exists()) for name, path in STAGES.items()),
            ("results", bool(found.made and (found.probed or found.made.last.knn is None))),
        ],
        "headline": described(found.made) if found.made else "The pretraining has not come to its end.",
        "why": _worth(found.made) if found.made else "",
        "budget": (Table((), ()), ""),
        "arch": arch,
        "drawing": Markup(draw(arch)) if arch else "",
        "pretrain": {
            "outcome": found.made and outcome(found.made, found.probed),
            "told": PROBED if found.probed else BEFORE,
            "notes": found.forecast.notes if found.forecast else (),
            "forecast": found.forecast and forecast(found.forecast),
        },
    }


def _worth(made: Pretrained) -> str:
    if made.last.knn is None:
        return "The images have no labels, so no classifier says what the features are worth."
    before = f", {percent(made.first.knn)} before" if made.first else ""
    return f"Nearest neighbours find the class of {percent(made.last.knn)} of {made.last.n} held-out images{before}."


def _figures(run: RunFiles) -> dict[str, Figure | None]:
    checks = [line for line in run.metrics if isinstance(line, metrics.Hooked) and line.event == "watch"]
    looks = list(looks_of(run.metrics))
    made = run.pretrain.made
    if made:
        looks.append((made.epochs, made.last))
    told = [(epoch, look.knn) for epoch, look in looks if look.knn is not None]
    epochs = [line.epoch for line in checks]

    def said(name: str) -> list[float]:
        return [float(line.said[name]) for line in checks]

    shares = [knn for _, knn in told]
    return {
        "pretrain": plots.curves(run.metrics, {"pretrain": "pretraining"}),
        "pretrain_knn": _drawn(
            [("accuracy", [epoch for epoch, _ in told], shares, BLUE)],
            axis("Accuracy, held-out", **share_axis(shares)),
        )
        if told
        else None,
        "pretrain_rank": _drawn([("rank", epochs, said("rank"), GREEN)], axis("Effective rank"))
        if checks
        else None,
        "pretrain_entropy": _drawn(
            [
                ("mean of single answers", epochs, said("teacher_entropy"), ORANGE),
                ("of their mean", epochs, said("winner_entropy"), BLUE),
                ("length of the centre", epochs, said("center_norm"), GREY),
            ],
            axis("Entropy (nats), length"),
        )
        if checks
        else None,
    }


def _drawn(lines: Sequence[tuple[str, list[float], list[float], str]], upwards: dict[str, Any]) -> Figure:
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(x) < 40 else "lines",
            "x": x,
            "y": y,
            "name": name,
            "line": {"color": colour},
        }
        for name, x, y, colour in lines
    ]
    return figure(data, axis("Epoch"), upwards)
