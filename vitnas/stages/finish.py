"""The end of a run: export the chosen Model, measure latency, read the test split once, write the final table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitnas.data import EvalBatches
from vitnas.errors import UserError
from vitnas.exporting import export_model, load_timm
from vitnas.measure.latency import LatencyMeter
from vitnas.reporting import report
from vitnas.reporting.tables import wilson
from vitnas.runs import read_json, write_json
from vitnas.stages.context import EVAL_BATCH, Context
from vitnas.stages.models import load_model
from vitnas.train import evaluate

VERIFY_IMAGES = 64
FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}


def export_chosen(context: Context) -> None:
    """The chosen Model as files, each verified against it on held-out images (export/export.json)."""
    target = context.folder / "export" / "export.json"

    def make() -> None:
        model = load_model(context, "chosen")
        images = verify_images(context)
        names = context.data.class_names
        record: dict[str, Any] = {}
        for kind in context.run.export.formats:
            path = context.folder / "export" / FILES[kind]
            found = export_model(model, path, images, class_names=names, data_config=context.data_config)
            record[kind] = {**found, "path": f"export/{FILES[kind]}"}
        folder = context.folder / "models" / "chosen"
        again = load_timm(folder)
        with torch.no_grad():
            difference = float((again.eval()(images) - model(images)).abs().max())
        params = sum(p.numel() for p in again.parameters())
        reported = read_json(folder / "result.json")["params"]
        if params != reported:
            raise UserError(
                f"the exported model has {params} parameters; {reported} were reported. Delete {folder}."
            )
        record["timm"] = {
            "path": "models/chosen",
            "max_abs_diff": difference,
            "n_images": len(images),
            "params": reported,
            "exported_params": params,
        }
        write_json(target, record)

    context.once(target, make)


def verify_images(context: Context) -> Tensor:
    """Real held-out images, as the models take them."""
    found, count = [], 0
    for images_BCHW, _ in context.holdout:
        found.append(images_BCHW)
        count += len(images_BCHW)
        if count >= VERIFY_IMAGES:
            break
    return torch.cat(found)[:VERIFY_IMAGES]


def measure(context: Context) -> None:
    """Latency of all trained models, timed in the same rounds (export/latency.json)."""
    target = context.folder / "export" / "latency.json"

    def make() -> None:
        models = {role: load_model(context, role) for role in roles(context)}
        rows = []
        for text in context.run.export.latency:
            for role, latency in LatencyMeter(text).compare(models).items():
                rows.append({"role": role, "target": text, **latency.to_json()})
        write_json(target, {"rows": rows})

    context.once(target, make)


def roles(context: Context) -> list[str]:
    """The trained models of the run, the chosen one first, those that were asked for by name last."""
    wanted = ("chosen", *context.run.retrain.baselines)
    results = {path.parent.name: path for path in sorted(context.folder.glob("models/*/result.json"))}
    asked = [role for role, path in results.items() if role not in wanted and "asked" in read_json(path)]
    return [role for role in (*wanted, *asked) if role in results]


def finish(context: Context) -> dict[str, Any]:
    """Read the test split, once, for all models of the table; write results.json and report.html."""
    target = context.folder / "results.json"
    context.once(target, lambda: _final_table(context, target))
    context.once(context.folder / "report.html", lambda: _report(context.folder))
    results: dict[str, Any] = read_json(target)
    return results


def _report(folder: Path) -> None:
    report(folder)


def _final_table(context: Context, target: Path) -> None:
    names = roles(context)
    if "chosen" not in names:
        raise UserError(
            f"{context.folder} has no trained model yet; `vitnas retrain` makes it. Run that first."
        )
    scores = context.folder / "test_scores.json"
    if not scores.exists():  # the only place where the test split is read, and it is read once
        missing = {"chosen", *context.run.retrain.baselines} - set(names)
        if missing:
            raise UserError(
                f"{', '.join(sorted(missing))} not trained yet; the test split is read once, for all models together. "
                f"Run `vitnas retrain {context.folder}` first."
            )
        test = context.data.open_test(
            context.folder / "test_reads.json", purpose=f"final table of {', '.join(names)}"
        )
        batches = EvalBatches(test, batch_size=EVAL_BATCH, workers=context.run.data.workers)
        device = context.engine.device
        found = {role: evaluate(load_model(context, role).to(device), batches) for role in names}
        write_json(
            scores, {role: {"accuracy": score.accuracy, "n": score.n} for role, score in found.items()}
        )
    read = read_json(scores)  # a model that was trained after that reading has no row
    rows = [_row(context, role, read[role]) for role in names if role in read]
    write_json(target, {"rows": rows, "chosen": rows[0]["arch_id"], "files": files(context.folder)})


def _row(context: Context, role: str, score: dict[str, Any]) -> dict[str, Any]:
    result = read_json(context.folder / "models" / role / "result.json")
    result |= {"test_accuracy": score["accuracy"], "n_test": score["n"]}
    write_json(context.folder / "models" / role / "result.json", result)
    latency = context.folder / "export" / "latency.json"
    measured = read_json(latency)["rows"] if latency.exists() else []
    low, high = wilson(round(score["accuracy"] * score["n"]), score["n"])
    return {
        "name": role.replace("_", " "),
        **result,
        "ci95": [low, high],
        "latency_ms": {row["target"]: row for row in measured if row["role"] == role},
    }


def files(folder: Path) -> dict[str, str]:
    """The files that a person wants, by what they are, relative to the run folder."""
    wanted = {
        "timm": "models/chosen",
        "onnx": "export/model.onnx",
        "torch_export": "export/model.pt2",
        "study": "study.db",
        "report": "report.html",
    }
    return {name: path for name, path in wanted.items() if (folder / path).exists() or name == "report"}
