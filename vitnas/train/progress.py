"""Progress: rich bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar

PLAIN_SECONDS = 10.0


class Progress(Protocol):
    """Told what goes on; tells a person."""

    def update(self, stage: str, step: int, steps: int, text: str = "") -> None:
        """`step` of `steps` of a stage are done; `text` says how it goes."""
        ...

    def note(self, text: str) -> None:
        """A line worth keeping."""
        ...

    def done(self, stage: str, warning: str | None = None) -> None:
        """A stage is over."""
        ...


class Silent:
    """Says nothing; the default in a library."""

    def update(self, stage: str, step: int, steps: int, text: str = "") -> None: ...

    def note(self, text: str) -> None: ...

    def done(self, stage: str, warning: str | None = None) -> None: ...


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def shown(stage: str) -> str:
    """A stage's name for people: a brief training, finals/GROUP/ARCH/NUMBER, says which Arch trains in which rung.

    >>> shown("finals/ranking/d24-l6-0fc9c30e/1"), shown("finals/hand_scaled/d36-l4-5fd71ccd/0")
    ('brief training d24-l6-0fc9c30e, rung 2', 'hand scaled d36-l4-5fd71ccd, rung 1')
    """
    match stage.split("/"):
        case ["finals", group, arch, number]:
            shared = group in ("search", "ranking")  # by what measures a ranking, by random search too
            who = "brief training" if shared else group.replace("_", " ")
            return f"{who} {arch}, rung {int(number) + 1}"
    return stage


class _Bar(BarColumn):
    """Green when it is done, but yellow where what was done is not to be relied on."""

    def render(self, task: Task) -> ProgressBar:
        bar = super().render(task)
        if task.fields.get("doubted"):
            bar.complete_style = bar.finished_style = "yellow"
        return bar


class ConsoleProgress:
    """Bars on a terminal; without one, a line per stage at least every ten seconds. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}
        self._began: dict[
            str, tuple[float, int]
        ] = {}  # when, and at which step: a resumed stage has done some
        columns = (
            TextColumn("{task.description:<24}"),
            _Bar(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Bars(*columns, TextColumn("{task.fields[text]}"), console=self.console)

    def __enter__(self) -> ConsoleProgress:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._bars.stop()

    def update(self, stage: str, step: int, steps: int, text: str = "") -> None:
        if self.console.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(shown(stage), total=steps, text=escape(text))
            self._bars.update(self._tasks[stage], completed=step, total=steps, text=escape(text))
            return
        now = time.monotonic()
        began, first = self._began.setdefault(stage, (now, step))
        if step >= steps or now - self._last.setdefault(stage, now) >= PLAIN_SECONDS:
            self._last[stage] = now
            left = (steps - step) * (now - began) / (step - first) if step > first else 0.0
            self.console.out(
                f"{shown(stage)}: {step}/{steps}  {text}{f', {duration(left)} left' if left else ''}"
            )

    def note(self, text: str) -> None:
        self.console.out(f"  {text}")

    def done(self, stage: str, warning: str | None = None) -> None:
        if warning:
            if stage in self._tasks:
                self._bars.update(self._tasks[stage], doubted=True)
            self.console.print("[yellow]Warning:[/yellow] ", end="")
            self.console.out(warning)
