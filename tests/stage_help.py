"""A run that takes seconds, and processes that can be killed without paying for the imports each time."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from vitnas.cli import main
from vitnas.model import Model
from vitnas.records import Correlation, Results
from vitnas.searching import SearchRecord
from vitnas.train import metrics

# Everything that a resumed run could get wrong is on: a moving average, stochastic depth, mixing, a checkpoint a step.
FIELDS = {
    "data.max_images": "240",
    "data.batch_size": "32",
    "data.augment.mixup": "0.2",
    "space.kind": "autoformer",
    "space.patch_size": "2",
    "space.mlp_ratios": "[1,2,3]",
    "space.embed_dims": "[16,24]",
    "space.depths": "[1,2]",
    "space.num_heads": "[1,2]",
    "space.head_dim": "8",
    "budget": "macs<=200K",
    "supernet.epochs": "2",
    "supernet.warmup_epochs": "0",
    "supernet.ema": "0.9",
    "supernet.drop_path": "0.1",
    "supernet.monitor_every": "1",
    "supernet.log_every": "1",
    "supernet.checkpoint_minutes": "0",
    "search.num_trials": "6",
    "finals.archs": "0",
    "retrain.train.epochs": "1",
    "retrain.train.warmup_epochs": "0",
    "retrain.train.log_every": "1",
    "retrain.train.checkpoint_minutes": "0",
    "retrain.rank_archs": "2",
    "retrain.rank_epochs": "1",
    "export.formats": "[onnx]",
    "export.latency": "[onnxruntime]",
    "device": "cpu",
    "threads": "1",
}


OWN = ("space.patch_size", "space.mlp_ratios")  # of this kind of space only


# The same with a sampler that learns, and nothing that takes long beside it.
FOCUS = {
    "sampler__kind": "focus",
    "sampler__every": "2",
    "sampler__images": "16",
    "sampler__updates": "1",
    "sampler__draws": "16",
    "search__searcher": "sampler",
    "search__num_trials": "3",
    "retrain__baselines": "[]",
    "retrain__rank_archs": "0",
    "supernet__monitor_every": "0",
    "export__latency": "[]",
    "export__formats": "[]",  # exporting takes seconds per file; other tests export
}


def words(folder: Path, **changes: str | None) -> list[str]:
    """`run tour` with the tiny fields; `supernet__epochs="1"` changes `supernet.epochs`, None leaves it out."""
    kept = FIELDS
    if changes.get("space__kind", "autoformer") != "autoformer":
        kept = {name: value for name, value in FIELDS.items() if name not in OWN}
    fields = {**kept, **{name.replace("__", "."): value for name, value in changes.items()}}
    given = (f"{name}={value}" for name, value in fields.items() if value is not None)
    return ["run", "tour", f"folder={folder}", *given]


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with one sentence and status 2; returns the sentence."""
    capsys.readouterr()
    assert main(argv) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in error
    assert error.count("vitnas: ") == 1, error
    return error


class Clock:
    """In place of a LatencyMeter: every Model takes 2 ms, and `selection_ms` more where it keeps fewer tokens."""

    def __init__(self, selection_ms: float) -> None:
        self.selection_ms = selection_ms

    def compare(self, models: Mapping[str, nn.Module]) -> dict[str, SimpleNamespace]:
        found = {}
        for name, model in models.items():
            assert isinstance(model, Model)
            more = self.selection_ms * (model.arch.selector is not None)
            found[name] = SimpleNamespace(median_ms=2 + more)
        return found


class Warm:
    """A process that has imported everything and forks a fresh process per command."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._line() == "ready"
        self.environment: dict[str, str | None] = {}  # what a command finds otherwise; None: not at all

    def _line(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def start(self, argv: Sequence[str]) -> int:
        """Start a command; returns the process's id."""
        assert self.server.stdin is not None
        job = {"argv": list(argv), "log": str(self.log), "environment": self.environment}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self._line())

    def run(self, argv: Sequence[str]) -> None:
        """Run a command to its end."""
        status = self.status(argv)
        assert status == 0, self.log.read_text()

    def status(self, argv: Sequence[str]) -> int:
        """Run a command to its end; returns its exit status."""
        self.start(argv)
        return int(self._line())

    def end_when(
        self, argv: Sequence[str], ready: Callable[[], bool], number: int, seconds: float = 90
    ) -> int:
        """Start a command and send it a signal when `ready()`; returns its exit status."""
        process, end = self.start(argv), time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"waited in vain:\n{self.log.read_text()}"
            time.sleep(0.001)
        with suppress(ProcessLookupError):  # it has ended
            os.kill(process, number)
        return int(self._line())

    def kill_when(self, argv: Sequence[str], ready: Callable[[], bool], seconds: float = 90) -> None:
        """Start a command and kill it, as `kill -9` does, when `ready()`."""
        status = self.end_when(argv, ready, signal.SIGKILL, seconds)
        assert status == -signal.SIGKILL, (
            f"it ended with {status} before it was killed:\n{self.log.read_text()}"
        )

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()


def has_step(folder: Path, stage: str, step: int) -> Callable[[], bool]:
    """metrics.jsonl shows this step of a stage."""

    def ready() -> bool:
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return any(f'"stage": "{stage}' in line and f'"step": {step},' in line for line in lines)

    return ready


def has_trials(folder: Path, study: str, n: int) -> Callable[[], bool]:
    """`n` Trials of a study are scored."""

    def ready() -> bool:
        if not (folder / "study.db").exists():
            return False
        database = sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True)
        try:
            query = "SELECT COUNT(*) FROM trials JOIN studies USING (study_id) WHERE state='COMPLETE' AND study_name=?"
            return bool(database.execute(query, (study,)).fetchone()[0] >= n)
        except sqlite3.OperationalError:  # the tables are being made
            return False
        finally:
            database.close()

    return ready


def outcome(folder: Path) -> dict[str, Any]:
    """All of a finished run that a kill must not change: everything but times."""
    search, results = SearchRecord.read(folder), Results.read(folder)
    weights = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
        if path.parent.name != "checkpoints"
    }
    lines = metrics.read_lines(folder)
    return {
        "weights": weights,
        "trials": [(t.genes, t.values, t.costs, t.state) for t in search.trials],
        "front": search.front,
        "chosen": search.chosen,
        "hypervolume": search.hypervolume,
        "rows": [
            replace(row, seconds=0, latency_ms={}, spent=row.spent and replace(row.spent, seconds=0))
            for row in results.rows
        ],
        "correlation": Correlation.read(folder),
        "metrics": [
            replace(line, images_per_s=0) if isinstance(line, metrics.Step) else line for line in lines
        ],
    }
