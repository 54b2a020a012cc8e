"""What each token mixer costs on this device: time and peak memory against the number of tokens, forward and backward.

Mixers take turns, round by round, so that a machine that slows down slows all of them. Times are medians with the tenth
and ninetieth percentile; memory is the largest total of activations alive at once, weights and input left out (on a
GPU: what the allocator handed out beyond these). Softmax runs torch's fused attention.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.errors import UserError, check_words
from vitnas.measure.memory import peak_bytes_of
from vitnas.mixers import MIXERS, Mixer

TOKENS = (64, 144, 256, 576, 1024, 2304, 4096)


def bench_mixers(
    *,
    tokens: Sequence[int] = TOKENS,
    mixers: Sequence[str] | None = None,
    dim: int = 128,
    heads: int = 4,
    batch: int = 1,
    device: str = "cpu",
    seconds: float = 1.0,
    told: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """One row per mixer and token count.

    Args:
        tokens: squares (a grid of patches without a class token).
        seconds: to spend per mixer, token count and direction, at least 5 runs.
        told: called with each finished token count.

    Raises:
        UserError: token counts that are no squares, unknown mixers, a device that is not there.
    """
    words = list(dict.fromkeys(mixers or [word for word, kind in MIXERS.items() if not kind.variant_of]))
    tokens = tuple(dict.fromkeys(tokens))
    if not tokens:
        raise UserError(f"tokens is empty; it needs at least one count, for example {TOKENS[0]}.")
    check_words("mixers", words, MIXERS)
    for count in tokens:
        if count < 4 or math.isqrt(count) ** 2 != count:
            near = max(2, round(math.sqrt(max(count, 0)))) ** 2
            raise UserError(f"tokens has {count}; it must be a square of a grid's side. Nearest: {near}.")
    if dim % heads:
        near = dim // heads * heads or heads
        raise UserError(f"dim is {dim}; it must be a multiple of heads {heads}. Nearest: {near}.")
    check_device(device)
    rows: list[dict[str, Any]] = []
    for count in tokens:
        made = {word: _make(word, count, dim, heads, device) for word in words}
        x = torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(0)).to(device)
        for backward in (False, True):
            times = _time({word: _call(mixer, x, backward) for word, mixer in made.items()}, seconds, device)
            for word, mixer in made.items():
                taken = sorted(times[word])
                rows.append(
                    {
                        "mixer": word,
                        "tokens": count,
                        "direction": "forward and backward" if backward else "forward",
                        "median_ms": statistics.median(taken),
                        "p10_ms": taken[len(taken) // 10],
                        "p90_ms": taken[-1 - len(taken) // 10],
                        "runs": len(taken),
                        "memory_bytes": peak_bytes_of(mixer, x, _call(mixer, x, backward)),
                    }
                )
        told(f"{count} tokens")
    return rows


def check_device(device: str) -> None:
    """Raise UserError for a device that is not there, or whose time and memory cannot be measured."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or (kind == "cpu" and number):
        raise UserError(f"device is {device!r}; it must be cpu, cuda or cuda:NUMBER. Use device=cpu.")
    seen = torch.cuda.device_count()
    if kind == "cuda" and not seen:
        raise UserError(f"device is {device!r}, but torch sees no GPU. Use device=cpu.")
    if kind == "cuda" and int(number or 0) >= seen:
        raise UserError(f"device is {device!r}, but torch sees {seen}. Nearest: cuda:{seen - 1}.")


def break_even(rows: Sequence[dict[str, Any]], direction: str) -> dict[str, int | None]:
    """Per mixer the token count from which on it is faster than softmax, of those measured; None if it never is."""
    found: dict[str, int | None] = {}
    chosen = [row for row in rows if row["direction"] == direction]
    softmax = {row["tokens"]: row["median_ms"] for row in chosen if row["mixer"] == "softmax"}
    for word in dict.fromkeys(row["mixer"] for row in chosen if row["mixer"] != "softmax"):
        start = None
        for row in sorted((r for r in chosen if r["mixer"] == word), key=lambda r: -int(r["tokens"])):
            if row["tokens"] not in softmax or row["median_ms"] >= softmax[row["tokens"]]:
                break
            start = int(row["tokens"])
        found[word] = start
    return found


def growth(
    rows: Sequence[dict[str, Any]], direction: str, quantity: str = "memory_bytes"
) -> dict[str, float]:
    """Per mixer the slope of log(quantity) over log(tokens), by least squares: 1 is linear, 2 quadratic."""
    found = {}
    for word in dict.fromkeys(row["mixer"] for row in rows):
        mine = [row for row in rows if row["mixer"] == word and row["direction"] == direction]
        if len(mine) > 1:
            xs, ys = ([math.log(row[key]) for row in mine] for key in ("tokens", quantity))
            found[word] = statistics.linear_regression(xs, ys).slope
    return found


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows say, in words: where softmax wins first of all."""
    lines = []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        even = break_even(rows, direction)
        counts = sorted({row["tokens"] for row in rows})
        never = [word for word, start in even.items() if start is None]
        wins = [
            count
            for count in counts
            if min((r for r in rows if r["direction"] == direction and r["tokens"] == count), key=_median)[
                "mixer"
            ]
            == "softmax"
        ]
        if not any(row["mixer"] == "softmax" for row in rows):
            lines.append(f"{direction}: softmax was not measured, so there is nothing to compare with.")
            continue
        told = "softmax is never the fastest"
        if wins:
            told = f"softmax is the fastest at {', '.join(map(str, wins))} tokens"
        pays = ", ".join(f"{word} from {start}" for word, start in even.items() if start is not None)
        lines.append(
            f"{direction}: {told}. "
            + (f"Faster than softmax: {pays} tokens. " if pays else "")
            + (f"Never faster up to {counts[-1]} tokens: {', '.join(never)}." if never else "")
        )
    return lines


def _median(row: dict[str, Any]) -> float:
    return float(row["median_ms"])


def _make(word: str, tokens: int, dim: int, heads: int, device: str) -> Mixer:
    kind: Any = MIXERS[word]
    size = min(64, tokens) if kind.size_below_tokens else None
    mixer: Mixer = kind(dim, heads, size=size, grid=(math.isqrt(tokens),) * 2, num_prefix_tokens=0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            nn.init.normal_(parameter, std=0.05)
        mixer.initialize_own(torch.Generator().manual_seed(0))
    return mixer.to(device)


def _call(mixer: Mixer, x: Tensor, backward: bool) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return mixer(x)

    def both() -> object:
        for parameter in mixer.parameters():
            parameter.grad = None
        mixer(x.detach().requires_grad_()).sum().backward()
        return None

    return both if backward else forward


def _time(calls: dict[str, Callable[[], object]], seconds: float, device: str) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns, until each had its seconds and 5 runs; two rounds of warm-up."""
    times: dict[str, list[float]] = {word: [] for word in calls}
    spent = dict.fromkeys(calls, 0.0)
    turn = 0
    while any(spent[word] < seconds or len(times[word]) < 5 for word in calls):
        for word, call in calls.items():
            if turn > 1 and spent[word] >= seconds and len(times[word]) >= 5:
                continue
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            taken = time.perf_counter() - started
            if turn > 1:
                times[word].append(1e3 * taken)
                spent[word] += taken
        turn += 1
    return times


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
