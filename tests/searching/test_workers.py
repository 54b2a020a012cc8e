"""Processes that are really killed: a resumed search equals an uninterrupted one; workers share one Study."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import search_help
from search_help import BUDGET, MICRO, evolution, score, told

from vitnas.searching import Study, search
from vitnas.searching.storage import is_alive, started


def in_fork(work: Callable[[], None]) -> int:
    """Run `work` in a copy of this process (no imports to repeat); the caller waits for it."""
    with warnings.catch_warnings():
        # Python warns that threads do not survive a fork; the child computes with numpy alone.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_a_search_killed_and_resumed_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = search(Study.open(MICRO, BUDGET), score, searcher=evolution(), num_trials=30)
    path = str(tmp_path / "study.db")
    script = [sys.executable, search_help.__file__, path, "30", "13", "0"]
    # Another hash seed, so that an order that hangs on it would show.
    killed = subprocess.run(script, env={**os.environ, "PYTHONHASHSEED": "7"}, timeout=200, check=False)
    assert killed.returncode == -signal.SIGKILL
    with Study.open(MICRO, BUDGET, storage=path) as halfway:
        assert len(halfway.scored()) == 13
        assert halfway.num_running() == 1
        lost = next(trial for trial in halfway.trials() if trial.state == "running")
        assert lost.arch.id == Path(path + ".dying").read_text()
    resumed = search(Study.open(MICRO, BUDGET, storage=path), score, searcher=evolution(), num_trials=30)
    with resumed:
        assert told(resumed) == told(whole)
        assert resumed.best().arch == whole.best().arch
        again = [trial for trial in resumed.trials() if trial.genes == lost.genes]
        assert [(trial.state, trial.proposal) for trial in again] == [("scored", lost.proposal)]
        assert again[0].number > lost.number


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_workers_share_a_study_and_a_dead_ones_trial_is_run_again(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / "study.db") if kind == "sqlite" else f"journal:{tmp_path / 'study.log'}"
    dying_file = Path(path.removeprefix("journal:") + ".dying")
    pids = [in_fork(lambda: search_help.main(path, 40, 3, 0.005))]
    while not dying_file.exists():  # the others could be through before it has had three
        time.sleep(0.005)
    pids += [in_fork(lambda: search_help.main(path, 40, -1, 0.005)) for _ in range(2)]
    assert [status(pid) for pid in pids] == [-signal.SIGKILL, 0, 0]

    with Study.open(MICRO, BUDGET, storage=path) as study:
        trials = study.trials()
        scored = study.scored()
        assert len(scored) == 40
        assert len({trial.number for trial in trials}) == len(trials)
        assert len({trial.genes for trial in trials}) == len(trials)
        assert study.num_running() == 0
        dead = dying_file.read_text()
        assert [trial.state for trial in trials if trial.arch.id == dead] == ["scored"]
        rows = study._study.get_trials(deepcopy=False)
        complete = [row for row in rows if row.state == optuna.trial.TrialState.COMPLETE]
        assert len(complete) == 40
        workers = {row.user_attrs["trial"]["lease"]["worker"] for row in complete}
        assert len(workers) == 3
        retries = [
            row for row in rows if "retry_of" in row.user_attrs["trial"] and "dropped" not in row.user_attrs
        ]
        assert len(retries) == 1


def test_the_last_worker_waits_for_the_others_and_takes_over(tmp_path: Path) -> None:
    """One worker dies on the very last trial while the other has nothing left to ask."""
    path = str(tmp_path / "study.db")

    def last() -> None:
        with Study.open(MICRO, BUDGET, storage=path) as study:
            assert study.ask(evolution(), limit=1) is not None
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)

    Study.open(MICRO, BUDGET, storage=path).close()
    dying = in_fork(last)
    while True:
        with Study.open(MICRO, BUDGET, storage=path) as study:
            if study.num_running() == 1:
                break
        time.sleep(0.05)

    def other() -> None:
        search_help.main(path, 1, -1, 0.0)

    waiting = in_fork(other)
    assert status(dying) == -signal.SIGKILL
    assert status(waiting) == 0
    with Study.open(MICRO, BUDGET, storage=path) as study:
        assert [(trial.state, trial.proposal, trial.number) for trial in study.trials()] == [("scored", 0, 1)]


def test_a_process_is_named_by_its_number_and_its_start() -> None:
    mine = started(os.getpid())
    assert mine
    assert is_alive(os.getpid(), mine)
    assert not is_alive(os.getpid(), str(int(mine) - 1)), "the number was used again"
    assert is_alive(os.getpid(), "")
    child = in_fork(lambda: time.sleep(60))
    start = started(child)
    assert is_alive(child, start)
    os.kill(child, signal.SIGKILL)
    while started(child):  # dead, but not yet waited for: a zombie still has its number
        time.sleep(0.01)
    assert is_alive(child, "")
    assert not is_alive(child, start)
    status(child)
