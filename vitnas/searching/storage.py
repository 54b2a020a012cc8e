"""Where a Study is kept: an SQLite file, any database Optuna knows by URL, or a journal file."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import socket
import sqlite3
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from vitnas.errors import HANDLES, MissingExtra, UserError, lacks_handles
from vitnas.searching.goal import Goal, Objective
from vitnas.searching.passwords import PASSWORD, reason, shown

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
        from vitnas.searching.database import Database, PatientDatabase  # here, as SQLAlchemy takes a while

        if text.startswith("journal:"):
            path = Path(text.removeprefix("journal:"))
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(path)))
        if "://" in text and not text.startswith("sqlite:"):
            return PatientDatabase(_with_password(text), shown(text))
        path = Path(text.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_is_ours(path)
        options = {"connect_args": {"timeout": 60, "factory": _WalConnection}}
        return Database(f"sqlite:///{path}", engine_kwargs=options)
    except ImportError as error:
        if "postgres" in text:
            raise MissingExtra(f"storage {text.partition(':')[0]}", "postgres") from error
        raise UserError(f"storage {shown(text)} needs a database driver ({error}); install it.") from error
    except UserError:
        raise
    except Exception as error:
        if lacks_handles(error) or _has_few_handles():
            raise UserError(HANDLES) from None
        raise UserError(
            f"storage {shown(text)} cannot be opened ({reason(error)}); it must be a writable path, "
            "'journal:path' or a database URL that Optuna takes. Mend it."
        ) from None  # what caused it may hold the whole URL


def _with_password(text: str) -> str:
    """A database's URL, with the password of the environment where it has none."""
    # SQLAlchemy takes a bare postgresql:// for psycopg2; the extra `postgres` brings psycopg 3.
    from sqlalchemy import make_url  # here, too

    url = make_url(text.replace("postgresql://", "postgresql+psycopg://", 1))
    if url.password is None and PASSWORD in os.environ:
        url = url.set(password=os.environ[PASSWORD])
    return url.render_as_string(hide_password=False)


def _has_few_handles() -> bool:
    """Whether no four files more can be opened: SQLite needs three, and tells that as it tells any other reason."""
    with contextlib.ExitStack() as stack:
        try:
            for _ in range(4):
                stack.enter_context(open(os.devnull))
        except OSError as error:
            return lacks_handles(error)
    return False


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


@runtime_checkable
class Lean(Protocol):
    """A storage that reads and ends trials in fewer steps than Optuna's interface asks for."""

    def changed(self, study_id: int, after: int, unfinished: Collection[int]) -> list[FrozenTrial]:
        """The trials made after that of id `after`, and of the ids `unfinished` those that changed, without `MADE`."""

    def finish(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None, attrs: Mapping[str, Any]
    ) -> None:
        """End an unfinished trial, all or nothing."""


def finish(
    storage: BaseStorage,
    trial_id: int,
    state: TrialState,
    values: Sequence[float] | None,
    attrs: Mapping[str, Any],
) -> None:
    """End a trial of any storage.

    Raises:
        UpdateFinishedTrialError: it has ended.
    """
    if isinstance(storage, Lean):
        storage.finish(trial_id, state, values, attrs)
        return
    for name, value in attrs.items():
        storage.set_trial_user_attr(trial_id, name, value)
    storage.set_trial_state_values(trial_id, state, values)


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
            if lacks_handles(error) or _has_few_handles():
                raise UserError(HANDLES) from None
            raise UserError(
                f"storage {shown(storage)} cannot be used ({reason(error)}); it must be a whole study that vitnas "
                "wrote. Mend that, or give another storage."
            ) from None
    raise AssertionError("not reached")


def check_identity(study: optuna.Study, goal: Goal, seed: int) -> None:
    """Write down what a new Study searches; refuse to go on with an old one that searched something else."""
    space_json = json.dumps(goal.space.to_json(), sort_keys=True)
    mine = {
        "space": f"{goal.space.name}-{hashlib.sha256(space_json.encode()).hexdigest()[:12]}",
        "budget": goal.budget.text,
        "objectives": ", ".join(f"{o.name} ({o.direction})" for o in goal.objectives),
        "seed": seed,
    }
    stored = study.user_attrs.get("vitnas")
    if stored is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("vitnas", mine)
        return
    if not isinstance(stored, dict):
        raise UserError(
            f"study {study.study_name!r} was made by another program; vitnas searches in its own. Give another storage "
            "or study name."
        )
    for name, value in mine.items():
        if stored.get(name) != value:
            raise UserError(
                f"{name} is {value!r}; study {study.study_name!r} was made with {stored.get(name)!r}. "
                "Give the same, or another study name."
            )


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


@functools.cache
def this_process(pid: int) -> dict[str, Any]:
    """What a lease says of the process that runs this, by its number: a fork is another one."""
    return {"host": this_host(), "pid": pid, "start": started(pid)}


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=this_process.cache_clear)  # numbers are used again


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
