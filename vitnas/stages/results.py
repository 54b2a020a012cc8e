"""Results of a run: export the chosen Model, measure latency, read the test split once, write the final table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitnas.budget import Budget, split_target
from vitnas.data import Readings
from vitnas.errors import UserError, nearest
from vitnas.exporting import ExportError, export_model
from vitnas.exporting.executorch import timed_beside
from vitnas.exporting.precision import Judged, Precision, export_precise, onnx_target
from vitnas.exporting.script import SCRIPT, script_of
from vitnas.measure.convert import input_shape
from vitnas.measure.latency import LatencyMeter
from vitnas.measure.target import LatencyTarget, parse_target
from vitnas.model import Model, build
from vitnas.model.named import ArchFile
from vitnas.predicting.examine import answers, examine
from vitnas.records import (
    ExportedFile,
    ExportRecord,
    FinalRow,
    FinalScores,
    LatencyRecord,
    LatencyRow,
    Result,
    Results,
    Versus,
)
from vitnas.reporting import tell, write_cards
from vitnas.runs import write_atomic
from vitnas.stages.models import Models
from vitnas.stages.run import ExportConfig, Run
from vitnas.stages.work import Work, load_weights
from vitnas.train import Score
from vitnas.train.evaluate import evaluate_each, interval_of, paired, paired_mean

FILES = {
    "onnx": "model.onnx",
    "torch_export": "model.pt2",
    "onnx_float": "model_float.onnx",
    "torch_export_float": "model_float.pt2",
    "onnx_fp16": "model_fp16.onnx",
    "onnx_int8": "model_int8.onnx",
    "executorch": "model.pte",
}
# The first of them that is there has the script.
SCRIPTED = ("onnx", "onnx_int8", "onnx_fp16", "onnx_float")
PRECISIONS: Mapping[str, Precision] = {"onnx_fp16": "fp16", "onnx_int8": "int8"}


def export_chosen(models: Models, config: ExportConfig) -> None:
    """The chosen Model as files, each verified against it on held-out images (export/export.json)."""
    target = models.work.folder / "export"

    def make() -> None:
        model, folder, images = models.load("chosen"), models.folder("chosen"), models.images.some()
        made = export_files(models.images, model, target, config)
        own = build(ArchFile.read(folder).arch).eval()  # what timm makes of the folder is held against it
        load_weights(own, folder / "model.safetensors", "vitnas retrain")
        with torch.no_grad():
            difference = float((model(images) - own(images)).abs().max())
        params, reported = sum(p.numel() for p in model.parameters()), Result.read(folder).params
        if params != reported:
            raise UserError(
                f"the exported model has {params} parameters; {reported} were reported. Delete {folder}."
            )
        timm = ExportedFile(
            path="models/chosen",
            params=reported,
            exported_params=params,
            max_abs_diff=difference,
            n_images=len(images),
        )
        replace(made, files={**made.files, "timm": timm}).write(target)
        write_cards(models.work.folder)

    models.work.once(ExportRecord.path(target), make)


class ExportImages(Protocol):
    """What files are held against; `root` is what their paths are told from."""

    @property
    def root(self) -> Path: ...

    def some(self) -> Tensor:
        """A few images, as the network takes them."""
        ...

    @property
    def judged(self) -> Judged:
        """Images by which files of another precision are made and judged."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """`class_names` and `data_config` for the files."""
        ...


def export_role(models: Models, role: str, config: ExportConfig) -> ExportRecord:
    """A model of a run as files, each held against it on the holdout, beside a card (export/<role>/, export.json).

    Raises:
        UserError: there is no such model.
    """
    folder = models.work.folder
    if not Result.exists(models.folder(role)):
        have = sorted(path.parent.name for path in folder.glob(f"models/*/{Result.FILE}"))
        raise UserError(
            f"{folder} has no trained model {role!r} (it has: {', '.join(have) or 'none yet'}). Name one of these, or "
            f"let the run make it.{nearest(role, have)}"
        )
    model, images, target = models.load(role), models.images, folder / "export" / role
    if model.arch.image_size != images.data.image_size:  # a finetuned one
        images = images.resized(model.arch.image_size)
    made = export_files(images, model, target, config)
    made.write(target)
    write_cards(folder)
    return made


def export_files(
    images: ExportImages,
    model: nn.Module,
    folder: Path,
    config: ExportConfig,
    export: Callable[..., dict[str, Any]] = export_model,
) -> ExportRecord:
    """`model` in every format, in a folder of the run, verified on held-out images, and a script that uses it.

    Args:
        export: what writes a file: `export_model`, or what takes the same.
    """
    files: dict[str, ExportedFile] = {}
    refused: dict[str, str] = {}
    for kind in config.formats:
        file = folder / FILES[kind]
        if kind in PRECISIONS:
            found, beside, reason = export_precise(
                model,
                file,
                images.judged,
                PRECISIONS[kind],
                target=onnx_target(config.latency),
                opset=config.opset,
                **images.about,
            )
            if reason:
                refused[kind] = reason
                continue
            found["beside"] = beside
        else:
            more = {"opset": config.opset} if file.suffix == ".onnx" else {}
            pixels = not kind.endswith("_float")
            try:
                found = export(model, file, images.some(), **images.about, pixels=pixels, **more)
            except ExportError as error:
                if kind != "executorch":  # it lacks operators that others have
                    raise
                refused[kind] = str(error).rstrip(".")
                continue
        kept = {item.name: found[item.name] for item in fields(ExportedFile) if item.name in found}
        path = str(file.relative_to(images.root))
        files[kind] = ExportedFile(**{**kept, "path": path, "problems": tuple(found["problems"])})
    if {"onnx", "executorch"} <= files.keys():
        channels, *sides = input_shape(model)
        ms, threads = timed_beside(
            folder / FILES["executorch"], folder / FILES["onnx"], (1, *sides, channels)
        )
        files["executorch"] = replace(files["executorch"], ms=ms, threads=threads)
    if written := next((FILES[kind] for kind in SCRIPTED if kind in files), ""):
        write_atomic(folder / SCRIPT, script_of(folder / written))
    return ExportRecord(files, refused)


def timed_on(run: Run) -> tuple[str, ...]:
    """What trained networks are timed on: the targets of the budget, the objectives and the export, each once."""
    objectives = [target for _, target in map(split_target, run.search.objectives) if target]
    named = (*Budget.parse(run.budget).latency_targets, *objectives)
    first: dict[LatencyTarget, str] = {}  # texts may say one target in several ways; files have the first
    for text in (*named, *(split_target(f"latency@{each}")[1] for each in run.export.latency)):
        first.setdefault(parse_target(text), text)
    return tuple(first.values())


def measure(models: Models, targets: Sequence[str]) -> None:
    """Latency of all trained models, timed in the same rounds (export/latency.json)."""
    measure_together(models.work, lambda: {role: models.load(role) for role in models.roles}, targets)


def measure_together(work: Work, load: Callable[[], Mapping[str, Model]], targets: Sequence[str]) -> None:
    """export/latency.json: networks by role, on every target all of them timed in the same rounds."""
    target = work.folder / "export"

    def make() -> None:
        loaded = load()
        rows = [
            LatencyRow(role, text, latency)
            for text in targets
            for role, latency in LatencyMeter(text).compare(loaded).items()
        ]
        LatencyRecord(tuple(rows)).write(target)

    work.once(LatencyRecord.path(target), make)


def final_table(models: Models) -> None:
    """Read the test split, once, for all models of the table; write results.json and report.html."""
    folder = models.work.folder
    models.work.once(Results.path(folder), lambda: _make_table(models))
    models.show_tokens()
    models.work.engine.from_first(lambda: tell(folder))  # also over one from before the end


def _make_table(models: Models) -> None:
    names, folder = models.roles, models.work.folder
    if "chosen" not in names:
        raise UserError(f"{folder} has no trained model yet; `vitnas retrain` makes it. Run that first.")
    if not FinalScores.exists(folder):  # the only place where the test split is read, and it is read once
        missing = {*models.own_roles} - set(names)
        if missing:
            raise UserError(
                f"{', '.join(sorted(missing))} not trained yet; the test split is read once, for all models together. "
                f"Run `vitnas retrain {folder}` first."
            )
        test = models.images.data.open_test(
            Readings.path(folder), purpose=f"final table of {', '.join(names)}"
        )
        batches, device = models.images.batches(test), models.work.engine.device
        answered = answers(models.load("chosen").to(device), batches)
        scores = {"chosen": evaluate_each(nn.Identity(), answered, device="cpu", scale=test.scale)}
        others = [role for role in names if role != "chosen"]
        scores |= {role: evaluate_each(models.load(role).to(device), batches) for role in others}
        dataset = models.images.config.dataset
        examine(answered, test, model="models/chosen", dataset=dataset).write(folder)
        FinalScores.of(scores, several=test.several).write(folder)  # last: with it nothing is read again
    read = FinalScores.read(folder)
    known = read.scores  # a model that was trained after that reading has no row
    rows = tuple(_row(folder, role, known[role]) for role in names if role in known)
    verdict = tuple(
        versus(read, role) for role in models.config.baselines if role in {*read.right, *read.explained}
    )
    Results(rows, rows[0].arch_id, files(folder), verdict).write(folder)


def versus(scores: FinalScores, role: str) -> Versus:
    """The chosen model against another, image by image."""
    if scores.explained:
        first_N, second_N = (torch.tensor(scores.explained[each]) for each in ("chosen", role))
        difference, ci95 = paired_mean(first_N, second_N)
        ahead, behind = int((first_N > second_N).sum()), int((second_N > first_N).sum())
        return Versus(
            role=role, difference=difference, ci95=ci95, n=len(first_N), only_chosen=ahead, only_other=behind,
            measure="R^2",
        )  # fmt: skip
    chosen_N, other_N = scores.is_right("chosen"), scores.is_right(role)
    only_chosen, only_other = int((chosen_N & ~other_N).sum()), int((other_N & ~chosen_N).sum())
    n = len(chosen_N)
    return Versus(
        role=role,
        difference=(only_chosen - only_other) / n,
        ci95=paired(only_chosen, only_other, n),
        n=n,
        only_chosen=only_chosen,
        only_other=only_other,
        several=scores.several,
    )


def _row(folder: Path, role: str, score: Score) -> FinalRow:
    where, timed = folder / "models" / role, folder / "export"
    result = replace(
        Result.read(where),
        test_accuracy=score.accuracy,
        test_balanced=score.balanced,
        test_error=score.error,
        test_mae=score.mae,
        n_test=score.n,
    )
    result.write(where)
    times = LatencyRecord.read(timed).by_role if LatencyRecord.exists(timed) else {}
    return FinalRow(
        **vars(result),
        name=role.replace("_", " "),
        ci95=interval_of(score.accuracy, score.n, score.error),
        latency_ms=times.get(role, {}),
    )


def files(folder: Path) -> dict[str, str]:
    """The files that a person wants, by what they are, relative to the run folder."""
    wanted = {
        "timm": "models/chosen",
        **{kind: f"export/{name}" for kind, name in FILES.items()},
        "study": "study.db",
        "report": "report.html",
    }
    return {name: path for name, path in wanted.items() if (folder / path).exists() or name == "report"}
