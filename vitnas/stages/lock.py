"""A run folder has one writer: `run.lock` says which process, on which host, and stale ones are recognised.

The file is locked (by POSIX, so that a fork does not hold it too), which ends with the process however that ends. Where
a file system has no such locks, or keeps them to one host, what the file says counts: a process of this host is looked
up, and one of another host is alive as long as it touches the file, by the file system's own clock, so that clocks of
hosts need not agree.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vitnas.errors import UserError
from vitnas.runs import RunFile, check_there, from_json, parse_json, to_json, writing
from vitnas.searching.storage import is_alive, started, this_host

try:
    import fcntl
except ImportError:  # Windows: what the file says has to do
    fcntl = None  # type: ignore[assignment]

TOUCH_S = 30.0
STALE_S = 600.0  # of a host that cannot be asked


@dataclass(frozen=True)
class Holder(RunFile):
    """Who writes to a run folder: a process by its host, its number and when it began."""

    FILE = "run.lock"

    host: str
    pid: int
    start: str


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes to `folder`, which is made; what was made goes again if it stays empty.

    Raises:
        UserError: another process does (which, and where), the folder cannot be written, or it was removed meanwhile.
            One that holds a run may be looked at where nothing can be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    path = Holder.path(folder)
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = _open(path)
        except OSError as error:
            if (
                error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM)
                or not (folder / "run.yaml").exists()
            ):
                raise
            handle = -1
    if handle < 0:
        yield
        return
    check = check_there(folder)
    over = threading.Event()
    thread = threading.Thread(target=_touch, args=(handle, over), name="vitnas-lock", daemon=True)
    thread.start()
    try:
        yield
        check()
    finally:
        over.set()
        thread.join()
        with suppress(OSError):
            path.unlink()
        os.close(handle)
        with suppress(OSError):
            for each in made:
                each.rmdir()


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for the other processes that are in this block on `folder`; where its file system cannot lock, all go on."""
    handle = -1
    with suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):
            os.close(handle)


def _open(path: Path) -> int:
    """The locked file, which says whose it is."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = not _lock(handle)
            if not held and not _is_at(handle, path):  # its owner took it away meanwhile
                os.close(handle)
                continue
            other = _said(handle)
            if held or _lives(other, path):
                raise UserError(_refusal(path, other))
            mine = Holder(this_host(), os.getpid(), started(os.getpid()))
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps(to_json(mine)).encode(), 0)
            return handle
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise


def _lock(handle: int) -> bool:
    """Whether this process has the lock now, or the file system knows no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _is_at(handle: int, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _said(handle: int) -> Holder | None:
    """What the file says; None where that is nothing."""
    with suppress(OSError, ValueError):
        return from_json(Holder, parse_json(os.pread(handle, 4096, 0)))
    return None


def _lives(other: Holder | None, path: Path) -> bool:
    """Whether the process that the file names still writes to the folder."""
    if other is None:
        return False
    if other.host == this_host():
        return other.pid != os.getpid() and is_alive(other.pid, other.start)
    with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent) as now:
        return os.stat(now.name).st_mtime - path.stat().st_mtime < STALE_S


def _refusal(path: Path, other: Holder | None) -> str:
    who = "another process" if other is None else f"process {other.pid} on {other.host.partition('/')[0]}"
    return (
        f"{path.parent} is in use by {who}; a run folder has one writer. Wait for it or end it, take another "
        f"folder=PATH, or join its search by `vitnas search {path.parent}`."
    )


def _touch(handle: int, over: threading.Event) -> None:
    """Show other hosts that this process lives."""
    while not over.wait(TOUCH_S):
        with suppress(OSError):
            os.utime(handle)
