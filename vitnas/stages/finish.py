"""The end of a run: export the chosen Model, measure latency, read the test split once, write the final table."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitnas.data import EvalBatches, Readings
from vitnas.errors import UserError
from vitnas.exporting import export_model, load_timm
from vitnas.measure.latency import LatencyMeter
from vitnas.records import (
    ExportedFile,
    ExportRecord,
    FinalRow,
    FinalScores,
    LatencyRecord,
    LatencyRow,
    Result,
    Results,
)
from vitnas.reporting import report
from vitnas.reporting.tables import wilson
from vitnas.stages.context import EVAL_BATCH, Context
from vitnas.stages.models import load_model
from vitnas.train import Score, evaluate

VERIFY_IMAGES = 64
FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}


def export_chosen(context: Context) -> None:
    """The chosen Model as files, each verified against it on held-out images (export/export.json)."""
    target = context.folder / "export"

    def make() -> None:
        model, folder = load_model(context, "chosen"), context.folder / "models" / "chosen"
        files = export_files(context, model, target)
        again, images = load_timm(folder), verify_images(context)
        with torch.no_grad():
            difference = float((again.eval()(images) - model(images)).abs().max())
        params, reported = sum(p.numel() for p in again.parameters()), Result.read(folder).params
        if params != reported:
            raise UserError(
                f"the exported model has {params} parameters; {reported} were reported. Delete {folder}."
            )
        files["timm"] = ExportedFile(
            path="models/chosen",
            params=reported,
            exported_params=params,
            max_abs_diff=difference,
            n_images=len(images),
        )
        ExportRecord(files).write(target)

    context.once(ExportRecord.path(target), make)


def export_files(context: Context, model: nn.Module, folder: Path) -> dict[str, ExportedFile]:
    """`model` in every format that the run asks for, in `folder`, verified on held-out images."""
    files: dict[str, ExportedFile] = {}
    for kind in context.run.export.formats:
        found = export_model(
            model,
            folder / FILES[kind],
            verify_images(context),
            class_names=context.data.class_names,
            data_config=context.data_config,
        )
        kept = {item.name: found[item.name] for item in fields(ExportedFile) if item.name in found}
        path = str((folder / FILES[kind]).relative_to(context.folder))
        files[kind] = ExportedFile(**{**kept, "path": path, "problems": tuple(found["problems"])})
    return files


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
    target = context.folder / "export"

    def make() -> None:
        models = {role: load_model(context, role) for role in roles(context)}
        rows = []
        for text in context.run.export.latency:
            for role, latency in LatencyMeter(text).compare(models).items():
                rows.append(LatencyRow(role, text, latency))
        LatencyRecord(tuple(rows)).write(target)

    context.once(LatencyRecord.path(target), make)


def roles(context: Context) -> list[str]:
    """The trained models of the run, the chosen one first, those that were asked for by name last."""
    wanted = ("chosen", *context.run.retrain.baselines)
    results = {path.parent.name: path for path in sorted(context.folder.glob(f"models/*/{Result.FILE}"))}
    asked = [role for role, path in results.items() if role not in wanted and Result.load(path).asked]
    return [role for role in (*wanted, *asked) if role in results]


def final_table(context: Context) -> Results:
    """Read the test split, once, for all models of the table; write results.json and report.html."""
    context.once(Results.path(context.folder), lambda: _make_table(context))
    context.once(context.folder / "report.html", lambda: report(context.folder))
    return Results.read(context.folder)


def _make_table(context: Context) -> None:
    names = roles(context)
    if "chosen" not in names:
        raise UserError(
            f"{context.folder} has no trained model yet; `vitnas retrain` makes it. Run that first."
        )
    if not FinalScores.exists(
        context.folder
    ):  # the only place where the test split is read, and it is read once
        missing = {"chosen", *context.run.retrain.baselines} - set(names)
        if missing:
            raise UserError(
                f"{', '.join(sorted(missing))} not trained yet; the test split is read once, for all models together. "
                f"Run `vitnas retrain {context.folder}` first."
            )
        test = context.data.open_test(
            Readings.path(context.folder), purpose=f"final table of {', '.join(names)}"
        )
        batches = EvalBatches(test, batch_size=EVAL_BATCH, workers=context.run.data.workers)
        device = context.engine.device
        found = {role: evaluate(load_model(context, role).to(device), batches) for role in names}
        FinalScores(found).write(context.folder)
    scores = FinalScores.read(context.folder).scores  # a model that was trained after that reading has no row
    rows = tuple(_row(context.folder, role, scores[role]) for role in names if role in scores)
    Results(rows, rows[0].arch_id, files(context.folder)).write(context.folder)


def _row(folder: Path, role: str, score: Score) -> FinalRow:
    where, timed = folder / "models" / role, folder / "export"
    result = replace(Result.read(where), test_accuracy=score.accuracy, n_test=score.n)
    result.write(where)
    rows = LatencyRecord.read(timed).rows if LatencyRecord.exists(timed) else ()
    return FinalRow(
        **{item.name: getattr(result, item.name) for item in fields(Result)},
        name=role.replace("_", " "),
        ci95=wilson(round(score.accuracy * score.n), score.n),
        latency_ms={row.target: row.latency for row in rows if row.role == role},
    )


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
