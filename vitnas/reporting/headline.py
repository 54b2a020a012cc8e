"""The top of the report: which Model, whether it meets the budget, where its files are, how to load them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vitnas.arch import Arch
from vitnas.budget import Budget, Limit, format_quantity
from vitnas.errors import UserError
from vitnas.reporting.files import Record, RunFiles
from vitnas.reporting.tables import (
    MISSING,
    Table,
    accuracy_text,
    is_number,
    number,
    percent,
    result_rows,
    size,
)

# Path in the run folder -> what it is, in the order shown.
FILES = {
    "models/chosen/model.safetensors": "weights for timm (with config.json beside it)",
    "models/chosen/config.json": "timm config",
    "models/chosen/arch.json": "the Arch",
    "export/model.onnx": "ONNX",
    "export/model.pt2": "torch.export",
    "front": "every Arch of the front: config and inherited weights",
    "supernet.safetensors": "the Supernet's weights",
    "study.db": "the Study (Optuna, SQLite)",
    "run.yaml": "the resolved run",
}
# Stage -> files that show it is done.
STAGES = {
    "feasibility": ("feasibility.json",),
    "supernet": ("supernet.safetensors",),
    "search": ("search.json",),
    "retrain": ("models/chosen/result.json",),
    "export": ("export/export.json",),
    "latency": ("export/latency.json",),
    "results": ("results.json",),
}


@dataclass(frozen=True)
class FileLink:
    """A file or folder of the run: `href` is relative to the page."""

    path: str
    what: str
    size: str
    href: str


@dataclass(frozen=True)
class Snippet:
    """Code that loads one file."""

    title: str
    code: str


def stages(run: RunFiles) -> list[tuple[str, bool]]:
    """Every stage of a run and whether its files are there."""
    return [(name, all((run.folder / path).exists() for path in paths)) for name, paths in STAGES.items()]


def chosen_record(run: RunFiles) -> dict[str, Any]:
    """What is known of the chosen Model: the search's costs, then its result, then the final row."""
    record: dict[str, Any] = {}
    for trial in run.search.get("trials", []):
        if trial.get("arch_id") == run.chosen_id and run.chosen_id:
            costs = trial.get("costs", {})
            record = {
                **costs,
                "memory_bytes": costs.get("memory"),
                "supernet_accuracy": trial.get("values", {}).get("accuracy"),
            }
            break
    row = next((row for row in result_rows(run) if row["role"] == "chosen"), {})
    return {**record, **{key: value for key, value in row.items() if value is not None}}


def sentence(run: RunFiles) -> str:
    """The chosen Arch, its cost and its accuracy in one sentence, or why there is none."""
    if not run.chosen_id:
        return "No Arch is chosen yet: the search stage has not finished."
    record = chosen_record(run)
    what = (
        run.chosen.describe() if run.chosen else f"Arch {run.chosen_id} (its arch.json is not in the folder)"
    )
    cost = f"{number(record.get('params'))} params, {number(record.get('macs'), 'MACs')}"
    if is_number(record.get("test_accuracy")):
        accuracy = accuracy_text(record["test_accuracy"], record.get("n_test"), "test")
    elif is_number(record.get("holdout_accuracy")):
        accuracy = (
            f"{accuracy_text(record['holdout_accuracy'], record.get('n_holdout'), 'holdout')}; test {MISSING}"
        )
    elif is_number(record.get("supernet_accuracy")):
        accuracy = f"{percent(record['supernet_accuracy'])} with inherited weights; not retrained yet"
    else:
        accuracy = f"accuracy {MISSING}"
    return f"{what}, {cost}: {accuracy}"


def why(run: RunFiles) -> str:
    """One sentence on why this Arch: what it was picked from."""
    search = run.search
    if not search or not run.chosen_id:
        return ""
    front = run.search.get("front", [])
    text = f"Picked from {number(search.get('num_scored'))} scored Archs"
    if is_number(search.get("num_rejected")):
        text += f" ({number(search['num_rejected'])} more were rejected unscored)"
    place = "on" if run.chosen_id in front else "NOT on"
    return f"{text}; it is {place} the Pareto front of {len(front)}."


def budget_table(run: RunFiles) -> tuple[Table, str]:
    """The chosen Model against each limit with its margin, and the verdict in words."""
    text = str(run.search.get("budget") or "")
    if not text:
        return Table((), ()), "No budget is recorded."
    try:
        budget = Budget.parse(text)
    except UserError as error:
        return Table((), ()), f"The budget {text!r} cannot be read: {error}"
    record = chosen_record(run)
    rows, met = [], []
    for limit in budget.limits:
        value = _cost(record, limit)
        shown = MISSING if value is None else format_quantity(value, limit.quantity)
        inside = None if value is None else not limit.misses(value)
        met.append(inside)
        rows.append(
            (
                str(limit),
                shown,
                _margin(limit, value),
                {True: "met", False: "MISSED", None: "not known"}[inside],
            )
        )
    verdict = (
        "Budget missed." if False in met else "Budget not fully checked." if None in met else "Budget met."
    )
    if not run.chosen_id:
        verdict = f"Budget: {text}."
    return Table(("Limit", "Chosen", "Margin", "Verdict"), tuple(rows), numeric=(1, 2)), verdict


def _cost(record: Record, limit: Limit) -> float | None:
    if limit.quantity == "memory":
        value = record.get("memory_bytes", record.get("memory"))
    elif limit.quantity == "latency":
        value = record.get("latency_ms")
        if isinstance(value, Mapping):
            value = value.get(limit.target, value.get("median_ms"))
        if isinstance(value, Mapping):
            value = value.get("median_ms")
    else:
        value = record.get(limit.quantity)
    return float(value) if is_number(value) else None


def _margin(limit: Limit, value: float | None) -> str:
    """The room left to each bound, as a share of the bound."""
    if value is None:
        return MISSING
    sides = []
    if limit.high is not None:
        sides.append(f"{100 * (1 - value / limit.high):+.1f} % to the upper bound")
    if limit.low is not None:
        sides.append(f"{100 * (value / limit.low - 1):+.1f} % to the lower bound")
    return ", ".join(sides)


def file_links(run: RunFiles, page: Path) -> list[FileLink]:
    """The files that exist, with sizes; links are relative to the page, so the folder can move as a whole."""
    links = []
    for name, what in FILES.items():
        path = run.folder / name
        if path.exists():
            inside = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            href = quote(os.path.relpath(path, page.parent).replace(os.sep, "/"))
            if path.is_dir():
                what = f"{what} ({sum(1 for p in path.iterdir() if p.is_dir())} folders)"
            links.append(FileLink(name, what, size(_bytes(inside)), href))
    return links


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def image_shape(arch: Arch | None) -> str:
    """The shape of a batch that the Model takes, as text."""
    return f"(batch, {', '.join(map(str, arch.input_size))})" if arch else "(batch, channels, height, width)"


def snippets(run: RunFiles) -> list[Snippet]:
    """Three lines for each file that can be loaded."""
    folder, onnx, program = (
        run.folder / path for path in ("models/chosen", "export/model.onnx", "export/model.pt2")
    )
    found = []
    if (folder / "model.safetensors").exists():
        lines = (
            "import timm, vitnas",
            f"model = timm.create_model({'local-dir:' + folder.as_posix()!r}, pretrained=True).eval()",
            "logits = model(images)",
        )
        found.append(Snippet("timm", "\n".join(lines)))
    if onnx.exists():
        lines = (
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({onnx.as_posix()!r}, providers=['CPUExecutionProvider'])",
            "(logits,) = session.run(None, {session.get_inputs()[0].name: images})  # images: numpy",
        )
        found.append(Snippet("ONNX Runtime", "\n".join(lines)))
    if program.exists():
        lines = (
            "import torch",
            f"program = torch.export.load({program.as_posix()!r})",
            "logits = program.module()(images)",
        )
        found.append(Snippet("torch.export", "\n".join(lines)))
    return found
