"""What a training says of itself: running means of its losses, its speed, and metrics.jsonl, a line each by event."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.runs import append_jsonl, check_there, from_json, read_jsonl, to_json, write_atomic, writing
from vitnas.train.engine import Engine

FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Step:
    """Mean losses (by name) since the line before."""

    stage: str
    step: int
    epoch: float
    losses: Mapping[str, float]
    lr: float
    images_per_s: float


@dataclass(frozen=True, kw_only=True)
class MonitoredArch:
    """An Arch inside the Supernet, on held-out images; of numbers the accuracy is R^2, which has an `error`."""

    role: str
    arch_id: str
    macs: int
    accuracy: float
    loss: float
    n: int
    error: float | None = None

    def __str__(self) -> str:
        return f"{self.role} {self.accuracy:{'.1%' if self.error is None else '.3f'}}"


@dataclass(frozen=True, kw_only=True)
class Monitored:
    """The Archs that a Monitor evaluated."""

    stage: str
    step: int
    epoch: float
    archs: tuple[MonitoredArch, ...]
    event: Literal["monitor"] = "monitor"


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Why the training should not be trusted."""

    stage: str
    step: int
    text: str
    event: Literal["warning"] = "warning"


@dataclass(frozen=True, kw_only=True)
class Hooked:
    """What a Hook said; `event` is its class's name in small letters."""

    stage: str
    step: int
    epoch: float
    event: str
    said: Mapping[str, Any]


Line = Step | Monitored | Warned | Hooked
_KINDS: dict[str | None, Any] = {None: Step, "monitor": Monitored, "warning": Warned}


def read_lines(folder: Path) -> Iterator[Line]:
    """The lines in order; a last one that a kill cut short is left out.

    Raises:
        UserError: at a line that is none of these.
    """
    count, path = 0, folder / FILE
    try:
        for record in read_jsonl(path):
            count += 1
            event = record.get("event") if isinstance(record, dict) else None
            yield from_json(_KINDS.get(event, Hooked), record)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read at line {count} ({error}); every line must be as a training "
            "wrote it. Delete the bad lines."
        ) from error


What = Arch | Literal["gradient"] | None  # whose loss; None for the only network


class Metrics:
    """Running means of the losses, the speed, and metrics.jsonl (written by the first process only)."""

    def __init__(self, folder: Path | None, stage: str, engine: Engine) -> None:
        self._folder, self._stage, self._engine = folder, stage, engine
        self.check_folder: Callable[[], None] = lambda: None  # raises where the folder has been removed
        if folder is not None and engine.is_main:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self.check_folder = check_there(folder)
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}  # per name: not every draw of a step has every loss
        self._images = 0
        self._since = time.monotonic()
        self._unread: list[tuple[int, What, str, Tensor]] = []
        self.text = ""

    def add(self, step: int, arch: Arch | None, losses: dict[str, Tensor], images: int) -> None:
        self._unread += [(step, arch, name, value.detach()) for name, value in losses.items()]
        self._images += images

    def add_norm(self, step: int, norm: Tensor) -> None:
        self._unread.append((step, "gradient", "", norm))

    def read(self) -> tuple[int, What, float] | None:
        """Take what was added into the means, which waits for the device; returns the first loss that is not finite."""
        if not self._unread:
            return None
        device = self._unread[0][-1].device
        numbers = torch.stack([value.to(device).reshape(()) for *_, value in self._unread]).tolist()
        bad = None
        for (step, what, name, _), number in zip(self._unread, numbers, strict=True):
            if name:
                self._sums[name] = self._sums.get(name, 0.0) + number
                self._counts[name] = self._counts.get(name, 0) + 1
            if name in ("loss", "") and not math.isfinite(number) and bad is None:
                bad = step, what, number
        self._unread.clear()
        return bad

    def step(self, step: int, epoch: float, lr: float) -> None:
        """Write the means since the last call."""
        now = time.monotonic()
        speed = self._images * self._engine.world / max(now - self._since, 1e-9)
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self.write(Step, step=step, epoch=epoch, losses=means, lr=lr, images_per_s=speed)
        tracked = {**means, "lr": lr, "images_per_s": speed}
        self._engine.track({f"{self._stage}/{name}": value for name, value in tracked.items()}, step)
        self.text = f"loss {means['loss']:.3f}, {speed:,.0f} images/s"
        self._sums, self._counts, self._images, self._since = {}, {}, 0, now

    @property
    def sums(self) -> dict[str, list[float]]:
        """Of each loss its sum and its count since the last line of means, for a checkpoint."""
        return {name: [total, self._counts[name]] for name, total in self._sums.items()}

    def restore(self, sums: Mapping[str, Sequence[float]]) -> None:
        """Go on with the means of a training that ended between two lines of them."""
        self._sums = {name: total for name, (total, _) in sums.items()}
        self._counts = {name: int(count) for name, (_, count) in sums.items()}

    def write(self, kind: type[Line], **values: Any) -> None:
        """Add a line, in one write."""
        if self._folder is not None and self._engine.is_main:
            append_jsonl(self._folder / FILE, to_json(kind(stage=self._stage, **values)))

    def truncate(self, epoch: float) -> list[tuple[MonitoredArch, ...]]:
        """Drop this stage's lines after `epoch` (a killed run wrote them); returns what the Monitor found before. Steps
        would not do, as another number of processes may go on."""
        if self._folder is None or not (self._folder / FILE).exists():
            return []
        kept = [line for line in read_lines(self._folder) if line.stage != self._stage or _is_by(line, epoch)]
        text = "".join(json.dumps(to_json(line)) + "\n" for line in kept)
        # Compared as a whole: a line cut short by a kill goes too, or else the next one would be glued to it.
        if self._engine.is_main and (self._folder / FILE).read_bytes() != text.encode():
            write_atomic(self._folder / FILE, text)
        return [line.archs for line in kept if isinstance(line, Monitored) and line.stage == self._stage]


def _is_by(line: Line, epoch: float) -> bool:
    """Whether a line was written by then. A warning ends a training; Hooks speak before their step, others after it."""
    if isinstance(line, Warned):
        return False
    return line.epoch < epoch - 1e-9 if isinstance(line, Hooked) else line.epoch <= epoch + 1e-9
