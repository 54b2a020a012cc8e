"""How a search gets an Arch's latency: it builds the Model and hands it to a meter that was passed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from torch import nn

from vitnas.arch import Arch
from vitnas.errors import UserError

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
    if given is None or isinstance(given, Mapping):
        meters = dict(given or {})
    else:
        meters = {targets[0]: given} if len(targets) == 1 else {}
    if missing := [target for target in targets if target not in meters]:
        raise UserError(
            f"latency on {', '.join(missing)} has no meter; a limit or objective on latency is measured, never "
            "guessed. Pass latency_meter, as a mapping from target to meter if there are several."
        )
    return {target: meters[target] for target in targets}


def measure_ms(meter: LatencyMeter, arch: Arch, build: Build | None) -> float:
    """Median milliseconds of the Model of `arch`."""
    if build is None:
        # Here and not at the top: a search without latency needs no network code, which takes seconds to import.
        from vitnas.model import build as build_model

        build = build_model
    timing = meter.measure(build(arch))
    return float(timing) if isinstance(timing, float | int) else float(timing.median_ms)
