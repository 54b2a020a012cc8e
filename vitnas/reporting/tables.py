"""Numbers as people read them, each with its unit and n: the rows of all tables of a run.

A number that is not in the run folder is shown as "not measured"; nothing is ever filled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import rich.box
import rich.table
from rich.markup import escape

from vitnas.reporting.files import ROLES, Record, RunFiles

MISSING = "not measured"
MAX_LISTED = 20  # longer lists of the manifest are cut there, and say so


@dataclass(frozen=True)
class Table:
    """Text cells under headers. `numeric` columns are right-aligned; `strong` is the row to stress, or -1."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[int, ...] = ()
    strong: int = -1


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of the share `correct / n`, as fractions.

    Raises:
        ValueError: `n` is below 1, or `correct` is not in 0..n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(
            f"correct is {correct} of n = {n}; an interval needs 0 <= correct <= n and n >= 1. Count again."
        )
    share, z2 = correct / n, z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def is_number(value: Any) -> bool:
    """Say whether `value` is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, unit: str = "", digits: int = 3) -> str:
    """Format with k, M, G, T and `digits` significant digits: 1280000000 with unit "MACs" is "1.28 GMACs"."""
    if not is_number(value):
        return MISSING
    scaled, prefix = float(value), ""
    for larger in ("k", "M", "G", "T"):
        if abs(scaled) < 999.5:
            break
        scaled, prefix = scaled / 1000, larger
    whole = not prefix and float(value).is_integer()
    text = f"{scaled:.0f}" if whole else _significant(scaled, digits)
    return f"{text} {prefix}{unit}".rstrip() if unit else f"{text}{prefix}"


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    rounded = float(
        f"{value:.{digits - 1}e}"
    )  # first, as 0.9996 has one digit less behind the point once it is 1.00
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}"


def size(value: Any) -> str:
    """Format bytes with decimal prefixes: "23.5 MB"."""
    return number(value, "B")


def percent(value: Any, digits: int = 1) -> str:
    """Format a fraction as a percentage. A number outside 0..1 is shown as it is, marked as no fraction."""
    if not is_number(value):
        return MISSING
    return f"{100 * value:.{digits}f} %" if 0 <= value <= 1 else f"{value} (not a fraction)"


def interval(accuracy: Any, n: Any) -> str:
    """Return "95.7-99.0 %", the 95 % Wilson interval of an accuracy on `n` images, or "" without one."""
    if not (is_number(accuracy) and is_number(n) and 0 <= accuracy <= 1 and n >= 1):
        return ""
    low, high = wilson(round(accuracy * n), int(n))
    return f"{100 * low:.1f}–{100 * high:.1f} %"


def accuracy_text(accuracy: Any, n: Any, split: str) -> str:
    """Return "97.8 % on 360 test images (95 % CI 95.7-99.0 %)"."""
    if not is_number(accuracy):
        return MISSING
    if not is_number(n):
        return f"{percent(accuracy)} on {split} images (n not recorded)"
    between = interval(accuracy, n)
    return f"{percent(accuracy)} on {int(n)} {split} images" + (f" (95 % CI {between})" if between else "")


def latency_text(value: Any) -> str:
    """Return "1.20 ms (p10 1.10, p90 1.40)" for a latency record or a bare median in ms.

    Several records by name ("onnxruntime", "torch") become one line, separated by semicolons.
    """
    if is_number(value):
        return f"{_significant(float(value), 3)} ms (spread {MISSING})"
    if not isinstance(value, Mapping):
        return MISSING
    median = value.get("median_ms", value.get("median"))
    if is_number(median):
        return f"{_significant(float(median), 3)} ms{_spread(value)}"
    named = [f"{name}: {latency_text(part)}" for name, part in value.items() if latency_text(part) != MISSING]
    return "; ".join(named) or MISSING


def _spread(record: Record) -> str:
    """Return " (p5 7.1, p95 7.8)" from the widest pair of percentiles there is."""
    for low, high in (("p05", "p95"), ("p10", "p90"), ("p25", "p75")):
        ends = [record.get(f"{name}_ms", record.get(name)) for name in (low, high)]
        if all(is_number(end) for end in ends):
            first, last = (_significant(float(end or 0), 3) for end in ends)
            return f" (p{int(low[1:])} {first}, {high} {last})"
    return f" (spread {MISSING})"


def role_name(role: str) -> str:
    """Return the words for a role of the models folder; an unknown role is its own name."""
    return ROLES.get(role, role)


def result_rows(run: RunFiles) -> list[dict[str, Any]]:
    """Return one record per compared Model: the final table's rows, completed from each model's own result.

    Keys used: name, arch_id, params, macs, memory_bytes, test_accuracy, n_test, latency_ms, holdout_accuracy.
    """
    rows: list[dict[str, Any]] = []
    taken: set[str] = set()
    for row in run.results.get("rows", []):
        role = str(row.get("role", row.get("name", "")))
        role = next((key for key, words in ROLES.items() if role in (key, words)), role)
        taken.add(role)
        known = {key: value for key, value in row.items() if value is not None}
        rows.append({**run.models.get(role, {}), **known, "role": role, "name": role_name(role)})
    for role, result in run.models.items():
        if role not in taken:
            rows.append({**result, "role": role, "name": role_name(role)})
    return rows


def comparison(run: RunFiles) -> Table:
    """Chosen Arch against the hand-scaled ViT and random search."""
    rows = []
    records = result_rows(run)
    for row in records:
        rows.append((str(row["name"]), *_result_cells(row), str(row.get("arch_id", ""))))
    strong = next((i for i, row in enumerate(records) if row["role"] == "chosen"), -1)
    headers = (
        "Model",
        "Test accuracy",
        "95 % CI",
        "n",
        "Params",
        "MACs",
        "Peak memory",
        "Latency, median",
        "Arch",
    )
    return Table(headers, tuple(rows), numeric=(1, 2, 3, 4, 5, 6, 7), strong=strong)


def _result_cells(row: Record) -> tuple[str, ...]:
    accuracy, n = row.get("test_accuracy"), row.get("n_test")
    return (
        percent(accuracy),
        interval(accuracy, n) or MISSING,
        str(n) if is_number(n) else MISSING,
        number(row.get("params")),
        number(row.get("macs")),
        size(row.get("memory_bytes", row.get("memory"))),
        latency_text(row.get("latency_ms")),
    )


def front_table(results: Mapping[str, Any]) -> rich.table.Table:
    """Make the table that ends a run from the content of results.json: one row per Model, accuracy on the test split.

    Latency is the median; its spread, device and the rest are in the report.
    """
    rows = results.get("rows", [])
    targets = list(dict.fromkeys(name for row in rows for name in _by_target(row)))
    tested = {row.get("n_test") for row in rows if is_number(row.get("n_test"))}
    title = "Same budget, three ways to spend it"
    if len(tested) == 1:  # in the title, so that the table fits 80 columns
        title += f"; accuracy on {tested.pop()} test images"
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE, padding=(0, 0, 0, 1))
    headers = ("Model", "Accuracy", "95 % CI", "Params", "MACs")
    for header in (*headers, *("ms\n" + target.replace(",", "\n") for target in targets)):
        side: Literal["left", "right"] = "left" if header == "Model" else "right"
        table.add_column(escape(header), justify=side, no_wrap=True, vertical="bottom")
    for row in rows:
        role = str(row.get("role", row.get("name", "")))
        measured = _by_target(row)
        times = [_significant(measured[target], 3) if target in measured else MISSING for target in targets]
        name = role_name(role) + (", from the supernet" if row.get("from") == "inherited" else "")
        accuracy, between, n, params, macs, *_ = _result_cells(row)
        between += "" if len(tested) < 2 else f" (n = {n})"
        cells = (name, accuracy, between, params, macs, *times)
        table.add_row(*map(escape, cells), style="bold" if role == "chosen" else None)
    return table


def _by_target(row: Record) -> dict[str, float]:
    """Median latency in ms by target."""
    latency = row.get("latency_ms")
    if not isinstance(latency, Mapping):
        return {"latency": float(str(latency))} if is_number(latency) else {}
    if is_number(latency.get("median_ms")):
        return {str(latency.get("target", latency.get("runtime", "latency"))): float(latency["median_ms"])}
    return {
        str(name): float(part["median_ms"])
        for name, part in latency.items()
        if isinstance(part, Mapping) and is_number(part.get("median_ms"))
    }


def rejections(search: Record) -> Table:
    """Why Archs were rejected, most frequent reason first."""
    counts = search.get("rejections", {})
    rows = sorted(
        ((str(reason), int(count)) for reason, count in counts.items()), key=lambda row: (-row[1], row[0])
    )
    return Table(
        ("Reason", "Archs rejected"), tuple((reason, str(count)) for reason, count in rows), numeric=(1,)
    )


def feasibility(rows: Sequence[Record]) -> Table:
    """What the Space can reach, and how much of it the budget leaves."""
    cells = []
    for row in rows:
        unit = str(row.get("unit", ""))
        cells.append(
            (
                str(row.get("quantity", "")),
                _quantity(row.get("space_min"), unit),
                _quantity(row.get("space_max"), unit),
                str(row.get("requested", "") or "no bound"),
                percent(row.get("share_feasible")),
                str(row["n"]) if is_number(row.get("n")) else MISSING,
                str(row.get("note", "") or ""),
            )
        )
    headers = (
        "Quantity",
        "Smallest in the Space",
        "Largest",
        "Requested",
        "Share that fits",
        "n drawn",
        "Note",
    )
    return Table(headers, tuple(cells), numeric=(1, 2, 4, 5))


def _quantity(value: Any, unit: str) -> str:
    if unit in ("ms", "s", "%"):
        return f"{_significant(float(value), 3)} {unit}" if is_number(value) else MISSING
    return number(value, {"bytes": "B", "elements": "", "": ""}.get(unit, unit))


def keyed(record: Record) -> Table:
    """Two columns, key and value; nested records become dotted keys, long lists are cut."""
    return Table(("Key", "Value"), tuple(_flat(record)))


def _flat(record: Record, prefix: str = "") -> list[tuple[str, str]]:
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


def latency(records: Sequence[Record]) -> Table:
    """Every latency with what it depends on."""
    rows = []
    for row in records:
        cells = [_pick(row, *keys) for _, keys in _LATENCY_COLUMNS]
        median, _, spread = latency_text(row).partition(" (")
        ratio = row.get("ratio_to_reference")
        shown = _significant(float(ratio), 3) if ratio is not None and is_number(ratio) else MISSING
        rows.append((*cells, median, spread.rstrip(")") or MISSING, shown, _trust(row)))
    headers = (
        *(header for header, _ in _LATENCY_COLUMNS),
        "Median",
        "Spread",
        "Ratio to reference",
        "Trusted",
    )
    return Table(headers, tuple(rows), numeric=tuple(range(2, len(headers) - 1)))


def _trust(row: Record) -> str:
    trusted = row.get("trusted")
    if not isinstance(trusted, bool):
        return MISSING
    low, middle, high = (row.get(f"{name}_ms") for name in ("p25", "median", "p75"))
    if trusted or not (is_number(low) and is_number(middle) and is_number(high) and middle):
        return "yes" if trusted else "no"
    return f"no: IQR {100 * ((high or 0) - (low or 0)) / middle:.0f} % of median"


# Header -> keys that may hold it.
_LATENCY_COLUMNS = (
    ("Runtime", ("runtime", "name")),
    ("Device", ("device",)),
    ("Batch", ("batch",)),
    ("Threads", ("threads",)),
    ("Dtype", ("dtype",)),
    ("Warm-up", ("warmup",)),
    ("Runs", ("runs",)),
)


def export(record: Record, folder: Path) -> Table:
    """How each exported file compares with the Model it came from. Paths are shown from `folder` where inside it."""
    rows = []
    for name, check in record.items():
        if isinstance(check, Mapping):
            path = Path(_pick(check, "path"))
            inside = path.is_absolute() and path.is_relative_to(folder.resolve())
            noise = check.get("real_images") is False
            rows.append(
                (
                    name,
                    (path.relative_to(folder.resolve()) if inside else path).as_posix(),
                    _difference(check.get("max_abs_diff")),
                    percent(check.get("top1_agreement")),
                    _pick(check, "n_images") + (" (noise)" if noise else ""),
                    number(check.get("params")),
                    number(check.get("exported_params")),
                    str(check.get("opset") or ""),
                    " ".join(map(str, check.get("problems") or ())),
                )
            )
    headers = (
        "Format", "File", "Largest difference of logits", "Same top-1", "n images", "Params of Model", "of file",
        "Opset", "Problems",
    )  # fmt: skip
    return Table(headers, tuple(rows), numeric=(2, 3, 4, 5, 6, 7))


def _difference(value: Any) -> str:
    if not is_number(value):
        return MISSING
    return "0, bit for bit" if value == 0 else f"{value:.1e}"


def _pick(record: Record, *keys: str) -> str:
    for key in keys:
        if record.get(key) is not None:
            return str(record[key])
    return MISSING
