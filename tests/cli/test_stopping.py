"""SIGINT and SIGTERM: one sentence and exit status 130 or 143 whenever they come, with a checkpoint while training."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stage_help import Warm, has_step, has_trials, words
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vitnas import stopping
from vitnas.cli import commands, main
from vitnas.stopping import Stopped, Stopper, deferred, working
from vitnas.train.checkpoint import load_checkpoint

SIGNALS = {signal.SIGINT: "stopped;", signal.SIGTERM: "stopped by SIGTERM;"}


def listens(process: int) -> bool:
    """Whether a process catches SIGTERM by now."""
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if "SigCgt" in line)
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("number", SIGNALS)
def test_while_importing(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "vitnas", "list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not listens(process.pid):
        time.sleep(0.001)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert said == f"vitnas: {SIGNALS[number]} it had not begun.\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_while_training_a_checkpoint_is_taken_first(
    number: signal.Signals, warm: Warm, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    argv = words(folder, supernet__checkpoint_minutes="1000")
    status = warm.end_when(argv, has_step(folder, "supernet", 3), number)
    assert status == 128 + number, warm.log.read_text()
    assert warm.log.read_text().rstrip().endswith("continues from the last checkpoint.")
    assert "Traceback" not in warm.log.read_text()
    _, meta = load_checkpoint(folder / "checkpoints" / "supernet.safetensors")
    assert meta["step"] >= 3
    assert not (folder / "run.lock").exists()
    if number == signal.SIGTERM:
        warm.run(["train", str(folder)])
        whole = (finished / "supernet.safetensors").read_bytes()
        assert (folder / "supernet.safetensors").read_bytes() == whole


def after(seconds: float) -> Callable[[], bool]:
    """So long from now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@pytest.mark.slow
def test_at_any_time(warm: Warm, tmp_path: Path) -> None:
    """Forty moments of a whole run, by chance."""
    rng = random.Random(0)
    folder = tmp_path / "run"
    for trial in range(40):
        number = rng.choice(list(SIGNALS))
        wait = rng.uniform(0.0, 1.5)
        status = warm.end_when(words(folder), after(wait), number)
        said = warm.log.read_text()
        if status == 0:
            break
        # A fork that has not come to the command line yet has the system's own handlers.
        assert status == 128 + number or (wait < 0.05 and status == -number), (trial, status, said)
        assert "Traceback" not in said
    warm.run(words(folder))


@pytest.mark.slow
def test_a_search_gives_its_trial_back(warm: Warm, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    argv = words(folder, search__num_trials="200")
    assert warm.end_when(argv, has_trials(folder, "search", 3), signal.SIGTERM) == 143
    assert "Traceback" not in warm.log.read_text()


@pytest.fixture
def stopper() -> Iterator[Stopper]:
    with working() as stopper:
        stopper.works = True
        yield stopper


def test_what_is_deferred_raises_at_the_end_and_a_second_signal_at_once(stopper: Stopper) -> None:
    seen: list[int] = []

    def work(number: int) -> None:
        with deferred():
            os.kill(os.getpid(), number)
            seen.append(stopping.asked())

    with pytest.raises(Stopped):
        work(signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    with pytest.raises(Stopped):
        work(signal.SIGINT)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["list"], "nothing of it is kept, and the same command begins anew"),
        (["run", "tour", "dry=true"], "nothing of it is kept, and the same command begins anew"),
        (["run", "tour"], "the same command continues from the last checkpoint"),
    ],
    ids=" ".join,
)
def test_what_is_kept_is_told(
    words: list[str], kept: str, tmp_path: Path, monkeypatch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    def stops(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(commands.COMMANDS, "list", stops)
    monkeypatch.setattr(commands, "tell_ahead", stops)
    assert main(words) == 128 + signal.SIGINT
    assert capfd.readouterr().err == f"vitnas: stopped; {kept}.\n"


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with working():
        assert stopping.current() is not None
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("kind", "is_told"), [(Stopped, False), (KeyError, True)])
def test_what_a_library_notes_of_a_stop_is_not_shown(
    kind: type[BaseException], is_told: bool, stopper: Stopper, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lets it through, and tells its log of it, with a traceback, which nobody may have set up."""
    assert logging.lastResort is not None
    found = (kind, kind("on its way"), None)
    logging.lastResort.handle(logging.LogRecord("pool", logging.ERROR, "", 1, "closing", None, found))
    assert ("on its way" in capsys.readouterr().err) == is_told


class HalfMade:
    """Another thing that was not made to its end."""

    def __del__(self) -> None:
        self.parts.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "is_told"), [(_MultiProcessingDataLoaderIter, False), (HalfMade, True)])
def test_a_loader_that_is_half_made_is_told_by_what_stopped_it_alone(
    kind: type, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers could not be started, which has a sentence; its finaliser would add a traceback."""
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: told.append(what.exc_type))
    with working():
        kind.__new__(kind)
        gc.collect()
    assert told == [AttributeError] * is_told


SWALLOWS = """
import importlib.util, sys, time
sys.argv[0] = "vitnas"
spec = importlib.util.spec_from_file_location("stopping", {path!r})  # alone, as torch takes seconds
stopping = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stopping)
stopping.GRACE_S, stopping.AGAIN_S = {grace}, 0.2
stopping.listen()
with stopping.working() as stopper:
    stopper.works = True
    try:
        print("ready", flush=True)
        {body}
    except stopping.Stopped:
        sys.exit(stopper.tell())
"""


@pytest.mark.parametrize(
    ("body", "grace"),
    [
        ("\n        try: time.sleep(60)\n        except BaseException: pass\n        time.sleep(60)", 20),
        (
            "import ctypes; ctypes.PyDLL(None).usleep(100); ctypes.CDLL(None).sleep(9) or ctypes.CDLL(None).sleep(60)",
            1,
        ),
        (
            "\n        class Slow:\n            __del__ = lambda self: time.sleep(60)\n"
            "        Slow()\n        time.sleep(60)",
            20,
        ),
    ],
    ids=["a library swallows it", "compiled code does not come back", "a finaliser cannot raise"],
)
def test_nothing_swallows_it(body: str, grace: float) -> None:
    """Code that catches all; and C that goes on sleeping, as a signal only ends its first sleep."""
    process = subprocess.Popen(
        [sys.executable, "-c", SWALLOWS.format(body=body, grace=grace, path=stopping.__file__)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143, said
    assert said.count("stopped by SIGTERM") == 1
    assert "Traceback" not in said
    assert time.monotonic() - begun < 8
