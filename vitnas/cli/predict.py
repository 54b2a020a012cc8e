"""`vitnas predict MODEL IMAGES`: which classes a folder's images are of; `vitnas evaluate MODEL data.dataset=IMAGES`:
how often a network is right about them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jsonargparse.typing import PositiveInt
from rich.console import Console

from vitnas.cli.fields import open_run
from vitnas.cli.options import of_data, options, parsed, split
from vitnas.cli.show_tokens import image_files
from vitnas.data import DataConfig, EvalBatches
from vitnas.errors import MissingExtra, UserError, nearest
from vitnas.model.scale import scale_of
from vitnas.predicting import Prediction, Predictor, open_network
from vitnas.predicting.examine import Evaluation, answers, examine
from vitnas.predicting.images import labelled
from vitnas.predicting.networks import form_and_names
from vitnas.reporting.mistakes import by_class, by_number, errors_text, left_out
from vitnas.reporting.tables import interval, percent, share, to_rich
from vitnas.runs import write_atomic
from vitnas.train import ConsoleProgress

USAGE = (
    "`vitnas predict` takes a network and a folder of images, as in `vitnas predict runs/mine images/`; out=FILE.csv, "
    ".json or .parquet, top=5 and batch_size=32 may follow."
)
EVALUATE_USAGE = (
    "`vitnas evaluate` takes a run folder, or a network and data.dataset=IMAGES, as in `vitnas evaluate model.onnx "
    "data.dataset=images`; split=test|holdout|train|all, folder and other fields of data may follow."
)
KINDS = ("csv", "json", "parquet")


@dataclass(frozen=True)
class PredictOptions:
    """A network, images, where to and how many classes of each."""

    model: str
    images: Path
    out: str | None = None
    top: PositiveInt = 5
    batch_size: PositiveInt = 32


@dataclass(frozen=True)
class EvaluateOptions:
    """A network, which of the images, and a folder for what is found."""

    model: str
    split: str | None = None
    folder: Path | None = None


def predict_command(words: list[str], console: Console) -> None:
    """The likeliest classes of every image of a folder, or its numbers."""
    asked = options(PredictOptions, words, USAGE)
    out = _out(asked.out)
    files = image_files(asked.images)
    predictor = Predictor(asked.model, batch_size=asked.batch_size)
    with ConsoleProgress(Console(stderr=True, highlight=False)) as progress:
        found = list(
            predictor.each(
                files, top=asked.top, told=lambda done: progress.update("images", done, len(files))
            )
        )
    bad = [prediction for prediction in found if prediction.error]
    if out is None:
        for prediction in found:
            pairs = zip(prediction.classes, prediction.probabilities, strict=True)
            told = "  ".join(
                (
                    *(f"{name} {share:.1%}" for name, share in pairs),
                    *(f"{name} {value:.5g}" for name, value in prediction.numbers.items()),
                )
            )
            console.print(f"{prediction.name}  {told or prediction.error}", markup=False)
    else:
        write_atomic(out, WRITERS[out.suffix[1:]](found))
        console.print(f"{len(found) - len(bad)} images in {out}", markup=False)
    if bad:
        raise UserError(
            f"{len(bad)} of {len(found)} images cannot be read (such as {bad[0].name}), and have no class. Mend or "
            "remove them."
        )


def _out(text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(f"predictions.{text}") if text in KINDS else Path(text)
    if path.suffix[1:] not in KINDS:
        raise UserError(
            f"out is {text!r}; it must be one of {', '.join(KINDS)}, or a file that ends so.{nearest(text, KINDS)}"
        )
    return path


def _csv(found: Sequence[Prediction]) -> str:
    most = max((len(each.classes) for each in found), default=0)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    pairs = [f"{what}{place}" for place in range(1, most + 1) for what in ("class", "probability")]
    numbers = list(dict.fromkeys(name for each in found for name in each.numbers))
    writer.writerow(["image", *pairs, *numbers, "error"])
    for each in found:
        cells: list[object] = [
            cell for pair in zip(each.classes, each.probabilities, strict=True) for cell in pair
        ]
        told = [each.numbers.get(name, "") for name in numbers]
        writer.writerow([each.name, *(cells or [""] * 2 * most), *told, each.error])
    return stream.getvalue()


def _json(found: Sequence[Prediction]) -> str:
    return json.dumps([asdict(each) for each in found], indent=1) + "\n"


def _parquet(found: Sequence[Prediction]) -> bytes:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra("Parquet files", "data") from error
    columns = {name: [asdict(each)[name] for each in found] for name in Prediction.__dataclass_fields__}
    columns["numbers"] = [
        list(each.numbers.items()) for each in found
    ]  # as a map, which need not have an entry
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


WRITERS: dict[str, Callable[[Sequence[Prediction]], str | bytes]] = {
    "csv": _csv,
    "json": _json,
    "parquet": _parquet,
}


def evaluate_network(words: list[str], console: Console) -> None:
    """Score, classes and confusions of a network on labelled images."""
    own, texts = split(EvaluateOptions, words)
    asked = options(EvaluateOptions, own, EVALUATE_USAGE)
    file = Path(asked.model.removeprefix("local-dir:").partition("@")[0])
    run = _run_of(file)
    config, is_own = _data(texts, open_run(run).data if run else None)
    folder = asked.folder or Path(f"runs/evaluate_{file.stem}")
    network = open_network(asked.model)
    form, names = form_and_names(network)
    classes = int(getattr(network, "num_classes", len(names)))
    if not classes:
        raise UserError(
            "MODEL gives features and no classes; `vitnas probe` says what they are worth. Use that."
        )
    images, told = labelled(
        config,
        form,
        own=names,
        num_classes=classes,
        split=asked.split or ("test" if is_own else None),  # a run's model has seen the rest
        log=(run if run and is_own else folder) / "test_reads.json",
        what=f"evaluation of {asked.model}",
        scale=scale_of(network),
    )
    answered = answers(network, EvalBatches(images, batch_size=256))
    found = replace(examine(answered, images, model=asked.model, dataset=config.dataset), split=told)
    if is_own and asked.split is None:
        console.out(
            f"The images are those of {run}, of which MODEL has not seen the test images: these are taken."
        )
    found.write(folder)
    if found.classes:
        write_atomic(folder / "confusion.csv", _confusion(found))
    tell(found, folder, console)


def _run_of(file: Path) -> Path | None:
    """The run folder that a model is of: itself, or one that it lies in, as RUN/export/ROLE/model.onnx."""
    folders = (file, *file.absolute().parents[:3]) if file.exists() else ()
    return next((folder for folder in folders if (folder / "run.yaml").exists()), None)


def _data(texts: dict[str, str], default: DataConfig | None) -> tuple[DataConfig, bool]:
    """Which images, by `data.` fields, or else those of the run that the network is of; and whether they are those."""
    texts = of_data(texts)
    if "data.dataset" not in texts and default is None:
        raise UserError(EVALUATE_USAGE)
    given: DataConfig = parsed({"data": DataConfig}, [f"{key}={text}" for key, text in texts.items()])["data"]
    changed = {name.partition(".")[2]: getattr(given, name.partition(".")[2]) for name in texts}
    is_own = default is not None and _same(changed.get("dataset", default.dataset), default.dataset)
    return replace(default if default and is_own else DataConfig(), **changed), is_own


def _same(one: str, other: str) -> bool:
    """Whether two dataset strings are of the same images."""
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def _confusion(found: Evaluation) -> str:
    """The whole matrix: a row per class, a column per class that was said."""
    names = [each.name for each in found.classes]
    counts = {(each.true, each.said): each.count for each in found.confusions}
    counts |= {(each.name, each.name): each.right for each in found.classes}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["true \\ said", *names])
    for true in names:
        writer.writerow([true, *(counts.get((true, said), 0) for said in names)])
    return stream.getvalue()


def tell(found: Evaluation, folder: Path, console: Console) -> None:
    """What was found, on a terminal."""
    score = found.score
    several = "mean average precision" if not (found.classes or found.numbers) else "accuracy"
    between = "" if several != "accuracy" else f" (95 % CI {interval(score.accuracy, score.n, score.error)})"
    told = (
        f"{several} {percent(score.accuracy)}" if score.error is None else share(score.accuracy, score.error)
    )
    more_told = (
        f"balanced {percent(score.balanced)}, top-5 {percent(score.top5)}"
        if score.error is None
        else f"mean absolute error {errors_text(found.numbers)}"
    )
    console.print(f"{told}{between} on {score.n} images ({found.split}); {more_told}", markup=False)
    if found.numbers:
        console.print(to_rich(by_number(found), "By number"))
    if found.classes:
        more = left_out(found)
        console.print(
            to_rich(by_class(found), "By class, the worst first" + (f" ({more} more)" if more else ""))
        )
    files = (Evaluation.FILE, *(["confusion.csv"] if found.classes else []))
    console.print("\n".join(f"  {folder / file}" for file in files), markup=False)
