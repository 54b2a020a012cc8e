"""Where a Study is kept: an SQLite file, any database Optuna knows by URL, or a journal file."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import socket
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from vitnas.errors import MissingExtra, UserError, first_line
from vitnas.searching.goal import Objective

logger = logging.getLogger(__name__)

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


PASSWORD = "VITNAS_STORAGE_PASSWORD"
_SECRET = re.compile(r"(://[^:/@?#]*):[^?#]*@|([?&](?:password|passwd|sslpassword)=)[^&#]*", re.IGNORECASE)


def shown(where: object) -> str:
    """A storage as people may see it: without its password."""
    return _SECRET.sub(lambda found: f"{found[1]}:***@" if found[1] else f"{found[2]}***", str(where))


def has_password(where: str) -> bool:
    """Whether a storage's URL holds a password."""
    return shown(where) != where


def open_storage(where: str | Path | BaseStorage) -> BaseStorage:
    """The storage behind a path, a URL or a `journal:` path; an Optuna storage object is taken as it is.

    - a path or `sqlite:///path`: an SQLite file, for workers on one machine (its log does not work over NFS);
    - `journal:path`: Optuna's journal file, also for workers that share a network folder;
    - any other URL, e.g. `postgresql+psycopg://...`: that database, for many workers. Its password comes from the
      environment (VITNAS_STORAGE_PASSWORD, or what the driver reads: PGPASSWORD, ~/.pgpass).

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
            return PatientStorage(_with_password(text), shown(text))
        path = Path(text.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_is_ours(path)
        options = {"connect_args": {"timeout": 60, "factory": _WalConnection}}
        return RDBStorage(f"sqlite:///{path}", engine_kwargs=options)
    except ImportError as error:
        if "postgres" in text:
            raise MissingExtra(f"storage {text.partition(':')[0]}", "postgres") from error
        raise UserError(f"storage {shown(text)} needs a database driver ({error}); install it.") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"storage {shown(text)} cannot be opened ({reason(error)}); it must be a writable path, "
            "'journal:path' or a database URL that Optuna takes. Mend it."
        ) from None  # what caused it may hold the whole URL


def _with_password(text: str) -> str:
    """A database's URL, with the password of the environment where it has none."""
    # SQLAlchemy takes a bare postgresql:// for psycopg2; the extra `postgres` brings psycopg 3.
    from sqlalchemy import make_url  # here, as importing it takes a while

    url = make_url(text.replace("postgresql://", "postgresql+psycopg://", 1))
    if url.password is None and PASSWORD in os.environ:
        url = url.set(password=os.environ[PASSWORD])
    return url.render_as_string(hide_password=False)


def _check_is_ours(path: Path) -> None:
    """Refuse another program's SQLite file, into which Optuna would write its tables."""
    if not path.exists() or not path.stat().st_size:
        return
    with contextlib.closing(
        sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
    ) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")}
    if tables and not tables & {"studies", "version_info", "alembic_version"}:
        raise UserError(
            f"{path} is a database of another program (it has {', '.join(sorted(tables)[:3])}); a study needs a file "
            "of its own. Give another path."
        )


def reason(error: BaseException) -> str:
    """What is behind a storage's error, in a line and without a password."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shown(first_line(getattr(error, "orig", None) or error))


PATIENCE_S = 600.0
_WAIT_S = (0.5, 15.0)  # the first and the longest


class PatientStorage(RDBStorage):
    """A database that may go away for a while, as one that is restarted does: calls wait for it, longer and longer.

    What was written before the answer was lost is written once more. That changes nothing but for a new trial, of
    which there may be two with one token; `Study` drops the second.

    Raises:
        UserError: it did not come back within `PATIENCE_S`.
    """

    def __init__(self, url: str, name: str) -> None:
        self._name, self._outage = name, threading.Lock()
        self._said = False
        logging.getLogger("optuna.storages._rdb").setLevel(logging.ERROR)  # it would tell of each call
        # One connection a worker, and one for the thread that renews its lease now and then.
        super().__init__(url, engine_kwargs={"pool_size": 1, "max_overflow": 1, "pool_pre_ping": True})

    def wait_for(self, call: Callable[[], Any]) -> Any:
        """What `call` gives, when the database is there."""
        begun, pause = time.monotonic(), _WAIT_S[0]
        while True:
            try:
                result = call()
            except Exception as error:
                if not is_outage(error):
                    raise
                if time.monotonic() - begun > PATIENCE_S:
                    raise UserError(
                        f"the database {self._name} has been away for {PATIENCE_S:.0f} s ({reason(error)}); a search "
                        "needs it. Start it, and run the same command again: nothing that was scored is lost."
                    ) from None
                with self._outage:
                    if not self._said:
                        logger.warning(
                            "the database %s is away (%s); waiting for it", self._name, reason(error)
                        )
                    self._said = True
                self.remove_session()  # its transaction is lost
                time.sleep(pause * random.uniform(0.5, 1.0))  # not all workers at once
                pause = min(2 * pause, _WAIT_S[1])
                continue
            if self._said:
                with self._outage:
                    self._said = False
                logger.warning("the database %s is back", self._name)
            return result


def _waiting(name: str) -> Callable[..., Any]:
    method = getattr(RDBStorage, name)

    @wraps(method)
    def call(self: PatientStorage, *args: Any, **options: Any) -> Any:
        return self.wait_for(partial(method, self, *args, **options))

    return call


for _name in (
    "_create_new_trial",
    "_get_trials",
    "create_new_study",
    "get_all_studies",
    "get_study_directions",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_system_attrs",
    "get_study_user_attrs",
    "get_trial",
    "get_trial_id_from_study_id_trial_number",
    "set_study_system_attr",
    "set_study_user_attr",
    "set_trial_state_values",
    "set_trial_system_attr",
    "set_trial_user_attr",
):
    setattr(PatientStorage, _name, _waiting(_name))


def is_outage(error: BaseException | None) -> bool:
    """Whether a database was not there, or gave up a transaction that may be tried again."""
    from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError

    while error is not None:
        if isinstance(error, OperationalError | InterfaceError | PendingRollbackError):
            return True
        error = error.__cause__
    return False


def open_study(
    storage: str | Path | BaseStorage, name: str, objectives: Sequence[Objective]
) -> tuple[BaseStorage, optuna.Study]:
    """Open the storage and the Study; again where another worker is making the same tables just now.

    Raises:
        UserError: as `open_storage`, or what the storage holds cannot be read.
    """
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
            if is_race and attempt < 4:
                time.sleep(0.2 * (attempt + 1))
                continue
            if isinstance(error, UserError) or isinstance(storage, BaseStorage):
                raise
            raise UserError(
                f"storage {shown(storage)} cannot be used ({reason(error)}); it must be a whole study that vitnas "
                "wrote. Mend that, or give another storage."
            ) from None
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
