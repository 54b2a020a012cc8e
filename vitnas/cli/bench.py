"""`vitnas bench mixers` and `vitnas bench tokens`: what token mixers cost and fewer tokens save on this device, as a
table, a plot and in words."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console
from rich.table import Table

from vitnas.budget import format_quantity
from vitnas.cli.options import options
from vitnas.measure.environment import environment
from vitnas.measure.mixers import TOKENS, bench_mixers, growth, verdict
from vitnas.measure.tokens import TokenBench, bench_tokens
from vitnas.measure.tokens import verdict as tokens_verdict
from vitnas.runs import write_atomic

USAGE = (
    "`vitnas bench mixers` takes tokens, mixers, dim, heads, batch, threads, device, seconds and folder, for example "
    "tokens=64,1024."
)

TOKENS_USAGE = (
    "`vitnas bench tokens` takes selectors, keep, tokens, batch, runtimes, dim, depth, heads, threads, device, runs, "
    "seconds and folder, for example selectors=evit,merge keep=0.7 batch=1,8."
)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """`tokens` and `mixers` are lists, `seconds` are spent on each measurement, `folder` gets a table and a plot."""

    tokens: tuple[int, ...] = TOKENS
    mixers: tuple[str, ...] | None = None
    dim: PositiveInt = 128
    heads: PositiveInt = 4
    batch: PositiveInt = 1
    threads: PositiveInt | None = None
    device: str = "cpu"
    seconds: PositiveFloat = 1.0
    folder: Path | None = None


def bench_mixers_command(words: list[str], console: Console) -> None:
    """Time and memory of every mixer."""
    asked = options(BenchOptions, words, USAGE)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    rows = bench_mixers(
        tokens=asked.tokens,
        mixers=asked.mixers,
        dim=asked.dim,
        heads=asked.heads,
        batch=asked.batch,
        device=asked.device,
        seconds=asked.seconds,
        told=lambda text: console.out(f"measured {text}"),
    )
    for direction in dict.fromkeys(row["direction"] for row in rows):
        console.print(mixer_table(rows, direction))
    lines = verdict(rows)
    for line in lines:
        console.out(line)
    told = _machine(torch.get_num_threads())
    console.out(f"On {asked.device} ({told}).")
    if (folder := asked.folder) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "mixers.csv", _csv(rows))
        write_atomic(folder / "mixers.html", mixer_page(rows, [*lines, f"Measured on {told}."]))
        console.out(f"  table  {folder / 'mixers.csv'}\n  plot   {folder / 'mixers.html'}")


@dataclass(frozen=True, kw_only=True)
class BenchTokensOptions(TokenBench):
    """All but `folder` are lists or numbers of `TokenBench`; `folder` gets a table."""

    dim: PositiveInt = TokenBench.dim
    depth: PositiveInt = TokenBench.depth
    heads: PositiveInt = TokenBench.heads
    threads: PositiveInt = TokenBench.threads
    runs: PositiveInt = TokenBench.runs
    seconds: PositiveFloat = TokenBench.seconds
    folder: Path | None = None


def bench_tokens_command(words: list[str], console: Console) -> None:
    """Time of a ViT with all tokens and with fewer, by every selector."""
    asked = options(BenchTokensOptions, words, TOKENS_USAGE)
    rows = bench_tokens(asked, told=lambda text: console.out(f"measured {text}"))
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        console.print(token_table(rows, runtime))
    for line in tokens_verdict(rows):
        console.out(line)
    console.out(f"On {asked.device} ({_machine(asked.threads)}).")
    if asked.folder is not None:
        asked.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(asked.folder / "tokens.csv", _csv(rows))
        console.out(f"  table  {asked.folder / 'tokens.csv'}")


def token_table(rows: list[dict[str, Any]], runtime: str) -> Table:
    """Milliseconds per image, and how much faster than with all tokens, per batch and token count."""
    mine = [row for row in rows if row["runtime"] == runtime]
    columns = sorted({(row["tokens"], row["batch"]) for row in mine})
    heads = [f"{tokens} tokens, batch {batch}" for tokens, batch in columns]
    title = f"{runtime}: ms per image (times faster)"
    table = Table("selector", "keep", "MACs", *heads, title=title, title_justify="left")
    found = {(row["selector"], row["keep"], row["tokens"], row["batch"]): row for row in mine}
    for word, share in dict.fromkeys((row["selector"], row["keep"]) for row in mine):
        cells = [found[word, share, tokens, batch] for tokens, batch in columns]
        texts = [f"{row['median_ms'] / row['batch']:.2f} ({row['speedup']:.2f})" for row in cells]
        table.add_row(word, f"{share:g}", format_quantity(cells[-1]["macs"], "macs"), *texts)
    return table


def _machine(threads: int) -> str:
    found = environment()
    return f"{found.get('cpu', found.get('machine', ''))}, torch {torch.__version__}, {threads} threads"


def mixer_table(rows: list[dict[str, Any]], direction: str) -> Table:
    """Milliseconds (and memory in MB) per mixer and token count; the fastest of each count is bold."""
    counts = sorted({row["tokens"] for row in rows})
    slopes = growth(rows, direction)
    table = Table(
        "mixer", *map(str, counts), "memory grows", title=f"{direction}: ms | MB", title_justify="left"
    )
    chosen = {(row["mixer"], row["tokens"]): row for row in rows if row["direction"] == direction}
    for word in dict.fromkeys(row["mixer"] for row in rows):
        cells = []
        for count in counts:
            row = chosen[word, count]
            best = min(chosen[other, count]["median_ms"] for other in {key[0] for key in chosen})
            text = f"{row['median_ms']:.2f} | {row['memory_bytes'] / 1e6:.1f}"
            cells.append(f"[bold]{text}[/bold]" if row["median_ms"] == best else text)
        table.add_row(word, *cells, f"n^{slopes[word]:.2f}" if word in slopes else "")
    return table


def mixer_page(rows: list[dict[str, Any]], lines: list[str]) -> str:
    """One HTML page that works offline: time and memory against tokens, on logarithmic axes."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    directions = list(dict.fromkeys(row["direction"] for row in rows))
    quantities = {"median_ms": "ms", "memory_bytes": "bytes"}
    titles = [f"{direction}: {unit}" for unit in quantities.values() for direction in directions]
    figure = make_subplots(rows=2, cols=len(directions), subplot_titles=titles)
    for place, word in enumerate(dict.fromkeys(row["mixer"] for row in rows)):
        for line, quantity in enumerate(quantities, 1):
            for column, direction in enumerate(directions, 1):
                mine = [row for row in rows if row["mixer"] == word and row["direction"] == direction]
                figure.add_trace(
                    go.Scatter(
                        x=[row["tokens"] for row in mine],
                        y=[row[quantity] for row in mine],
                        name=word,
                        legendgroup=word,
                        showlegend=line == column == 1,
                        mode="lines+markers",
                        line={
                            "width": 4 if word == "softmax" else 2,
                            "color": f"hsl({place * 47 % 360},65%,45%)",
                        },
                    ),
                    row=line,
                    col=column,
                )
    figure.update_xaxes(type="log", title="tokens")
    figure.update_yaxes(type="log")
    figure.update_layout(
        title="Token mixers on this device<br><sup>" + "<br>".join(lines) + "</sup>", height=900
    )
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
