"""The top of the report: which Model, whether it meets the budget, where its files are, how to load them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from vitnas.arch import Arch
from vitnas.budget import Budget, Cost, Limit, format_quantity
from vitnas.exporting.card import card_of
from vitnas.exporting.script import SCRIPT, executorch_code
from vitnas.reporting.files import RunFiles
from vitnas.reporting.tables import MISSING, Table, accuracy_text, number, share, size
from vitnas.runs import read_text
from vitnas.searching.choosing import cannot_order

# Path in the run folder -> what it is, in the order shown.
FILES = {
    "models/chosen/model.safetensors": "weights for timm (with config.json beside it)",
    "models/chosen/config.json": "timm config",
    "models/chosen/arch.json": "the Arch",
    "export/model.onnx": "ONNX",
    "export/model_int8.onnx": "ONNX in 8 bits",
    "export/model_fp16.onnx": "ONNX in 16 bits",
    "export/model_float.onnx": "ONNX that takes prepared images",
    "export/model.pt2": "torch.export",
    "export/model.pte": "ExecuTorch",
    "export/model_float.pt2": "torch.export that takes prepared images",
    "export/predict.py": "a script that uses the ONNX file",
    "export/README.md": "the model card",
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
UNSURE = "search: cannot tell Archs apart"


@dataclass(frozen=True)
class FileLink:
    """A file or folder of the run: `href` is relative to the page."""

    path: str
    what: str
    size: str
    href: str


@dataclass(frozen=True)
class Snippet:
    """Code that loads one file, and what that takes."""

    title: str
    code: str
    takes: str


def stages(run: RunFiles) -> list[tuple[str, bool]]:
    """Every stage of a run and whether its files are there; of a search also that its scores order nothing."""
    unsure = bool(run.search and cannot_order(run.search))
    return [
        (UNSURE if name == "search" and unsure else name, all((run.folder / path).exists() for path in paths))
        for name, paths in STAGES.items()
        if name != "supernet" or run.has_supernet
    ]


def sentence(run: RunFiles) -> str:
    """The chosen Arch, its cost and its accuracy in one sentence, or why there is none."""
    if not run.chosen_id:
        return "No Arch is chosen yet: the search stage has not finished."
    what = (
        run.chosen.describe() if run.chosen else f"Arch {run.chosen_id} (its arch.json is not in the folder)"
    )
    cost, model = _cost(run), run.models.get("chosen")
    known = f"{number(cost.params)} params, {number(cost.macs, 'MACs')}" if cost else f"cost {MISSING}"
    if model and model.test_accuracy is not None:
        accuracy = accuracy_text(model.test_accuracy, model.n_test, "test", model.test_error)
    elif model and model.holdout_accuracy is not None:
        held = accuracy_text(model.holdout_accuracy, model.n_holdout, "holdout", model.holdout_error)
        accuracy = f"{held}; test {MISSING}"
    elif run.chosen_trial:
        values = run.chosen_trial.values
        accuracy = f"{share(values['accuracy'], values.get('error'))} {run.scored_how}; not retrained yet"
    else:
        accuracy = f"accuracy {MISSING}"
    return f"{what}, {known}: {accuracy}"


def why(run: RunFiles) -> str:
    """One sentence on why this Arch: what it was picked from."""
    if not run.search or not run.chosen_id:
        return ""
    front = f"the Pareto front of {len(run.search.front)}"
    if run.chosen_id in run.search.front:
        place = f"it is on {front}"
    elif run.finals:
        place = f"the finals chose it, though by scores it is not on {front}"
    else:
        place = f"it is not on {front}, as scores of few images are drawn to what such Archs have on average"
    return (
        f"Picked from {run.search.num_scored} scored Archs ({run.search.num_rejected} more were rejected); "
        f"{place}.{_tokens(run)}"
    )


def _tokens(run: RunFiles) -> str:
    """What keeping fewer tokens gained in time, and which Archs were left out because it gained nothing."""
    speeds = run.token_speeds.speeds if run.token_speeds else ()
    own = [speed for speed in speeds if speed.arch_id == run.chosen_id]
    told = "".join(
        f" Keeping fewer tokens takes it from {speed.full_ms:.2f} to {speed.ms:.2f} ms on {speed.target}."
        for speed in own
    )
    slower = {speed.arch_id for speed in speeds if not speed.is_faster}
    if slower:
        targets = ", ".join(dict.fromkeys(speed.target for speed in speeds))
        told += (
            f" {len(slower)} Arch{'s' * (len(slower) > 1)} of the front left it: timed beside the same Arch with all "
            f"tokens on {targets}, fewer were not faster."
        )
    return told


def budget_table(run: RunFiles) -> tuple[Table, str]:
    """The chosen Model against each limit with its margin, and the verdict in words."""
    text = run.search.budget if run.search else ""
    if not text:
        return Table((), ()), "No budget is recorded."
    table, verdict = limits(text, _cost(run))
    return table, verdict if run.chosen_id else f"Budget: {text}."


def limits(text: str, cost: Cost | None) -> tuple[Table, str]:
    """What something costs against each limit of a budget, with its margin, and the verdict in words."""
    rows, met = [], []
    for limit in Budget.parse(text).limits:
        value = None
        if cost and (limit.quantity != "latency" or limit.target in cost.latency_ms):
            value = cost.value(limit.quantity, limit.target)
        shown = MISSING if value is None else format_quantity(value, limit.quantity)
        inside = None if value is None else not limit.misses(value)
        met.append(inside)
        verdict = {True: "met", False: "MISSED", None: "not known"}[inside]
        rows.append((str(limit), shown, _margin(limit, value), verdict))
    verdict = (
        "Budget missed." if False in met else "Budget not fully checked." if None in met else "Budget met."
    )
    return Table(("Limit", "Chosen", "Margin", "Verdict"), tuple(rows), numeric=(1, 2)), verdict


def _cost(run: RunFiles) -> Cost | None:
    """What the chosen Model costs: the search's figures, latency as measured last."""
    trial, timed = run.chosen_trial, run.latencies.get("chosen", {})
    if trial is None:
        return None
    measured = {target: latency.median_ms for target, latency in timed.items()}
    return replace(trial.costs, latency_ms={**trial.costs.latency_ms, **measured})


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
                if not run.scores_are_inherited:
                    what = what.replace("inherited weights", "weights of a brief training")
                what = f"{what} ({sum(1 for p in path.iterdir() if p.is_dir())} folders)"
            links.append(FileLink(name, what, size(_bytes(inside)), href))
    return links


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def image_shape(arch: Arch | None) -> str:
    """The shape of a batch that the Model takes, as text."""
    return f"(batch, {', '.join(map(str, arch.input_size))})" if arch else "(batch, channels, height, width)"


def snippets(run: RunFiles) -> list[Snippet]:
    """Code for each file that can be loaded."""
    folder, onnx, program = (
        run.folder / path for path in ("models/chosen", "export/model.onnx", "export/model.pt2")
    )
    found = []
    if (folder / "model.safetensors").exists():
        is_plain = (folder / "config.json").exists() and not card_of(folder).needs
        lines = (
            "import timm" if is_plain else "import timm, vitnas",
            f"model = timm.create_model({'local-dir:' + folder.as_posix()!r}, pretrained=True).eval()",
            "logits = model(images)",
        )
        takes = f"Takes images {image_shape(run.chosen)}, float32, prepared as its config.json says; gives logits."
        found.append(Snippet("timm", "\n".join(lines), takes))
    record = run.export.files if run.export else {}
    pixels = (
        "Takes uint8 images (batch, height, width, channels) of any height and width; gives probabilities."
    )
    tensors = f"Takes prepared images {image_shape(run.chosen)}, float32; gives logits."
    if onnx.exists():
        is_ready = "onnx" in record and record["onnx"].input == "uint8"
        path = run.folder / "export" / SCRIPT
        if path.exists():
            code = read_text(path).rstrip()
            takes = f"{pixels if is_ready else tensors} This is export/{SCRIPT}."
        else:
            lines = (
                "import onnxruntime",
                f"session = onnxruntime.InferenceSession({onnx.as_posix()!r}, providers=['CPUExecutionProvider'])",
                "(answers,) = session.run(None, {session.get_inputs()[0].name: images})  # images: numpy",
            )
            code, takes = "\n".join(lines), pixels if is_ready else tensors
        found.append(Snippet("ONNX Runtime", code, takes))
    if program.exists():
        lines = (
            "import torch",
            f"program = torch.export.load({program.as_posix()!r})",
            "answers = program.module()(images)",
        )
        is_ready = "torch_export" in record and record["torch_export"].input == "uint8"
        found.append(Snippet("torch.export", "\n".join(lines), pixels if is_ready else tensors))
    if "executorch" in record:
        file = record["executorch"]
        about = ("Takes a uint8 image (1, height, width, channels); gives probabilities.", *file.problems)
        found.append(
            Snippet("ExecuTorch", executorch_code((run.folder / file.path).as_posix()), " ".join(about))
        )
    return found
