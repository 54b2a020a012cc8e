"""What keeping fewer tokens saves on this device: a plain ViT beside it with each selector, at several keep rates.

All of one runtime, batch and token count take turns, round by round. Batches are measured at the last token count and
token counts at the first batch, from which follow the batch and the count from where on a selector is faster.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.errors import UserError, check_words
from vitnas.layers.selectors import SELECTIONS
from vitnas.measure.convert import convert, random_images
from vitnas.measure.latency import FASTER, measure_latency
from vitnas.measure.mixers import check_device
from vitnas.measure.runtimes import Call, onnx_call, torch_call
from vitnas.measure.target import LatencyTarget
from vitnas.model import Model, build
from vitnas.model.selections import default_places, selecting

PLAIN = "all tokens"
PATCH = 16
RUNTIMES = ("torch", "onnxruntime")
SELECTORS = ("predictor", "attention", "evit", "merge", "pool", "fixed")


@dataclass(frozen=True, kw_only=True)
class TokenBench:
    """What to measure.

    Args:
        selectors: words of `SELECTIONS`; "pool" keeps a quarter at one place, whatever the keep rates.
        keep: shares of the patches that come to a place which go on there, at a quarter, half and three quarters of
            the depth.
        tokens: patches of an image, squares, rising.
        batch: sizes of batches, rising.
        runtimes: of RUNTIMES.
        dim, depth, heads: of the network.
        runs, seconds: timing ends after so many rounds, or after so many seconds per network.
    """

    selectors: tuple[str, ...] = SELECTORS
    keep: tuple[float, ...] = (0.9, 0.7, 0.5)
    tokens: tuple[int, ...] = (64, 196)
    batch: tuple[int, ...] = (1, 8, 64)
    runtimes: tuple[str, ...] = RUNTIMES
    dim: int = 192
    depth: int = 12
    heads: int = 3
    threads: int = 1
    device: str = "cpu"
    runs: int = 10
    seconds: float = 1.0

    def __post_init__(self) -> None:
        check_words("selectors", self.selectors, SELECTIONS)
        check_words("runtimes", self.runtimes, RUNTIMES)
        check_device(self.device)
        for name in ("selectors", "keep", "tokens", "batch", "runtimes"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; it needs at least one. Leave it out for the default.")
        for tokens in self.tokens:
            if tokens < 4 or math.isqrt(tokens) ** 2 != tokens:
                near = max(2, round(math.sqrt(max(tokens, 0)))) ** 2
                raise UserError(
                    f"tokens has {tokens}; it must be a square of a grid's side. Nearest: {near}."
                )
        for share in self.keep:
            if not 0 < share < 1:
                raise UserError(f"keep has {share}; a share lies between 0 and 1. Use 0.7.")
        for batch in self.batch:
            if batch < 1:
                raise UserError(f"batch has {batch}; it must be at least 1. Use 1.")
        if self.depth < 2:
            raise UserError(
                f"depth is {self.depth}; tokens leave behind the first block, so it must be at least 2. Use 12."
            )
        if self.dim % self.heads:
            near = self.dim // self.heads * self.heads or self.heads
            raise UserError(
                f"dim is {self.dim}; it must be a multiple of heads {self.heads}. Nearest: {near}."
            )
        object.__setattr__(self, "tokens", tuple(sorted(set(self.tokens))))
        object.__setattr__(self, "batch", tuple(sorted(set(self.batch))))

    def plain(self, tokens: int) -> Arch:
        """The network that keeps all tokens, for images of so many patches."""
        block = Block(num_heads=self.heads, head_dim=self.dim // self.heads, mlp_hidden=4 * self.dim)
        stage = Stage(embed_dim=self.dim, blocks=(block,) * self.depth)
        return Arch(image_size=PATCH * math.isqrt(tokens), patch_size=PATCH, stages=(stage,))

    def archs(self, tokens: int) -> Iterator[tuple[str, float, Arch]]:
        """Selector, keep rate and Arch of everything that is measured, the plain one first."""
        plain = self.plain(tokens)
        yield PLAIN, 1.0, plain
        places = default_places(plain)
        for selector in self.selectors:
            if selector == "pool":
                keeps = {places[len(places) // 2]: tokens // 4}
                yield selector, 0.25, selecting(plain, keeps, selector)
                continue
            for share in self.keep:
                left, keeps = tokens, {}
                for number, place in enumerate(places, 1):
                    if (fewer := max(2, int(share**number * tokens + 1e-9))) < left:
                        keeps[place] = left = fewer
                yield selector, share, selecting(plain, keeps, selector)


def bench_tokens(
    bench: TokenBench, *, told: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """One row per network, runtime, batch and token count.

    Args:
        told: called with each finished runtime, batch and token count.

    Raises:
        UserError: a network that cannot be, such as 2 x 2 pooling of a grid of odd sides.
    """
    rows: list[dict[str, Any]] = []
    for tokens in bench.tokens:
        batches = bench.batch if tokens == bench.tokens[-1] else bench.batch[:1]
        made = [(word, share, build(arch).eval()) for word, share, arch in bench.archs(tokens)]
        with tempfile.TemporaryDirectory(prefix="vitnas-tokens-") as folder:
            for runtime in bench.runtimes:
                files = [Path(folder) / f"{number}.onnx" for number in range(len(made))]
                if runtime == "onnxruntime":
                    for (_, _, model), file in zip(made, files, strict=True):
                        _export(model, file)
                for batch in batches:
                    target = LatencyTarget(
                        runtime=runtime, batch=batch, threads=bench.threads, device=bench.device
                    )
                    rows += _rows(made, files, target, tokens, bench)
                    told(f"{tokens} tokens, batch {batch} in {runtime}")
    return rows


def _export(model: Model, file: Path) -> None:
    """The file of any batch, by the exporter that `vitnas.export` tries first."""
    convert(model, file, random_images((2, *model.arch.input_size)), exporter="dynamo")


def _rows(
    made: Sequence[tuple[str, float, Model]],
    files: Sequence[Path],
    target: LatencyTarget,
    tokens: int,
    bench: TokenBench,
) -> Iterator[dict[str, Any]]:
    calls: dict[str, Call] = {}
    for number, ((_, _, model), file) in enumerate(zip(made, files, strict=True)):
        shape = model.arch.input_size
        is_file = target.runtime == "onnxruntime"
        calls[str(number)] = onnx_call(file, target, shape) if is_file else torch_call(model, target, shape)
    size = made[0][2].arch.image_size
    with torch.no_grad():
        found = measure_latency(
            calls,
            target,
            image_size=size,
            reference=calls["0"],  # the plain one: ratios are of the same round
            warmup=1,
            runs=bench.runs,
            seconds=bench.seconds,
        )
    for (word, share, model), latency in zip(made, found.values(), strict=True):
        cost = count(model.arch)
        yield {
            "selector": word,
            "keep": share,
            "tokens": tokens,
            "left": model.arch.num_final_tokens - model.arch.num_prefix_tokens,
            "batch": target.batch,
            "runtime": target.runtime,
            "device": target.device,
            "threads": target.threads,
            "median_ms": latency.median_ms,
            "p25_ms": latency.p25_ms,
            "p75_ms": latency.p75_ms,
            "images_per_s": latency.images_per_s,
            "speedup": round(1 / latency.ratio_to_reference, 4),
            "speedup_spread": round(latency.ratio_spread, 4),
            "macs": cost.macs,
            "memory_bytes": cost.memory_bytes,
            "runs": latency.runs,
        }


def break_even(
    rows: Sequence[dict[str, Any]], axis: str, runtime: str
) -> dict[tuple[str, float], int | None]:
    """Per selector and keep rate the `axis` ("batch" or "tokens") from which on it is faster than all tokens, of those
    measured in `runtime` while the other axis stays; None if it never is."""
    other = "tokens" if axis == "batch" else "batch"
    mine = [row for row in rows if row["runtime"] == runtime]
    at = (max if other == "tokens" else min)((row[other] for row in mine), default=0)
    found: dict[tuple[str, float], int | None] = {}
    lost: set[tuple[str, float]] = set()
    for row in sorted((r for r in mine if r[other] == at), key=lambda r: -int(r[axis])):
        key = row["selector"], row["keep"]
        if row["selector"] == PLAIN or key in lost:
            continue
        found.setdefault(key, None)
        if row["speedup"] > 1 / FASTER:
            found[key] = int(row[axis])
        else:
            lost.add(key)
    return found


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows say, in words: from which batch and token count on fewer tokens pay, and where they never do."""
    lines = []
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        for axis in ("batch", "tokens"):
            even = break_even(rows, axis, runtime)
            if not even:
                continue
            pays = [
                f"{word} {share:g} from {start}" for (word, share), start in even.items() if start is not None
            ]
            never = [f"{word} {share:g}" for (word, share), start in even.items() if start is None]
            what = "batches" if axis == "batch" else "tokens"
            lines.append(
                f"{runtime}, {what}: "
                + (f"faster than {PLAIN}: {', '.join(pays)}. " if pays else "")
                + (f"Not faster at the largest: {', '.join(never)}." if never else "")
            )
    return lines
