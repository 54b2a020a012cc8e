"""What a training says of itself: running means of its losses, its speed, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.runs import append_jsonl, read_jsonl, write_atomic
from vitnas.train.engine import Engine

What = Arch | Literal["gradient"] | None  # whose loss; None for the only network


class Metrics:
    """Running means of the losses, the speed, and metrics.jsonl (written by the first process only)."""

    def __init__(self, folder: Path | None, stage: str, engine: Engine) -> None:
        self._path = None if folder is None else folder / "metrics.jsonl"
        self._stage, self._engine = stage, engine
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
        record = {"step": step, "epoch": epoch, **means, "lr": lr, "images_per_s": speed}
        self.write(record)
        tracked = {**means, "lr": lr, "images_per_s": speed}
        self._engine.track({f"{self._stage}/{name}": value for name, value in tracked.items()}, step)
        self.text = f"loss {means['loss']:.3f}, {speed:,.0f} images/s"
        self._sums, self._counts, self._images, self._since = {}, {}, 0, now

    def write(self, record: dict[str, Any]) -> None:
        if self._path is not None and self._engine.is_main:
            append_jsonl(self._path, {"stage": self._stage, **record})

    def truncate(self, step: int) -> list[list[dict[str, Any]]]:
        """Drop this stage's lines after `step` (a killed run wrote them); returns the monitor records kept."""
        if self._path is None or not self._path.exists():
            return []
        try:
            records = list(read_jsonl(self._path))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._path} cannot be read ({error}); every line must be a JSON object. Delete the bad lines."
            ) from error
        kept = [r for r in records if r.get("stage") != self._stage or r.get("step", 0) <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        # Compared as a whole: a line cut short by a kill goes too, or else the next one would be glued to it.
        if self._engine.is_main and self._path.read_bytes() != text.encode():
            write_atomic(self._path, text)
        return [r["archs"] for r in kept if r.get("stage") == self._stage and r.get("event") == "monitor"]
