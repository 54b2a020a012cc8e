"""Numbers as people read them, each with its unit and n: the rows of all tables of a run.

A number that is not in the run folder is shown as "not measured"; nothing is ever filled in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import rich.box
import rich.table
from rich.markup import escape

from vitnas.budget import Budget, Cost, format_quantity
from vitnas.measure.latency import Latency
from vitnas.records import ExportedFile, ExportRecord, Finals, LatencyRecord, Result, Results, Spent
from vitnas.reporting.files import RunFiles, role_name
from vitnas.runs import to_json
from vitnas.searching import Feasibility, SearchRecord
from vitnas.train.evaluate import interval_of

MISSING = "not measured"
NAME = 24  # letters of a first column that is kept in one line
MAX_LISTED = 20  # longer lists of the manifest are cut there, and say so
UNEQUAL = 0.01  # by which balanced accuracy is another, so that it is shown
WAYS = {2: "two", 3: "three", 4: "four", 5: "five"}


@dataclass(frozen=True)
class Table:
    """Text cells under headers. `numeric` columns are right-aligned; `strong` is the row to stress, or -1."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[int, ...] = ()
    strong: int = -1


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Format with k, M, G, T and `digits` significant digits: 1280000000 with unit "MACs" is "1.28 GMACs"."""
    if value is None:
        return MISSING
    scaled, prefix = float(value), ""
    for larger in ("k", "M", "G", "T"):
        if abs(scaled) < 999.5:
            break
        scaled, prefix = scaled / 1000, larger
    whole = not prefix and float(value).is_integer()
    text = f"{scaled:.0f}" if whole else significant(scaled, digits)
    return f"{text} {prefix}{unit}".rstrip() if unit else f"{text}{prefix}"


def significant(value: float, digits: int = 3) -> str:
    """With so many digits, none of them an exponent."""
    if value == 0:
        return "0"
    # Rounded first, as 0.9996 has one digit less behind the point once it is 1.00.
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}"


def size(value: float | None) -> str:
    """Format bytes with decimal prefixes: "23.5 MB"."""
    return number(value, "B")


def room(disk_bytes: int, memory_bytes: int) -> str:
    """What a run takes beside time."""
    return f"disk {size(disk_bytes)}, memory {size(memory_bytes)} or more"


def percent(value: float | None, digits: int = 1) -> str:
    """Format a fraction as a percentage."""
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def share(accuracy: float | None, error: float | None = None) -> str:
    """An accuracy as a percentage; R^2 (which has an error) says what it is: "R² 0.934"."""
    return percent(accuracy) if accuracy is None or error is None else f"R² {accuracy:.3f}"


def interval(accuracy: float | None, n: int | None, error: float | None = None) -> str:
    """Return "95.7-99.0 %", the 95 % interval of an accuracy on `n` images, or that there is none; of R^2, which has
    an error, "0.92 to 0.95"."""
    if accuracy is None or n is None:
        return MISSING
    low, high = interval_of(accuracy, n, error)
    return f"{100 * low:.1f}–{100 * high:.1f} %" if error is None else f"{low:.3f} to {high:.3f}"


def accuracy_text(accuracy: float, n: int | None, split: str, error: float | None = None) -> str:
    """Return "97.8 % on 360 test images (95 % CI 95.7-99.0 %)"."""
    return f"{share(accuracy, error)} on {n} {split} images (95 % CI {interval(accuracy, n, error)})"


def measure(error: float | None) -> str:
    """What is called accuracy in files."""
    return "Accuracy" if error is None else "R²"


def _range(latency: Latency) -> str:
    return f"p5 {significant(latency.p05_ms)}, p95 {significant(latency.p95_ms)}"


def over_budget(run: RunFiles, result: Result) -> list[str]:
    """Why a model misses the run's budget, as far as its costs are known."""
    timed = {target: each.median_ms for target, each in run.latencies.get(result.role, {}).items()}
    cost = Cost(result.macs, result.params, result.memory_bytes, timed)
    return misses(run.budget, cost) if run.budget else []


def misses(text: str, cost: Cost) -> list[str]:
    """Why something is outside a budget, as far as its costs are known."""
    return [
        reason
        for limit in Budget.parse(text).limits
        if not limit.is_share and (limit.quantity != "latency" or limit.target in cost.latency_ms)
        for reason in limit.misses(cost.value(limit.quantity, limit.target))
    ]


def comparison(run: RunFiles) -> Table:
    """Chosen Arch against the hand-scaled ViT, random search and whatever else was trained; latency is the median."""
    rows, timed = [], run.latencies
    targets = list(dict.fromkeys(target for found in timed.values() for target in found))
    balanced = _shows_balanced(run.models.values())
    error = next((each.test_error for each in run.models.values() if each.test_error is not None), None)
    for role, result in run.models.items():
        accuracy, between, *cost = _result_cells(result)
        beside = [percent(result.test_balanced)] * balanced + [errors_text(result.test_mae)] * (
            error is not None
        )
        cells = (accuracy, *beside, between, str(result.n_test or MISSING), *cost, size(result.memory_bytes))
        medians = _medians(timed.get(role, {}), targets)
        name = role_name(role) + (" (over the budget)" if over_budget(run, result) else "")
        rows.append((name, *cells, *medians, *spent_cells(result.spent), result.arch_id))
    strong = list(run.models).index("chosen") if "chosen" in run.models else -1
    first = "Test accuracy" if error is None else "Test R²"
    measures = (first, *["Balanced"] * balanced, *["Mean error"] * (error is not None))
    costs = (*measures, "95 % CI", "n", "Params", "MACs", "Peak memory")
    took = ("Images learned from", "Images looked at", "Took")
    headers = ("Model", *costs, *(f"ms, {target}" for target in targets), *took, "Arch")
    return Table(headers, tuple(rows), numeric=tuple(range(1, len(headers) - 1)), strong=strong)


def taught(run: RunFiles) -> tuple[str, ...]:
    """One sentence for each other way in which the chosen Arch was taught: what the teacher brings, what it takes."""
    chosen, found = run.models.get("chosen"), []
    for role in ("without_teacher", "soft_labels"):
        rival = run.models.get(role)
        if chosen is None or rival is None:
            continue
        error = chosen.holdout_error
        pairs = [(each.test_accuracy, each.n_test, "test") for each in (chosen, rival)]
        if any(accuracy is None for accuracy, *_ in pairs):
            pairs = [(each.holdout_accuracy, each.n_holdout, "holdout") for each in (chosen, rival)]
        (mine, n, split), (other, *_) = pairs
        if mine is None or other is None:
            continue
        start = "" if chosen.start == "scratch" else " Both began with the taught supernet's weights."
        found.append(
            f"Taught by {chosen.teacher} ({', '.join(chosen.teacher_losses)}): {share(mine, error)} on {n} {split} "
            f"images; the {role_name(role)}, of equal cost and trained for as many epochs: {share(other, error)}, "
            f"{points(mine - other, error)} (training took {number(chosen.seconds, 's')} and "
            f"{number(rival.seconds, 's')}, one run each).{start}"
        )
    return tuple(found)


def finals(found: Finals) -> Table:
    """Archs that were trained briefly, the best first: what each costs, what the search gave it where it scored with
    inherited weights, how it did behind each rung."""
    epochs = [rung.epochs for rung in max((each.rungs for each in found.finalists), key=len)]
    targets = list(dict.fromkeys(target for each in found.finalists for target in each.cost.latency_ms))
    scored = any(each.score is not None for each in found.finalists)
    rows = []
    for each in found.finalists:
        told = [share(rung.accuracy, rung.error) for rung in each.rungs] + [""] * (
            len(epochs) - len(each.rungs)
        )
        last = each.rungs[-1] if each.rungs else None
        times = [each.cost.latency_ms.get(target) for target in targets]
        rows.append(
            (
                each.arch_id,
                number(each.cost.macs),
                *(MISSING if ms is None else significant(ms) for ms in times),
                *["" if each.score is None else share(each.score, last.error if last else None)] * scored,
                *told,
                interval(last.accuracy, last.n, last.error) if last else MISSING,
            )
        )
    headers = (
        "Arch",
        "MACs",
        *(f"ms, {target}" for target in targets),
        *[f"Inherited {measure(found.finalists[0].rungs[0].error).replace('A', 'a')}"] * scored,
        *(f"{each:.3g} epochs" for each in epochs),
        "95 % CI of the last",
    )
    return Table(headers, tuple(rows), numeric=tuple(range(1, len(headers))), strong=0)


def _shows_balanced(results: Iterable[Result]) -> bool:
    """Whether accuracy per class is another number than accuracy: where classes are unequal."""
    return any(
        abs(result.test_balanced - result.test_accuracy) > UNEQUAL
        for result in results
        if result.test_balanced is not None and result.test_accuracy is not None
    )


def points(difference: float, error: float | None = None) -> str:
    """A difference of accuracies in points; of R^2 as it is."""
    return f"{100 * difference:+.1f} points" if error is None else f"{difference:+.3f}"


def errors_text(errors: Sequence[float]) -> str:
    """Mean absolute errors, in the numbers' own units."""
    return ", ".join(f"{each:.4g}" for each in errors) or MISSING


def _result_cells(result: Result) -> tuple[str, ...]:
    return (
        share(result.test_accuracy, result.test_error).removeprefix("R² "),  # as the header says
        interval(result.test_accuracy, result.n_test, result.test_error),
        number(result.params),
        number(result.macs),
    )


def spent_cells(spent: Spent | None) -> tuple[str, str, str]:
    """Images learned from and looked at, each as often as it was, and seconds."""
    if spent is None:
        return (MISSING, MISSING, MISSING)
    return number(spent.learned), number(spent.looked), number(spent.seconds, "s")


def _medians(timed: Mapping[str, Latency], targets: Sequence[str]) -> list[str]:
    return [significant(timed[target].median_ms) if target in timed else MISSING for target in targets]


def front_table(results: Results) -> rich.table.Table:
    """Make the table that ends a run: one row per Model, accuracy on the test split.

    Latency is the median; its spread, device and the rest are in the report.
    """
    targets = list(dict.fromkeys(target for row in results.rows for target in row.latency_ms))
    (n,) = {row.n_test for row in results.rows}  # one reading serves all
    ways = len(results.rows) if all(row.asked is None for row in results.rows) else 1
    error = results.rows[0].test_error
    title = f"Same budget, {WAYS[ways]} ways to spend it; accuracy" if ways > 1 else "Accuracy"
    title = title if error is None else title.replace("accuracy", "R²").replace("Accuracy", "R²")
    table = rich.table.Table(
        title=f"{title} on {n} test images",  # in the title, so that the table fits 80 columns
        title_justify="left",
        box=rich.box.SIMPLE,
        padding=(0, 0, 0, 1),
    )
    balanced = _shows_balanced(results.rows)
    extra = ["Balanced"] * balanced
    headers = ("Model", measure(error), *extra, "95 % CI", "Params", "MACs")
    for header in (*headers, *("ms\n" + target.replace(",", "\n") for target in targets)):
        side: Literal["left", "right"] = "left" if header == "Model" else "right"
        table.add_column(escape(header), justify=side, no_wrap=True, vertical="bottom")
    for row in results.rows:
        name = role_name(row.role) + (", from the supernet" if row.start == "inherited" else "")
        accuracy, *others = _result_cells(row)
        beside = [percent(row.test_balanced)] * balanced
        cells = (name, accuracy, *beside, *others, *_medians(row.latency_ms, targets))
        table.add_row(*map(escape, cells), style="bold" if row.role == "chosen" else None)
    return table


def rejections(search: SearchRecord) -> Table:
    """Why Archs were rejected, most frequent reason first."""
    rows = sorted(search.rejections.items(), key=lambda row: (-row[1], row[0]))
    return Table(("Reason", "Archs rejected"), tuple((why, str(count)) for why, count in rows), numeric=(1,))


def feasibility(found: Feasibility) -> Table:
    """What the Space can reach, and how much of it the budget leaves."""
    cells = []
    for row in found.rows[:1] if len(found.rows) == 2 else found.rows:  # the last row is all limits together
        quantity = row.quantity.partition(" ")[0]
        ends = [
            "" if end is None else format_quantity(end, quantity) for end in (row.space_min, row.space_max)
        ]
        share = f"{percent(row.share_feasible)} of {row.n:,}" if row.n else MISSING
        cells.append((row.requested or "no limit", *ends, share, row.note))
    headers = ("Budget", "Smallest in the Space", "Largest", "Random Archs that meet it", "Note")
    return Table(headers, tuple(cells), numeric=(1, 2, 3))


def to_rich(table: Table, title: str = "") -> rich.table.Table:
    """The same for a terminal; columns in which nothing stands are left out."""
    shown = [i for i in range(len(table.headers)) if any(row[i] for row in table.rows)]
    drawn = rich.table.Table(title=title or None, title_justify="left", box=rich.box.SIMPLE)
    rows = [[_broken(cell) for cell in row] for row in table.rows]
    for i in shown:
        side: Literal["left", "right"] = "right" if i in table.numeric else "left"
        longest = max((len(line) for row in rows for line in row[i].splitlines()), default=0)
        drawn.add_column(table.headers[i], justify=side, no_wrap=i == 0 and longest <= NAME, overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(row[i]) for i in shown))
    return drawn


def _broken(text: str) -> str:
    """A budget with a limit on latency, a line for each limit and each target: else it breaks within a word."""
    if not re.search(r"\d[a-z]+@", text):
        return text
    return text.replace(" and ", "\nand ").replace("@", "\n@")


def keyed(record: Any) -> Table:
    """Two columns, key and value, of a file; nested records become dotted keys, long lists are cut."""
    return Table(("Key", "Value"), tuple(_flat(to_json(record))))


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            shown = ", ".join(map(str, value[:MAX_LISTED]))
            rows.append(
                (f"{prefix}{key}", f"{shown}, … {len(value)} in all" if len(value) > MAX_LISTED else shown)
            )
        else:
            rows.append((f"{prefix}{key}", "none" if value is None else str(value)))
    return rows


def latency(record: LatencyRecord) -> Table:
    """Every latency with what it depends on."""
    rows = []
    for row in record.rows:
        each = row.latency
        cells = (each.runtime, each.device, each.batch, each.threads, each.dtype, each.warmup, each.runs)
        rows.append(
            (
                role_name(row.role),
                *map(str, cells),
                f"{significant(each.median_ms)} ms",
                _range(each),
                significant(each.ratio_to_reference),
                "yes" if each.trusted else f"no: IQR {100 * each.relative_iqr:.0f} % of median",
            )
        )
    headers = (
        "Model", "Runtime", "Device", "Batch", "Threads", "Dtype", "Warm-up", "Runs", "Median", "Spread",
        "Ratio to reference", "Trusted",
    )  # fmt: skip
    return Table(headers, tuple(rows), numeric=tuple(range(3, len(headers) - 1)))


def _ms(file: ExportedFile) -> str:
    told = " and ".join(f"{value:.3g} ms in {name}" for name, value in file.ms.items())
    on = "one thread" if file.threads == 1 else f"{file.threads} threads"
    return f"One image of its own size on {on}: {told}." if told else ""


def export(record: ExportRecord) -> Table:
    """How each exported file compares with the Model it came from."""
    rows = []
    verified = [file for name, file in record.files.items() if name != "timm"]
    has_numbers = bool(verified) and all(file.top1_agreement is None for file in verified)
    for name, file in record.files.items():
        rows.append(
            (
                name,
                file.path,
                "0, bit for bit" if file.max_abs_diff == 0 else f"{file.max_abs_diff:.1e}",
                "" if has_numbers else percent(file.top1_agreement),
                str(file.n_images),
                number(file.params),
                number(file.exported_params),
                str(file.opset or ""),
                " ".join(
                    (*file.problems, f"Beside float32: {file.beside}." if file.beside else "", _ms(file))
                ).strip(),
            )
        )
    for name, reason in record.refused.items():
        rows.append((name, "not written", "", "", "", "", "", "", f"{reason}."))
    headers = (
        "Format", "File", "Largest difference of logits", "Same top-1", "n images", "Params of Model", "of file",
        "Opset", "To know",
    )  # fmt: skip
    return Table(headers, tuple(rows), numeric=(2, 3, 4, 5, 6, 7))
