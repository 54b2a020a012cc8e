"""The clock of latencies: every one that a budget, a search or a report holds is timed here.

A call is timed in rounds. Each round runs every target once and a fixed reference workload once, in
alternating order, so that a machine that slows down slows both and their ratio stays. A device that works in
the background is waited for at both edges. The environment is written beside the number.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitnas.errors import UserError
from vitnas.grids import ImageSize, as_image_size
from vitnas.measure.convert import convert, input_shape, model_device, model_dtype, random_images
from vitnas.measure.environment import environment
from vitnas.measure.runtimes import (
    Call,
    file_call,
    onnx_session,
    reference_call,
    require_device,
    synchronizer,
    torch_call,
    torch_threads,
)
from vitnas.measure.target import RUNS_ONNX, LatencyTarget, parse_target

TRUSTED_SPREAD = 0.10
FASTER = 0.99  # of the time of what stands beside it: a smaller gain cannot be told from noise
MIN_RUNS = 10


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one call on a batch, in milliseconds, with how it was taken.

    Args:
        runtime, device, batch, threads, dtype: the target's (see `LatencyTarget`).
        image_size: of the images, in pixels.
        warmup, runs: calls before timing, and timed calls.
        median_ms, p05_ms, p25_ms, p75_ms, p95_ms: percentiles of the timed calls.
        reference_median_ms: median of the reference workload in the same rounds.
        ratio_to_reference: median over the rounds of time / reference time; cancels what slowed both.
        ratio_spread: interquartile range of these ratios as a share of their median.
        trusted: the interquartile range of the times is at most 10 % of the median.
        images_per_s: batch / median.
        environment: see `environment()`.
    """

    runtime: str
    device: str
    batch: int
    threads: int
    dtype: str
    image_size: ImageSize
    warmup: int
    runs: int
    median_ms: float
    p05_ms: float
    p25_ms: float
    p75_ms: float
    p95_ms: float
    reference_median_ms: float
    ratio_to_reference: float
    ratio_spread: float
    trusted: bool
    images_per_s: float
    environment: Mapping[str, Any]

    @property
    def relative_iqr(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.p75_ms - self.p25_ms) / self.median_ms

    def __str__(self) -> str:
        doubt = "" if self.trusted else f", not trusted: spread {self.relative_iqr:.0%}"
        return (
            f"{self.median_ms:.2f} ms (p5 {self.p05_ms:.2f}, p95 {self.p95_ms:.2f}{doubt}) "
            f"on {self.runtime}, {self.device}, batch {self.batch}, "
            f"{self.threads} thread{'s' * (self.threads > 1)}, {self.dtype}"
        )


def measure_latency(
    calls: Mapping[str, Call],
    target: LatencyTarget,
    *,
    image_size: ImageSize,
    reference: Call | None = None,
    warmup: int = 10,
    runs: int = 50,
    seconds: float = 2.0,
) -> dict[str, Latency]:
    """Time `calls`, which must already run on `target` (see `vitnas.measure.runtimes`), interleaved in rounds.

    Args:
        calls: what to time, by name; each call is one batch.
        reference: what to compare with in each round; by default the fixed workload.
        warmup: untimed rounds first.
        runs, seconds: timing ends after `runs` rounds, or after `seconds` per call if that comes first, but
            never before 10 rounds.

    Returns:
        One Latency per name.

    Raises:
        UserError: no calls, or fewer than 1 run.
    """
    if not calls or runs < 1 or warmup < 0 or seconds <= 0:
        raise UserError(
            f"measuring {len(calls)} calls with runs={runs}, warmup={warmup}, seconds={seconds}; "
            "at least one call, one run and a positive time are needed. Mend that."
        )
    timed = [reference or reference_call(target), *calls.values()]
    with torch_threads(target.threads):
        seconds_RT = _rounds(
            timed, synchronizer(target), warmup=warmup, runs=runs, limit=seconds * len(timed)
        )
    around = environment()
    return {
        name: _latency(seconds_RT[:, i], seconds_RT[:, 0], target, image_size, warmup, around)
        for i, name in enumerate(calls, start=1)
    }


def _rounds(
    calls: list[Call], synchronize: Callable[[], None], *, warmup: int, runs: int, limit: float
) -> np.ndarray[Any, Any]:
    """Seconds per (round, call). Odd rounds go backwards, so that no call always follows the same one."""
    for _ in range(warmup):
        for call in calls:
            call()
    was_collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        rows: list[list[float]] = []
        end = time.perf_counter() + limit
        while len(rows) < runs and (len(rows) < min(MIN_RUNS, runs) or time.perf_counter() < end):
            row = [0.0] * len(calls)
            order = range(len(calls))
            for i in order if len(rows) % 2 == 0 else reversed(order):
                synchronize()
                start = time.perf_counter()
                calls[i]()
                synchronize()
                row[i] = time.perf_counter() - start
            rows.append(row)
    finally:
        if was_collecting:
            gc.enable()
    return np.asarray(rows)


def _latency(
    times_R: np.ndarray[Any, Any],
    reference_R: np.ndarray[Any, Any],
    target: LatencyTarget,
    image_size: ImageSize,
    warmup: int,
    around: dict[str, Any],
) -> Latency:
    p05, p25, median, p75, p95 = (
        round(float(p) * 1e3, 6) for p in np.percentile(times_R, [5, 25, 50, 75, 95])
    )
    low, ratio, high = (float(p) for p in np.percentile(times_R / reference_R, [25, 50, 75]))
    return Latency(
        runtime=target.runtime,
        device=target.device,
        batch=target.batch,
        threads=target.threads,
        dtype=target.dtype,
        image_size=image_size,
        warmup=warmup,
        runs=len(times_R),
        median_ms=median,
        p05_ms=p05,
        p25_ms=p25,
        p75_ms=p75,
        p95_ms=p95,
        reference_median_ms=round(float(np.median(reference_R)) * 1e3, 6),
        ratio_to_reference=round(ratio, 6),
        ratio_spread=round((high - low) / ratio, 6),
        trusted=(p75 - p25) / median <= TRUSTED_SPREAD,
        images_per_s=round(target.batch / median * 1e3, 3),
        environment=around,
    )


class LatencyMeter:
    """Measures Models on one target; what is measured for ONNX Runtime is the exported file.

    Args:
        target: a LatencyTarget or its text, e.g. `onnxruntime,batch=1` (what follows the @ in a budget).
        batch, threads, device, dtype: override the target's.
        warmup, runs, seconds: see `measure_latency`. Make them smaller for a search.
        attempts: measure again, up to this often, while the spread is above 10 %; the narrowest result
            counts.
        reference: a Model to interleave with instead of the fixed workload.
        cache: keeps Latencies by (arch, target text) for Models that have an `arch`; none by default.

    For a search the file is made by the tracing exporter, which takes a tenth of the time; with the batch
    fixed, ONNX Runtime runs it as fast as the file that `vitnas.export` writes (30.7 against 30.6 ms on a
    ViT-Ti at 224).

    Raises:
        UserError: the target cannot be read, or this machine cannot run it.

    >>> LatencyMeter("onnxruntime", batch=1).measure(model).median_ms  # doctest: +SKIP
    """

    def __init__(
        self,
        target: str | LatencyTarget = "onnxruntime",
        *,
        batch: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        warmup: int = 10,
        runs: int = 50,
        seconds: float = 2.0,
        attempts: int = 3,
        reference: nn.Module | None = None,
        cache: MutableMapping[Hashable, Latency] | None = None,
    ) -> None:
        given = {"batch": batch, "threads": threads, "device": device, "dtype": dtype}
        parsed = parse_target(target) if isinstance(target, str) else target
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.target = replace(parsed, **changes)
        require_device(self.target)
        self._protocol: dict[str, Any] = {"warmup": warmup, "runs": runs, "seconds": seconds}
        self._attempts = attempts
        self._reference = reference
        self._cache = cache

    def measure(self, model: nn.Module) -> Latency:
        """Latency of one Model (milliseconds per batch); from the cache if its Arch was measured before."""
        arch = getattr(model, "arch", None)
        key = (arch, str(self.target))
        if self._cache is not None and arch is not None and key in self._cache:
            return self._cache[key]
        latency = self.compare({"model": model})["model"]
        if self._cache is not None and arch is not None:
            self._cache[key] = latency
        return latency

    def compare(self, models: Mapping[str, nn.Module]) -> dict[str, Latency]:
        """Latencies of several Models timed in the same rounds, so that drift cannot favour one. No cache.

        Raises:
            UserError: the Models take images of different sizes (their Latencies could not be told apart).
        """
        sizes = {name: as_image_size("size", input_shape(model)[1:]) for name, model in models.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(
                f"image sizes are {sizes}; Models timed together need one size. Measure them one by one."
            )
        with tempfile.TemporaryDirectory(prefix="vitnas-latency-") as folder:
            calls = {
                name: self._call(model, Path(folder) / f"{i}.onnx")
                for i, (name, model) in enumerate(models.items())
            }
            reference = (
                self._call(self._reference, Path(folder) / "reference.onnx") if self._reference else None
            )
            return self._attempted(calls, next(iter(sizes.values()), 0), reference)

    def measure_onnx(self, path: Path | str) -> Latency:
        """Latency of an ONNX file with one input BCHW, for a target that runs such files.

        Raises:
            UserError: the target does not, or there is no such file.
        """
        return self.compare_onnx({"file": path})["file"]

    def compare_onnx(self, paths: Mapping[str, Path | str]) -> dict[str, Latency]:
        """The same of several files for images of one size, in the same rounds."""
        if self.target.runtime not in RUNS_ONNX:
            raise UserError(
                f"latency target is {str(self.target)!r}; an ONNX file runs in {' or '.join(RUNS_ONNX)}. Change it."
            )
        calls, size = {}, as_image_size("size", (1, 1))
        for name, path in paths.items():
            if not Path(path).is_file():
                raise UserError(f"{path} does not exist; it should be an ONNX file. Export it first.")
            shape = tuple(onnx_session(path, LatencyTarget()).get_inputs()[0].shape[1:])
            size, calls[name] = as_image_size("size", shape[1:]), file_call(path, self.target, shape)
        return self._attempted(calls, size, None)

    def _call(self, model: nn.Module, path: Path) -> Call:
        shape = input_shape(model)
        if self.target.runtime not in RUNS_ONNX:
            return torch_call(model, self.target, shape)
        source = model
        if self.target.dtype != str(model_dtype(model)).removeprefix("torch."):
            source = copy.deepcopy(model).to(getattr(torch, self.target.dtype))
        images = random_images((self.target.batch, *shape)).to(model_device(source), model_dtype(source))
        try:
            convert(source, path, images, exporter="legacy", dynamic_batch=False)
            return file_call(path, self.target, shape)
        except Exception:  # what tracing cannot take (FFT), or gets wrong, the slower exporter often can
            convert(source, path, images, exporter="dynamo", dynamic_batch=False)
            return file_call(path, self.target, shape)

    def compare_calls(self, calls: Mapping[str, Call], image_size: ImageSize) -> dict[str, Latency]:
        """The same of calls that are ready, each one batch on the target."""
        return self._attempted(calls, image_size, None)

    def _attempted(
        self, calls: Mapping[str, Call], image_size: ImageSize, reference: Call | None
    ) -> dict[str, Latency]:
        best: dict[str, Latency] = {}
        reference = reference or reference_call(self.target)
        for _ in range(max(1, self._attempts)):
            found = measure_latency(
                calls, self.target, image_size=image_size, reference=reference, **self._protocol
            )
            if not best or _worst_iqr(found) < _worst_iqr(best):
                best = found
            if all(latency.trusted for latency in best.values()):
                break
        return best


def _worst_iqr(latencies: Mapping[str, Latency]) -> float:
    return max(latency.relative_iqr for latency in latencies.values())
