"""Where a Study is kept: an SQLite file, any database Optuna knows by URL, or a journal file."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sqlite3
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from vitnas.errors import MissingExtra, UserError, first_line
from vitnas.searching.goal import Objective

# What databases say when another process makes the same tables or the same Study at the same moment.
_RACE_WORDS = ("locked", "already exists", "unique constraint", "duplicate")


class _WalConnection(sqlite3.Connection):
    """SQLite with a write-ahead log: readers (a dashboard) do not block the writer, and a commit costs no fsync.

    A killed process loses nothing; only a power cut may lose the last transactions. Measured for one trial without
    parameters on a 2-core machine: 42 ms instead of 96 ms.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA busy_timeout=60000")
        self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


def open_storage(where: str | Path | BaseStorage) -> BaseStorage:
    """The storage behind a path, a URL or a `journal:` path; an Optuna storage object is taken as it is.

    - a path or `sqlite:///path`: an SQLite file, for workers on one machine (its log does not work over NFS);
    - `journal:path`: Optuna's journal file, also for workers that share a network folder;
    - any other URL, e.g. `postgresql+psycopg://...`: that database, for many workers.

    Raises:
        UserError: the storage cannot be opened.
        MissingExtra: the database's driver is not installed.
    """
    if isinstance(where, BaseStorage):
        return where
    text = str(where)
    try:
        if text.startswith("journal:"):
            path = Path(text.removeprefix("journal:"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path)))
        if "://" in text and not text.startswith("sqlite:"):
            # SQLAlchemy takes a bare postgresql:// for psycopg2; the extra `postgres` brings psycopg 3.
            return RDBStorage(text.replace("postgresql://", "postgresql+psycopg://", 1))
        path = Path(text.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"connect_args": {"timeout": 60, "factory": _WalConnection}}
        return RDBStorage(f"sqlite:///{path}", engine_kwargs=options)
    except ImportError as error:
        if "postgres" in text:
            raise MissingExtra(f"storage {text.partition(':')[0]}", "postgres") from error
        raise UserError(f"storage {text} needs a database driver ({error}); install it.") from error
    except Exception as error:
        raise UserError(
            f"storage {text} cannot be opened ({first_line(error)}); it must be a writable path, "
            "'journal:path' or a database URL that Optuna takes. Mend it."
        ) from error


def open_study(
    storage: str | Path | BaseStorage, name: str, objectives: Sequence[Objective]
) -> tuple[BaseStorage, optuna.Study]:
    """Open the storage and the Study; again where another worker is making the same tables just now."""
    directions = [StudyDirection[o.direction.upper()] for o in objectives]
    for attempt in range(5):
        try:
            with quiet():
                opened = open_storage(storage)
                known = {summary.study_name for summary in opened.get_all_studies()}
                if name in known:
                    sampler = optuna.samplers.RandomSampler()
                    return opened, optuna.load_study(study_name=name, storage=opened, sampler=sampler)
                study = optuna.create_study(
                    storage=opened,
                    study_name=name,
                    directions=directions,
                    sampler=optuna.samplers.RandomSampler(),
                    load_if_exists=True,
                )
                study.set_metric_names([objective.name for objective in objectives])
                return opened, study
        except Exception as error:
            is_race = any(word in f"{error} {error.__cause__}".lower() for word in _RACE_WORDS)
            if not is_race or attempt == 4:
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("not reached")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's progress lines and its notes on experimental parts from the user's screen."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        logger.setLevel(level)


def this_host() -> str:
    """The machine, and the process-number space on it: containers may share a host name, not its numbers."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def started(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks; "" if it has ended or the system does not tell.

    Together with the number it names one process, as numbers are used again.
    """
    try:
        # The command's name stands in brackets and may hold anything; state and start time come behind it.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def is_alive(pid: int, start: str) -> bool:
    """Whether the process of that number, begun at `start` (see `started`), still runs on this machine."""
    if start:
        return started(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
