"""Accuracy and cosine against MACs and time, a line per selector: what `evidence_tokens_pretrained.py` wrote.

    python benchmarks/plot_tokens.py FILE.csv --out FILE.png

Chromium draws the page (`chromium` on the path), which is written beside the picture where there is none.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from vitnas.reporting.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

COLOURS = {
    "merge": BLUE,
    "attention": ORANGE,
    "fixed": GREEN,
    "random": GREY,
    "evit": PURPLE,
    "predictor": RED,
    "first": "#a98467",
}
WIDTH, HEIGHT = 1100, 780
PANELS = (("share", "accuracy"), ("times", "accuracy"), ("share", "cosine"), ("times", "cosine"))
TITLES = {
    "share": "MACs, % of the whole network's",
    "times": "times faster (ONNX Runtime, batch 1, one thread)",
    "accuracy": "accuracy of a frozen probe, %",
    "cosine": "cosine of the class token",
}


def points(rows: list[dict[str, str]]) -> dict[tuple[str, int], list[dict[str, float]]]:
    """Means over seeds, by (selector, images learned from), the highest keep rate first; a file that learned is as
    fast as the one that did not."""
    whole = next(row for row in rows if row["selector"] == "none")
    faster = {
        (row["selector"], row["keep"]): float(row["whole_ms"]) / float(row["ms"]) for row in rows if row["ms"]
    }
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    kinds = {(row["selector"], row["keep"], int(row["images"])) for row in rows if row is not whole}
    for word, keep, images in sorted(kinds, key=lambda kind: (kind[0], kind[2], -float(kind[1]))):
        mine = [
            row for row in rows if (row["selector"], row["keep"], int(row["images"])) == (word, keep, images)
        ]
        point = {
            "share": 100 * float(mine[0]["macs"]) / float(whole["macs"]),
            "accuracy": 100 * statistics.mean(float(row["accuracy"]) for row in mine),
            "cosine": statistics.mean(float(row["cosine"]) for row in mine),
        }
        if (word, keep) in faster:
            point["times"] = faster[word, keep]
        found.setdefault((word, images), []).append(point)
    return found


def traces(rows: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    whole = next(row for row in rows if row["selector"] == "none")
    best = {"share": 100.0, "times": 1.0, "accuracy": 100 * float(whole["accuracy"]), "cosine": 1.0}
    for panel, (x, y) in enumerate(PANELS, 1):
        axes = {"xaxis": f"x{panel}", "yaxis": f"y{panel}"}
        yield {
            "x": [best[x]], "y": [best[y]], **axes, "name": "whole network", "mode": "markers", "type": "scatter",
            "marker": {"symbol": "star", "size": 13, "color": "#222"}, "showlegend": panel == 1,
        }  # fmt: skip
        for (word, images), line in points(rows).items():
            seen = [point for point in line if x in point]
            yield {
                "x": [point[x] for point in seen], "y": [point[y] for point in seen], **axes,
                "name": f"{word}, learned from {images:,} images" if images else word,
                "mode": "markers" if images else "lines+markers", "type": "scatter", "showlegend": panel == 1,
                "marker": {
                    "color": COLOURS[word], "size": 11 if images else 7,
                    "symbol": "diamond-open" if images else "circle", "line": {"width": 2},
                },
                "line": {"color": COLOURS[word]},
            }  # fmt: skip


def page(rows: list[dict[str, str]]) -> str:
    layout: dict[str, Any] = {
        "grid": {"rows": 2, "columns": 2, "pattern": "independent"},
        "width": WIDTH, "height": HEIGHT, "margin": {"t": 20, "l": 60, "r": 10, "b": 50},
        "legend": {"font": {"size": 10}}, "paper_bgcolor": "white", "plot_bgcolor": "#f6f7f9",
    }  # fmt: skip
    for panel, (x, y) in enumerate(PANELS, 1):
        layout[f"xaxis{panel}"] = {
            "title": {"text": TITLES[x]},
            "autorange": "reversed" if x == "share" else True,
        }
        layout[f"yaxis{panel}"] = {"title": {"text": TITLES[y]}}
    drawn = json.dumps([*traces(rows)]), json.dumps(layout)
    return (
        "<!doctype html><meta charset=utf-8><body style='margin:0'><div id=plot></div>"
        f"<script>{get_plotlyjs()}</script>"
        f"<script>Plotly.newPlot('plot', {drawn[0]}, {drawn[1]}, {{staticPlot: true}})</script>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with options.file.open(encoding="utf-8", newline="") as file:
        text = page(list(csv.DictReader(file)))
    browser = shutil.which("chromium")
    if browser is None:
        options.out.with_suffix(".html").write_text(text, encoding="utf-8")
        print(f"no chromium: {options.out.with_suffix('.html')} is written")
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plot.html").write_text(text, encoding="utf-8")
        shot = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000",
            f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={options.out.resolve()}", f"file://{folder}/plot.html",
        ]  # fmt: skip
        subprocess.run(shot, check=True, capture_output=True)


if __name__ == "__main__":
    main()
