"""A run folder has one writer; stale locks are recognised; a folder that goes away is noticed."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stage_help import Warm, has_step, refused, words

from vitnas.errors import UserError
from vitnas.searching import SearchRecord
from vitnas.searching.storage import started, this_host
from vitnas.stages import Run, lock
from vitnas.stages.claim import opened
from vitnas.stages.lock import one_at_a_time, one_writer
from vitnas.train import Silent


def test_the_second_of_two_runs_is_told_whose_the_folder_is(
    warm: Warm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a stage of it; what the first does is not touched, and a killed run's lock is none."""
    folder = tmp_path / "run"
    said: list[str] = []

    def second() -> bool:
        if not has_step(folder, "supernet", 1)():
            return False
        said.extend((refused(words(folder, seed="1"), capsys), refused(["train", str(folder)], capsys)))
        return True

    warm.kill_when(words(folder, supernet__epochs="200"), second)
    held = json.loads((folder / "run.lock").read_text())
    for error in said:
        host = this_host().partition("/")[0]
        assert f"{folder} is in use by process {held['pid']} on {host}; a run folder has one writer" in error
    warm.kill_when(words(folder, supernet__epochs="200"), has_step(folder, "supernet", 3))


def test_a_folder_that_was_made_for_a_refused_run_goes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "macs" in refused(words(tmp_path / "a" / "b", budget="macs<=1"), capsys)
    assert not (tmp_path / "a").exists()


def foreign(folder: Path, **changes: object) -> Path:
    """A lock as another process wrote it."""
    folder.mkdir(exist_ok=True)
    path = folder / lock.Holder.FILE
    path.write_text(json.dumps({"host": "elsewhere/pid:[1]", "pid": 7, "start": "1", **changes}))
    return path


def test_locks_of_this_host_count_while_their_process_runs(tmp_path: Path) -> None:
    """Where a file system has no locks: what the file says is looked up."""
    parent = os.getppid()
    foreign(tmp_path, host=this_host(), pid=parent, start=started(parent))
    with pytest.raises(UserError, match=f"in use by process {parent} on"), one_writer(tmp_path):
        pass
    foreign(tmp_path, host=this_host(), pid=parent, start="1")  # its number was used again
    with one_writer(tmp_path):
        assert json.loads((tmp_path / lock.Holder.FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / lock.Holder.FILE).exists()


def test_locks_of_other_hosts_count_while_they_are_touched(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"), one_writer(tmp_path):
        pass
    old = time.time() - lock.STALE_S - 60
    os.utime(path, (old, old))
    with one_writer(tmp_path):
        pass


def test_a_lock_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TOUCH_S", 0.01)
    with one_writer(tmp_path):
        path = tmp_path / lock.Holder.FILE
        os.utime(path, (1, 1))
        end = time.monotonic() + 10
        while path.stat().st_mtime < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert path.stat().st_mtime > 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 3}'])
def test_a_damaged_lock_is_nobodys(tmp_path: Path, text: str) -> None:
    (tmp_path / lock.Holder.FILE).write_text(text)
    with one_writer(tmp_path):
        pass


TAKES = """
import sys
from pathlib import Path
from vitnas.errors import UserError
from vitnas.stages.lock import one_at_a_time, one_writer
taken = 0
while taken < 60:
    try:
        with one_writer(Path(sys.argv[1])):
            with open(sys.argv[1] + ".log", "a") as log:
                log.write("in\\n")
                log.flush()
                log.write("out\\n")
        taken += 1
    except UserError:
        pass
"""


@pytest.mark.slow
def test_never_two_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    many = [subprocess.Popen([sys.executable, "-c", TAKES, str(folder)]) for _ in range(4)]
    assert [each.wait() for each in many] == [0] * 4
    lines = Path(f"{folder}.log").read_text().split()
    assert lines == ["in", "out"] * (4 * 60)


def test_a_folder_removed_while_training_is_noticed(warm: Warm, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def remove() -> bool:
        if has_step(folder, "supernet", 2)():
            folder.rename(
                tmp_path / "gone"
            )  # in one step: emptied file by file it can stay, with what is written meanwhile
            shutil.rmtree(tmp_path / "gone", ignore_errors=True)
            return True
        return False

    process = warm.end_when(words(folder, supernet__epochs="200"), remove, signal.SIGCONT)
    assert process == 2
    said = " ".join(warm.log.read_text().split())
    assert "Traceback" not in said
    # It may have been about to write a file; why that cannot be, each library words in its own way.
    assert f"{folder} was removed or replaced while the run went on" in said or (
        str(folder) in said and "cannot be written (" in said
    )


def test_a_folder_that_cannot_be_written_can_be_looked_at(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run has nothing to write."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))

    def denied(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(lock, "_open", denied)
    with one_writer(folder):
        pass
    (folder / "run.yaml").unlink()
    with pytest.raises(UserError, match="Permission denied"), one_writer(folder):
        pass


def test_one_at_a_time(tmp_path: Path) -> None:
    """The second goes in when the first, another process, is done."""
    holds = f"""
import fcntl, os, time
handle = os.open({str(tmp_path)!r}, os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
print("in", flush=True)
time.sleep(0.3)
"""
    first = subprocess.Popen([sys.executable, "-c", holds], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "in\n"
    begun = time.monotonic()
    with one_at_a_time(tmp_path):
        waited = time.monotonic() - begun
    first.communicate()
    assert waited > 0.1
    with one_at_a_time(tmp_path / "nowhere"):
        pass


@pytest.mark.slow
def test_workers_of_a_search_that_finish_together_all_end_well(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("search.json", "chosen.json", "study.db"):
        (folder / name).unlink()
    for name in ("front", "models", "export"):
        shutil.rmtree(folder / name)
    command = [sys.executable, "-m", "vitnas", "search", str(folder)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [worker.communicate(timeout=200)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, said
    found = SearchRecord.read(folder)
    assert found.num_scored == 6
    assert {path.name for path in (folder / "front").iterdir()} >= set(found.front)


def test_what_is_imported_is_set_aside_while_a_run_works(tmp_path: Path) -> None:
    """From the garbage collector, which has it back in the end; what somebody else set aside stays so."""
    gc.unfreeze()
    try:
        with opened(Run(device="cpu"), tmp_path, Silent()):
            inside = gc.get_freeze_count()
        after = gc.get_freeze_count()
    finally:
        gc.freeze()
    assert (inside > 10_000, after) == (True, 0)
    with opened(Run(device="cpu"), tmp_path, Silent()):
        pass
    assert gc.get_freeze_count() > 10_000
