"""Fewer tokens count only if they are faster: they are timed beside the same Arch with all tokens, and refused else.

At batch 1 choosing and gathering tokens can take longer than what they save, which no count of MACs tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitnas.arch import Arch
from vitnas.measure.latency import FASTER
from vitnas.model import build as build_model
from vitnas.runs import RunFile
from vitnas.searching.latency import Build, LatencyMeter, median_ms
from vitnas.searching.study import Study
from vitnas.searching.trial import Trial
from vitnas.space.keeps import keeping_all


@dataclass(frozen=True, kw_only=True)
class TokenSpeed:
    """Milliseconds of an Arch that keeps fewer tokens, and of the same Arch with all tokens, on one target."""

    arch_id: str
    target: str
    ms: float
    full_ms: float

    @property
    def is_faster(self) -> bool:
        return self.ms < FASTER * self.full_ms

    @property
    def reason(self) -> str:
        """Why an Arch that is not faster is rejected."""
        return f"fewer tokens are not faster than all on {self.target}: {self.ms:.2f} ms against {self.full_ms:.2f} ms"


@dataclass(frozen=True)
class TokenSpeeds(RunFile):
    """What a search found of the Archs of its front that keep fewer tokens; those that were not faster left it."""

    FILE = "token_speeds.json"
    COMMAND = "vitnas search"

    speeds: tuple[TokenSpeed, ...]


def token_speeds(
    arch: Arch, meters: Mapping[str, LatencyMeter], build: Build | None = None
) -> list[TokenSpeed]:
    """Time an Arch that keeps fewer tokens beside itself with all tokens, per target.

    Both run in the same rounds where the meter can `compare`, as `vitnas.LatencyMeter` does on exported files.
    """
    make = build or build_model
    models, found = {"kept": make(arch), "full": make(keeping_all(arch))}, []
    for target, meter in meters.items():
        compare: Any = getattr(meter, "compare", None)
        timed = compare(models) if compare else {role: meter.measure(each) for role, each in models.items()}
        kept, full = median_ms(timed["kept"]), median_ms(timed["full"])
        found.append(TokenSpeed(arch_id=arch.id, target=target, ms=kept, full_ms=full))
    return found


class TokenClock:
    """Says of Archs that keep fewer tokens whether that is faster; each is timed once."""

    def __init__(self, meters: Mapping[str, LatencyMeter], build: Build | None = None) -> None:
        self.meters, self._build = meters, build
        self._known: dict[str, list[TokenSpeed]] = {}

    def reasons_against(self, arch: Arch) -> list[str]:
        """Why `arch` keeps fewer tokens in vain; none where it does not, or keeps all."""
        if arch.selector is None:
            return []
        if arch.id not in self._known:
            self._known[arch.id] = token_speeds(arch, self.meters, self._build)
        return [speed.reason for speed in self._known[arch.id] if not speed.is_faster]

    @property
    def speeds(self) -> list[TokenSpeed]:
        """All that was measured."""
        return [speed for speeds in self._known.values() for speed in speeds]


def withdraw_slower(study: Study, pick: Callable[[], Sequence[Trial]], clock: TokenClock) -> None:
    """Withdraw from `study` what `pick` gives and keeps fewer tokens in vain, until it gives nothing of the kind."""
    while True:
        slower = [(trial, reasons) for trial in pick() if (reasons := clock.reasons_against(trial.arch))]
        if not slower:
            return
        for trial, reasons in slower:
            study.withdraw(trial, reasons)
