"""Model cards of a run: beside every model and its files what it is, how good, how dear and how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from vitnas.budget import Cost
from vitnas.errors import UserError
from vitnas.exporting.card import PLACE, UNKNOWN, Card, Scored, card_of, hub_task, task_text, write_card
from vitnas.exporting.describe import names_of
from vitnas.exporting.script import SCRIPT, executorch_code, script_of
from vitnas.measure.latency import Latency
from vitnas.model.named import ArchFile
from vitnas.model.timm_cfg import SCALE
from vitnas.records import ExportRecord, Result, SlimRow
from vitnas.reporting.files import RunFiles, read_run, role_name
from vitnas.reporting.headline import limits
from vitnas.reporting.tables import accuracy_text, errors_text, measure, number, over_budget, percent, size
from vitnas.runs import read_text, write_atomic
from vitnas.train.evaluate import cannot_tell

Facts = Iterator[tuple[str, str]]


def write_cards(folder: Path) -> None:
    """Write README.md beside every model of a run, and beside its exported files."""
    run = read_run(folder)
    for role, result in run.models.items():
        where = folder / "models" / role
        if (where / "config.json").exists():
            write_card(where, _model_card(run, where, result))
    rows = run.slim.results.rows if run.slim.results else ()
    for row in rows:
        where = folder / row.folder
        if row.folder.startswith("front/") and (where / "config.json").exists():
            write_card(where, _front_card(run, where, row))
    for where in sorted(path.parent for path in folder.glob(f"front/*/{ArchFile.FILE}")):
        if card := _inherited_card(run, where):
            write_card(where, card)
    if run.export:
        write_card(folder / "export", files_card(run))
    for where in sorted(path.parent for path in folder.glob(f"export/*/{ExportRecord.FILE}")):
        card = _model_card(run, folder / "models" / where.name, run.models[where.name])
        write_card(where, replace(card, needs="", loads=loads(where), loads_with="onnx"))
    if run.pretrain.made:
        where = folder / "models" / "chosen"
        write_card(where, _pretrained_card(run, where))


def _model_card(run: RunFiles, where: Path, result: Result) -> Card:
    card = card_of(where)
    facts = (*card.facts, *_data(run), *_measured(run, result), *_made(run, result))
    return replace(card, title=_title(run, role_name(result.role)), facts=facts, scored=_scored(run, result))


def files_card(run: RunFiles) -> Card:
    """Of the folder with exported files: those of the chosen model."""
    chosen = run.folder / "models" / "chosen"
    card = card_of(chosen)
    if "chosen" in run.models:
        card = _model_card(run, chosen, run.models["chosen"])
    elif run.pretrain.made:
        card = _pretrained_card(run, chosen)
    return replace(card, needs="", loads=loads(run.folder / "export"), loads_with="onnx")


def write_file_card(folder: Path, model: nn.Module, title: str, made: str) -> None:
    """Write README.md, and predict.py beside model.onnx, for a network that is no run's.

    Args:
        made: how, in words.
    """
    about: list[tuple[str, str]] = []
    try:
        if (folder / "model.onnx").exists():
            write_atomic(folder / SCRIPT, script_of(folder / "model.onnx"))
    except UserError as error:  # of a network whose images nobody described
        about.append(("What is not known", str(error)))
    classes, cfg = getattr(model, "num_classes", None), getattr(model, "pretrained_cfg", None) or {}
    params = number(sum(parameter.numel() for parameter in model.parameters()))
    card = Card(
        title=title,
        about=f"A vision transformer of {params} params, as an ONNX file.",
        facts=(
            ("Task", task_text(classes, cfg)),
            ("How it was made", made),
            *about,
        ),
        loads=loads(folder),
        class_names=tuple(names_of(model)),
        loads_with="onnx",
        licence=str(cfg.get("license") or UNKNOWN),
        task=hub_task(classes, cfg),
        named="Numbers" if cfg.get(SCALE) else "Classes",
    )
    write_card(folder, card)


def loads(folder: Path) -> tuple[tuple[str, str], ...]:
    """Code that uses the files of a folder, by what runs it."""
    record = ExportRecord.read(folder).files if ExportRecord.exists(folder) else {}
    found = []
    if (folder / SCRIPT).exists():
        code = read_text(folder / SCRIPT).rstrip()
        found.append((f"ONNX Runtime, without vitnas (`{SCRIPT}`)", code))
    for kind, file in record.items():
        if kind.startswith("torch_export"):
            takes = "uint8 (batch, height, width, channels)" if file.input == "uint8" else "prepared, float32"
            name = Path(file.path).name
            load = f'program = torch.export.load("{name}").module()'
            found.append(
                (f"torch (`{name}`)", f"import torch\n\n{load}\nanswers = program(images)  # {takes}")
            )
        if kind == "executorch":
            name = Path(file.path).name
            found.append((f"ExecuTorch (`{name}`)", executorch_code(name)))
    return tuple(found)


def _front_card(run: RunFiles, where: Path, row: SlimRow) -> Card:
    card, agreed = card_of(where), row.agreement
    facts = [*card.facts, *_data(run), ("Cost", _cost(row.cost)), *_times(row.latency_ms)]
    if row.accuracy is not None:
        facts.append(("Accuracy", accuracy_text(row.accuracy, agreed.n, "test")))
    if agreed.top1 is not None:
        facts.append(
            ("Same first class as the original", f"{percent(agreed.top1)} of {agreed.n} test images")
        )
    original = run.slim.original.name if run.slim.original else "a trained network"
    facts.append(("How it was made", f"{original} made smaller, in closed form ({_command(run)})"))
    return replace(card, title=_title(run, row.folder), facts=tuple(facts))


def _inherited_card(run: RunFiles, where: Path) -> Card | None:
    """Of an Arch of the front with the weights that its score is of; None where there is no score of it."""
    answers = [each for each in (run.family.answers if run.family else ()) if each.arch_id == where.name]
    known = [(each.accuracy, each.error, each.cost) for each in answers]
    for each in run.search.trials if run.search else ():
        if each.arch_id == where.name and "accuracy" in each.values:
            known.append((each.values["accuracy"], each.values.get("error"), each.costs))
    if not known or run.manifest is None:
        return None
    (accuracy, error, cost), card = known[0], card_of(where)
    n = (run.search and run.search.num_images) or sum(run.manifest.data.counts["holdout"])
    how = "taken from the supernet" if run.scores_are_inherited else "of a brief training"
    facts = (
        *card.facts,
        *_data(run),
        (f"{measure(error)} of these weights", accuracy_text(accuracy, n, "holdout", error)),
        *(("Budget", each.budget) for each in answers),
        ("Cost", _cost(cost)),
        ("How it was made", f"its weights are {how}, and not trained further; {_command(run)}"),
    )
    loaded = (*card.loads, *loads(where))
    return replace(card, title=_title(run, f"front, {where.name}"), facts=facts, loads=loaded)


def _pretrained_card(run: RunFiles, where: Path) -> Card:
    card, made, probed = card_of(where), run.pretrain.made, run.pretrain.probed
    assert made is not None
    facts = [*card.facts, *_data(run), ("Cost", f"{number(made.params)} params")]
    if probed:
        ways = (("nearest neighbours", probed.knn), ("a linear classifier", probed.linear))
        told = (f"{name}: {accuracy_text(found.accuracy, found.n, 'test')}" for name, found in ways)
        facts.append(("What its features are worth", "; ".join(told)))
    facts.append(
        (
            "How it was made",
            f"it learned from {made.images} images without labels (EsViT) for {made.epochs:g} epochs ({_command(run)})",
        )
    )
    return replace(card, title=_title(run, "pretrained"), facts=tuple(facts))


def _title(run: RunFiles, what: str) -> str:
    return f"{run.folder.resolve().name}: {what}"


def _data(run: RunFiles) -> Facts:
    if run.manifest is None:
        return
    data = run.manifest.data
    counts = ", ".join(f"{sum(each)} {split}" for split, each in data.counts.items())
    yield "Data", f"{_dataset(run)}: {counts} images, seen at {data.image_size} pixels"


def _dataset(run: RunFiles) -> str:
    """The name of the images; of a folder its own, as cards are for others to read."""
    text = run.manifest.data.dataset if run.manifest else "images"
    return Path(text).name or text if Path(text).exists() else text


def _measured(run: RunFiles, result: Result) -> Facts:
    """Accuracy, budget, cost and time."""
    if result.test_accuracy is not None:
        told = accuracy_text(result.test_accuracy, result.n_test, "test", result.test_error)
        yield measure(result.test_error), told
        if result.test_mae:
            yield "Mean absolute error", errors_text(result.test_mae)
    elif result.holdout_accuracy is not None:
        held = accuracy_text(result.holdout_accuracy, result.n_holdout, "holdout", result.holdout_error)
        yield measure(result.holdout_error), f"{held}, by which it was chosen or watched; not tested"
    little = cannot_tell(result.n_test or result.n_holdout)
    if little and result.holdout_error is None:
        yield "What that does not say", little
    if result.agreement and result.agreement.top1 is not None:
        agreed = result.agreement
        yield "Same first class as the original", f"{percent(agreed.top1)} of {agreed.n} images"
    cost = Cost(result.macs, result.params, result.memory_bytes)
    if text := run.budget:
        timed = {target: each.median_ms for target, each in run.latencies.get(result.role, {}).items()}
        missed = over_budget(run, result)
        known = limits(text, replace(cost, latency_ms=timed))[1]
        yield (
            "Budget",
            f"{text}: {'; '.join(missed) if missed else known.removeprefix('Budget ').rstrip('.')}",
        )
    yield "Cost", _cost(cost)
    yield from _times(run.latencies.get(result.role, {}))


def _cost(cost: Cost) -> str:
    memory = f"peak activation memory {size(cost.memory_bytes)} of one image in float32"
    return f"{number(cost.params)} params, {number(cost.macs, 'MACs')} of one image, {memory}"


def _times(found: Mapping[str, Latency]) -> Facts:
    for each in found.values():
        yield "Latency", f"{each}, on {each.environment.get('cpu') or 'an unknown machine'}"


def _made(run: RunFiles, result: Result) -> Facts:
    started = {"scratch": "from scratch", "inherited": "from the weights of the supernet"}
    start = started.get(result.start, f"from {result.start}")
    told = (
        f"trained for {result.epochs:g} epochs {start}" if result.train else f"made {start}, without training"
    )
    taught = f", taught by {result.teacher}" if result.teacher else ""
    yield "How it was made", f"{told}{taught}; {_command(run)}"


def _command(run: RunFiles) -> str:
    """What was typed, without where things lie on this machine: cards are for others to read."""
    if run.manifest is None:
        return "vitnas"
    words = [word for word in shlex.split(run.manifest.command) if not word.startswith("folder=")]
    pairs = [word.rpartition("=") for word in words]
    told = [
        f"{name}{equals}{Path(text).name if Path(text).is_absolute() else text}"
        for name, equals, text in pairs
    ]
    return f"`{shlex.join(told)}`"


def _scored(run: RunFiles, result: Result) -> tuple[Scored, ...]:
    several = bool(run.evaluation and not (run.evaluation.classes or run.evaluation.numbers))
    what = (
        "mean_average_precision" if several else "accuracy" if result.holdout_error is None else "r_squared"
    )
    for accuracy, split in ((result.test_accuracy, "test"), (result.holdout_accuracy, "validation")):
        if accuracy is not None:
            return (Scored(dataset=_dataset(run), split=split, accuracy=accuracy, measure=what),)
    return ()


def at_hub(card: str, repo: str) -> str:
    """A card for where it is pushed to."""
    return card.replace(PLACE, f"hf-hub:{repo}")
