"""`kill -9` during every stage, then the same command again: the result equals an uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stage_help import Warm, has_step, has_trials, outcome, words


def test_a_run_killed_while_the_supernet_trains_gives_the_same_supernet(
    warm: Warm, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    checkpoint, done = folder / "checkpoints" / "supernet.safetensors", folder / "supernet.safetensors"
    warm.kill_when(words(folder), has_step(folder, "supernet", 2))
    assert checkpoint.exists()
    assert not done.exists()
    first = checkpoint.read_bytes()
    warm.kill_when(words(folder), lambda: checkpoint.read_bytes() != first)
    assert not done.exists()
    warm.kill_when(words(folder), done.exists)
    assert done.read_bytes() == (finished / "supernet.safetensors").read_bytes()


def moments(folder: Path) -> dict[str, Callable[[], bool]]:
    """When to kill: in the middle of each stage, in the order of a run."""
    return {
        "preparing": (folder / "space.json").exists,
        "writing a checkpoint": lambda: any(folder.glob("checkpoints/.supernet.safetensors.*")),
        "training the supernet": has_step(folder, "supernet", 5),
        "after the supernet": (folder / "supernet.safetensors").exists,
        "searching": has_trials(folder, "search", 2),
        "searching on": has_trials(folder, "search", 4),
        "saving the front": (folder / "front").exists,
        "retraining": has_step(folder, "retrain/chosen", 3),
        "saving the chosen model": lambda: any((folder / "models").glob(".chosen.*")),
        "retraining a baseline": has_step(folder, "retrain/hand_scaled", 2),
        "searching at random": has_trials(folder, "random_search", 3),
        "ranking": has_step(folder, "finals/ranking/", 2),
        "exporting": (folder / "export").exists,
        "between export and its record": (folder / "export" / "model.onnx").exists,
        "measuring": (folder / "export" / "export.json").exists,
        "reading the test split": (folder / "test_reads.json").exists,
        "writing the table": (folder / "test_scores.json").exists,
        "writing the report": (folder / "results.json").exists,
    }


@pytest.mark.slow
def test_a_run_killed_in_every_stage_equals_an_uninterrupted_one(
    warm: Warm, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for ready in moments(folder).values():
        warm.kill_when(words(folder), ready)
    warm.run(words(folder))
    got, want = outcome(folder), outcome(finished)
    for name, value in want.items():
        assert got[name] == value, name


@pytest.mark.slow
def test_a_process_of_its_own_can_be_killed_and_repeated(finished: Path, tmp_path: Path) -> None:
    """As a user does it: `python -m vitnas.cli run ...`, killed while searching, then once more."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "vitnas.cli", *words(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    ready, end = has_trials(folder, "search", 2), time.monotonic() + 120
    while not ready() and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "search.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=250)
    assert outcome(folder) == outcome(finished)
