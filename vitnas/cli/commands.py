"""The commands. Each takes the words behind its name and a console."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.markup import escape

from vitnas.budget import Budget, format_quantity
from vitnas.cli.bench import bench_mixers_command, bench_tokens_command
from vitnas.cli.doctor import doctor_command
from vitnas.cli.export import export_one
from vitnas.cli.fields import in_full, make_run, open_run, split_budgets
from vitnas.cli.lookup import count_command, list_command, show_command
from vitnas.cli.options import options, split
from vitnas.cli.predict import EVALUATE_USAGE, evaluate_network, predict_command
from vitnas.cli.probe import probe_command
from vitnas.cli.push import push_command
from vitnas.cli.show_tokens import show_tokens_command
from vitnas.cli.swap import swap_command
from vitnas.cli.tokens import tokens_command
from vitnas.data.plan import plan
from vitnas.errors import MissingExtra, UserError, nearest
from vitnas.grids import size_text
from vitnas.probing import Pretrained, PretrainForecast, Probed
from vitnas.recipes import RECIPES
from vitnas.records import FinalScores, Forecast, Original, Result, Results, SlimResults
from vitnas.reporting import front_table, pretraining, report
from vitnas.reporting.files import read_run
from vitnas.reporting.slimming import comparison, cost_text, forecast, reach
from vitnas.reporting.tables import feasibility, room, share, to_rich
from vitnas.reporting.verdict import missed, sentence, took
from vitnas.searching import Feasibility
from vitnas.searching.storage import open_storage
from vitnas.stages import plan_of
from vitnas.stages.claim import begin, meant, opened
from vitnas.stages.forecast import outlook, to_halve, typed
from vitnas.stages.forecast import table as outlook_table
from vitnas.stages.outlook import Outlook
from vitnas.stages.results import files
from vitnas.stages.run import OPTIONAL, Run, field_groups, field_names
from vitnas.stages.slim.forecast import to_shorten
from vitnas.stopping import current
from vitnas.train import ConsoleProgress, EsViTConfig
from vitnas.train.evaluate import cannot_tell
from vitnas.train.progress import duration

SLIM_USAGE = (
    "`vitnas slim` takes a trained network, data.dataset=PATH and budget=TEXT, as in `vitnas slim NAME "
    "data.dataset=images budget='macs<=50%'`; effort, time, images, axes, folder and other fields may follow."
)
PRETRAIN_USAGE = (
    "`vitnas pretrain` takes a folder of images or a dataset string, as in `vitnas pretrain path/to/images time=2h`; "
    "model, epochs, looks, folder and other fields may follow."
)
Command = Callable[[list[str], Console], None]


@dataclass(frozen=True)
class FolderOptions:
    """A run folder."""

    folder: Path


@dataclass(frozen=True)
class RunOptions:
    """A recipe or a YAML file, where to, and whether only to say what it would take."""

    recipe: str
    folder: Path | None = None
    dry: bool = False


@dataclass(frozen=True)
class SlimOptions:
    """A trained network, and where to."""

    model: str
    folder: Path | None = None
    dry: bool = False


@dataclass(frozen=True)
class PretrainOptions:
    """Images, and where to."""

    images: str
    folder: Path | None = None
    dry: bool = False


@dataclass(frozen=True)
class SpecializeOptions:
    """A run folder, and one budget or a list of them."""

    folder: Path
    budget: str = ""


@dataclass(frozen=True)
class RetrainOptions:
    """A run folder; an Arch of one's own and its name in the run."""

    folder: Path
    arch: str = ""
    role: str | None = None


@dataclass(frozen=True)
class FinetuneOptions:
    """A run folder, the side of the images in pixels, and which model."""

    folder: Path
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    role: str = "chosen"


@contextmanager
def at_work(
    run: Run, folder: Path, console: Console, *, joins: bool = False, keeps: bool = True
) -> Iterator[Any]:
    """The parts of a run for a command, which tells on the console how it goes.

    Args:
        joins: as in `opened`.
        keeps: whether the folder stays.
    """
    if stopper := current():
        stopper.keeps = keeps
    with ConsoleProgress(console) as progress, opened(run, folder, progress, joins=joins) as context:
        yield context


def run_command(words: list[str], console: Console) -> None:
    """All stages of a recipe into one run folder."""
    own, texts = split(RunOptions, words)
    for number, word in enumerate(own):
        if Path(word).is_dir() and (number or word not in RECIPES):
            is_run = (Path(word) / "run.yaml").exists()
            write = f"run {word}/run.yaml folder={word}" if is_run else f"run images dataset={word}"
            raise UserError(
                f"{word!r} is a folder and stands where no folder does; a recipe comes first. Write `vitnas {write}`."
            )
    asked = options(
        RunOptions,
        own,
        "`vitnas run` takes one recipe or YAML file, then field=value. `vitnas list` names the recipes.",
    )
    folder = asked.folder or Path("runs") / (
        asked.recipe if asked.recipe in RECIPES else Path(asked.recipe).stem
    )
    given = {name.rpartition(".")[2] for name in texts}
    then = {name: text for name, text in meant(folder).items() if name.rpartition(".")[2] not in given}
    whole_run(make_run(asked.recipe, {**then, **texts}), folder, console, dry=asked.dry)


def slim_command(words: list[str], console: Console) -> None:
    """A trained network made smaller, to a budget: all stages of the recipe `slim`."""
    own, texts = split(SlimOptions, words)
    asked = options(SlimOptions, own, SLIM_USAGE)
    short = {"multiple": "space.multiple"}
    run = make_run("slim", {**_in_full("slim", texts, short), "pretrained": asked.model})
    whole_run(
        run,
        asked.folder or Path("runs") / f"slim_{Path(asked.model.partition('@')[0]).name}",
        console,
        dry=asked.dry,
    )


def pretrain_command(words: list[str], console: Console) -> None:
    """A network that learns from images without labels: all stages of the recipe `pretrain`."""
    own, texts = split(PretrainOptions, words)
    asked = options(PretrainOptions, own, PRETRAIN_USAGE)
    short = {"lr": "supernet.lr", "batch_size": "data.batch_size"}
    short |= {item.name: f"pretrain.esvit.{item.name}" for item in fields(EsViTConfig)}
    given = _in_full("pretrain", texts, short)
    run = make_run("pretrain", {**given, "data.dataset": asked.images})
    whole_run(
        run, asked.folder or Path("runs") / f"pretrain_{Path(asked.images).name}", console, dry=asked.dry
    )


def _in_full(recipe: str, texts: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Fields by their whole names; those of the recipe's own part of a Run need not say which.

    Args:
        more: other names that are short, and what for.
    """
    short = {**{item.name: f"{recipe}.{item.name}" for item in fields(OPTIONAL[recipe])}, **more}
    return in_full(texts, field_names(), recipe, short)


def whole_run(run: Run, folder: Path, console: Console, *, dry: bool = False) -> None:
    """Do what `run` says, and tell how it ended; `dry` tells what it would take, and leaves nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"folder is {str(folder)!r}, and {there} is a file. Give another folder=PATH.")
    if dry:
        with tempfile.TemporaryDirectory(prefix="vitnas-dry-") as where:
            with at_work(run, Path(where) / folder.name, console, keeps=False) as context:
                tell_ahead(context, folder, console, whole=True)
        return
    with at_work(run, folder, console) as context:
        tell_ahead(context, folder, console)
        for stage in plan_of(run).stages.values():
            stage(context)
        if context.engine.is_main:
            finale(folder, console)


def tell_ahead(context: Any, folder: Path, console: Console, *, whole: bool = False) -> None:
    """Check a run and claim its folder; tell what it will do, and what that takes, of a short one only if `whole`."""
    table = begin(context)
    if whole and not (context.run.slim or context.run.pretrain or Outlook.exists(context.folder)):
        outlook(context, table)
    run = context.run
    if not context.engine.is_main:
        return
    console.print(f"[bold]{run.recipe}[/bold] into {escape(str(folder))}")
    for line in plan(context.images.data):
        console.out(f"  {line}")
    if run.pretrain:
        tell_pretrain(table, console)
    elif run.slim:
        tell_slim(context.folder, table, console)
    else:
        folds, data = run.search.folds, context.images.data
        if data.train.scale is None and (little := cannot_tell(folds * len(data.holdout))):
            parts = f"{folds} parts of train in turn; " if folds > 1 else ""
            console.out(f"  holdout  {parts}{little}")
        console.print(to_rich(feasibility(table), "Feasibility"))
        if Outlook.exists(context.folder):
            found = Outlook.read(context.folder)
            console.print(to_rich(outlook_table(run, found), "What it takes"))
            console.out(f"  {to_halve(run, found)}")


def tell_slim(folder: Path, table: Feasibility, console: Console) -> None:
    """What is slimmed, how far it may go, and how long that takes."""
    first = Original.read(folder)
    for line in (f"{first.name}: {cost_text(first.cost)}", *reach(table), *first.notes):
        console.out(f"  {line}")
    found = Forecast.read(folder)
    console.print(to_rich(forecast(found, short=True), "What each effort takes here"))
    parts = ", ".join(f"{name} {duration(part)}" for name, part in found.taken.parts.items() if part >= 1)
    console.out(f"  {found.effort}: {parts}; activations are taken from {found.images} images")
    console.out(f"  {room(found.disk_bytes, found.memory_bytes)}; {to_shorten(found)}")


def tell_pretrain(found: PretrainForecast, console: Console) -> None:
    """What is done, and how long that takes."""
    for note in found.notes:
        console.out(f"  {note}")
    console.print(to_rich(pretraining.forecast(found)))
    epochs = f"epochs={found.epochs / 2:.3g}, or " if found.asked else ""
    console.out(f"  half as long: {epochs}time={typed(found.seconds / 2)}")


def stage_command(name: str) -> Command:
    """A command that does one stage of a run folder."""

    def command(words: list[str], console: Console) -> None:
        folder = one_folder(words, name)
        run = open_run(folder)
        stages = plan_of(run).stages
        if name not in stages:
            raise UserError(
                f"{folder} is a run of {run.recipe}, which has no stage {name!r}; it has {', '.join(stages)}. Use one "
                "of those."
            )
        with at_work(run, folder, console, joins=name == "search") as context:
            stages[name](context)
            if context.engine.is_main:
                if name == "evaluate":
                    finale(folder, console)
                console.out(f"{name}: done ({folder})")

    return command


def bench_command(words: list[str], console: Console) -> None:
    """Latency of a run folder's models, or `mixers`: what each token mixer costs on this device."""
    if words[:1] == ["mixers"]:
        bench_mixers_command(words[1:], console)
    elif words[:1] == ["tokens"]:
        bench_tokens_command(words[1:], console)
    elif len(words) == 1 and not Path(words[0]).exists():
        raise UserError(
            f"`vitnas bench` takes a run folder, mixers or tokens, and {words[0]!r} is none. Correct it."
            f"{nearest(words[0], ('mixers', 'tokens'))}"
        )
    else:
        stage_command("bench")(words, console)


def evaluate_command(words: list[str], console: Console) -> None:
    """The final table of a run folder, or any network on labelled images."""
    if len(words) == 1 and not words[0].endswith(".onnx") and (Path(words[0]) / "run.yaml").exists():
        stage_command("evaluate")(words, console)
    elif len(words) == 1 and "@" not in words[0]:
        one_folder(words, "evaluate")
        raise UserError(EVALUATE_USAGE)
    else:
        evaluate_network(words, console)


def export_command(words: list[str], console: Console) -> None:
    """The files of a run's chosen model, or of any one model."""
    if len(words) == 1 and (Path(words[0]) / "run.yaml").exists():
        stage_command("export")(words, console)
    else:
        export_one(words, console)


def specialize_command(words: list[str], console: Console) -> None:
    """The best Arch for other budgets: from the learned sampler, or else from the finished search."""
    usage = (
        "`vitnas specialize` takes a run folder and budget=TEXT, for example budget='macs<=1M', or a list of them, "
        "budget='[macs<=1M, macs<=2M]'."
    )
    asked = options(SpecializeOptions, words, usage)
    if not asked.budget:
        raise UserError(usage)
    folder, texts, run = asked.folder, split_budgets(asked.budget), open_run(asked.folder)
    with at_work(run, folder, console) as context:
        budgets = [context.resolved(Budget.parse(text)) for text in texts]
        table, lines = plan_of(run).specialize(context, budgets)
    console.print(to_rich(table))
    for line in lines:
        console.out(line)


def retrain_command(words: list[str], console: Console) -> None:
    """The chosen Arch and its baselines, or any Arch that is asked for."""
    from vitnas.stages.retrain import retrain

    usage = (
        "`vitnas retrain` takes a run folder, and arch=WHAT role=NAME for an Arch of your own, for example "
        "arch=vitas_a, arch=other/chosen.json or arch='vitas:1 2 4 3 ...'; training is the run's retrain.train, "
        "but of a slimming, whose own is for recovery, 30 epochs at lr 1e-3."
    )
    asked = options(RetrainOptions, words, usage)
    folder = asked.folder
    if not asked.arch:
        if asked.role is not None:
            raise UserError(usage)
        stage_command("retrain")(words, console)
        return
    with at_work(open_run(folder), folder, console) as context:
        where = retrain(context.models, asked.arch, asked.role, context.run.anew)
        if context.engine.is_main:
            result = Result.read(where)
            told = share(result.holdout_accuracy, result.holdout_error)
            score = f"{told} of {result.n_holdout} held-out images"
            console.out(f"{where.name}: {score}, {format_quantity(result.macs, 'macs')} MACs\n  {where}")
            if FinalScores.exists(folder) and where.name not in FinalScores.read(folder).scores:
                console.out("  not in the final table, for which the test split was read once before")


def finetune_command(words: list[str], console: Console) -> None:
    """A trained model at another resolution."""
    from vitnas.stages.finetune import finetune

    usage = (
        "`vitnas finetune` takes a run folder and image_size=PIXELS, for example image_size=280 or [224,320] (height, "
        "width); then fields of its training, for example epochs=30 lr=1e-5."
    )
    own, texts = split(FinetuneOptions, words)
    asked = options(FinetuneOptions, own, usage)
    folder, role, size = asked.folder, asked.role, asked.image_size
    if size is None:
        raise UserError(usage)
    run = open_run(folder, {f"retrain.train.{name}": text for name, text in texts.items()})
    with at_work(run, folder, console) as context:
        where = finetune(context.models, role, size, context.run.retrain.train)
        if context.engine.is_main:
            result = Result.read(where)
            scores = (result.holdout_accuracy_before, result.holdout_accuracy)
            before, after = (share(score, result.holdout_error) for score in scores)
            console.out(
                f"{role} at {size_text(size)} pixels: {before} before and {after} after {result.epochs:g} epochs, on "
                f"{result.n_holdout} held-out images\n  {where}"
            )


def report_command(words: list[str], console: Console) -> None:
    """report.html of a run folder."""
    console.out(str(report(one_folder(words, "report"))))


def dashboard_command(words: list[str], console: Console) -> None:
    """optuna-dashboard on the run's Study."""
    folder = one_folder(words, "dashboard")
    run = open_run(folder)
    try:
        from optuna_dashboard import run_server
    except ImportError as error:
        raise MissingExtra("the dashboard", "dashboard") from error
    if run.search.storage is None and not (folder / "study.db").exists():
        raise UserError(
            f"{folder} has no study.db yet; the search writes it. Run `vitnas search {folder}` first."
        )
    console.out("http://localhost:8080 (stop with Ctrl-C)")
    run_server(open_storage(run.search.storage or folder / "study.db"), host="localhost", port=8080)


def field_text() -> str:
    """Every group of fields of a run, with their types and meaning, as rich's markup.

    What `vitnas run --help` shows is a copy of it (fields.txt), since making it imports torch; a test holds them equal.
    """
    lines: list[str] = []
    for prefix, word, kind in field_groups():
        title = f"{prefix}kind={word}" if word else prefix.rstrip(".") or "run"
        doc = " ".join((kind.__doc__ or "").partition("Raises:")[0].split())
        hints = get_type_hints(kind)
        lines.append(f"\n[bold]{title}[/bold]: {escape(doc)}")
        for field in fields(kind):
            if not is_dataclass(hints[field.name]):
                default = "" if field.default is MISSING else f" = {field.default!r}"
                lines.append(escape(f"  {prefix}{field.name}: {field.type}{default}"))
    return "\n".join(lines) + "\n"


def one_folder(words: list[str], command: str) -> Path:
    """The run folder among `words`."""
    usage = f"`vitnas {command}` takes one run folder and nothing else; fields are fixed by its run.yaml."
    return options(FolderOptions, words, usage).folder


def finale(folder: Path, console: Console) -> None:
    """The table a person wants, and where the files are."""
    if Pretrained.exists(folder):
        made = Pretrained.read(folder)
        probed = Probed.read(folder) if Probed.exists(folder) else None
        console.print(to_rich(pretraining.outcome(made, probed), pretraining.described(made)))
        found: Mapping[str, str] = files(folder)
    elif SlimResults.exists(folder):
        slim = SlimResults.read(folder)
        console.print(to_rich(comparison(slim), f"On {slim.rows[0].agreement.n} test images"))
        found = slim.files
    else:
        results = Results.read(folder)
        console.print(front_table(results))
        worth = sentence(results), took({row.role: row for row in results.rows}), missed(read_run(folder))
        for line in filter(None, worth):
            console.print(line, highlight=False)
        found = results.files
    for name, path in found.items():
        console.out(f"  {name:<13} {folder / path}")


COMMANDS: dict[str, Command] = {
    "run": run_command,
    "slim": slim_command,
    "pretrain": pretrain_command,
    "train": stage_command("train"),
    "search": stage_command("search"),
    "finals": stage_command("finals"),
    "specialize": specialize_command,
    "retrain": retrain_command,
    "finetune": finetune_command,
    "export": export_command,
    "bench": bench_command,
    "evaluate": evaluate_command,
    "predict": predict_command,
    "push": push_command,
    "report": report_command,
    "dashboard": dashboard_command,
    "swap": swap_command,
    "tokens": tokens_command,
    "probe": probe_command,
    "list": list_command,
    "show": show_command,
    "count": count_command,
    "show-tokens": show_tokens_command,
    "doctor": doctor_command,
}
