"""How a search gets an Arch's latency: it builds the Model and hands it to a meter that was passed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from torch import nn

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.measure.target import LatencyTarget, parse_target
from vitnas.model import build as build_model
from vitnas.space import Matrix, Space

Build: TypeAlias = Callable[[Arch], nn.Module]


class Timing(Protocol):
    """What a meter gives back: at least the median of its runs, in milliseconds."""

    @property
    def median_ms(self) -> float: ...


class LatencyMeter(Protocol):
    """Times a Model as it would be deployed: exports it for its target, warms up, runs, takes the median."""

    def measure(self, model: nn.Module) -> Timing | float:
        """Milliseconds of `model` on this meter's target, or an object with `median_ms`."""
        ...


def meters_of(
    given: LatencyMeter | Mapping[str, LatencyMeter] | None, targets: Sequence[str]
) -> dict[str, LatencyMeter]:
    """One meter per latency target.

    Raises:
        UserError: a target has no meter. A limit that is never measured would be a promise that nobody keeps.
    """
    if isinstance(given, Mapping):
        meters = dict(given)
    else:
        meters = {
            target: given for target in targets if given is not None and (len(targets) == 1 or _says(given))
        }
    if missing := [target for target in targets if target not in meters]:
        raise UserError(
            f"latency on {', '.join(missing)} has no meter; a limit or objective on latency is measured, never "
            "guessed. Pass latency_meter, as a mapping from target to meter if there are several."
        )
    for target in targets:
        own = _says(meters[target])
        if own is not None and own != parse_target(target):
            raise UserError(
                f"latency on {target} has a meter of {own}; a meter answers for its own target only. Pass "
                f"LatencyMeter({target!r})."
            )
    return {target: meters[target] for target in targets}


def _says(meter: LatencyMeter) -> LatencyTarget | None:
    """What a meter measures on, if it says so."""
    own = getattr(meter, "target", None)
    return own if isinstance(own, LatencyTarget) else None


def measure_ms(meter: LatencyMeter, arch: Arch, build: Build | None = None) -> float:
    """Median milliseconds of the Model of `arch`."""
    return median_ms(meter.measure((build or build_model)(arch)))


def median_ms(timing: Timing | float) -> float:
    """What a meter measured, in milliseconds."""
    return float(timing) if isinstance(timing, float | int) else float(timing.median_ms)


@dataclass(frozen=True)
class LatencyModel:
    """Latency of Archs that were not timed, as a linear function of macs, params, memory and the number of genes that
    matter (which follows the depth), fitted to Archs that were.

    Args:
        weights: of 1, macs, params, memory and the count, each over its `scales`.
        scales: largest values among the Archs timed.
        error: mean relative error, each Arch predicted by a model fitted to the others.
        n: Archs timed.
    """

    weights: tuple[float, ...]
    scales: tuple[float, ...]
    error: float
    n: int

    @classmethod
    def fit(cls, space: Space, meter: LatencyMeter, *, n: int = 24, seed: int = 0) -> LatencyModel:
        """Time the smallest, the largest and random Archs of `space`, `n` in all."""
        ends = np.array([space.encode(space.smallest()), space.encode(space.largest())])
        genes = np.concatenate([ends, space.random_matrix(n - 2, np.random.default_rng(seed))])
        times = np.array([measure_ms(meter, space.arch_of(tuple(row))) for row in genes.tolist()])
        raw = _latency_features(space, genes)
        scales = raw.max(0)
        features = raw / scales

        def solve(rows: np.ndarray) -> np.ndarray:
            found: np.ndarray = np.linalg.lstsq(features[rows], times[rows], rcond=1e-6)[0]
            return found

        every = np.arange(n)
        left_out = [float(features[i] @ solve(np.delete(every, i))) for i in every]
        error = float(np.mean(np.abs(np.array(left_out) / times - 1)))
        return cls(tuple(solve(every).tolist()), tuple(scales.tolist()), error, n)

    def cost_of(self, space: Space) -> Callable[[Matrix], np.ndarray]:
        """(N, genes) canonical genes of `space` to (N,) milliseconds, never below a thousandth."""

        def predict(genes: Matrix) -> np.ndarray:
            features = _latency_features(space, genes) / np.array(self.scales)
            return np.maximum(features @ np.array(self.weights), 1e-3)

        return predict


@dataclass(frozen=True)
class PredictedLatency:
    """A LatencyMeter that times nothing: it says what a LatencyModel predicts of a Model's Arch, times `factor`."""

    space: Space
    model: LatencyModel
    factor: float = 1.0

    def measure(self, model: nn.Module) -> float:
        """Milliseconds of a Model, which may have no storage."""
        genes = np.asarray([self.space.encode(cast(Any, model).arch)], dtype=np.int64)
        return self.factor * float(self.model.cost_of(self.space)(genes)[0])


def _latency_features(space: Space, genes: Matrix) -> np.ndarray:
    costs, active = space.cost_table().costs(genes), space.active_matrix(genes).sum(1)
    columns = (np.ones(len(genes)), costs["macs"], costs["params"], costs["memory"], active)
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
