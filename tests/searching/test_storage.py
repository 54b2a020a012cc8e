"""What a storage may be: databases that go away, passwords that nobody sees, files of other programs."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from search_help import BUDGET, MICRO, evolution, score, told
from sqlalchemy.exc import OperationalError

from vitnas.errors import UserError
from vitnas.searching import Study, database, search
from vitnas.searching.database import PatientDatabase
from vitnas.searching.passwords import PASSWORD, has_password, shown
from vitnas.searching.storage import _with_password
from vitnas.stages.run import SearchConfig

URLS = {
    "postgresql://me:secret@host/db": "postgresql://me:***@host/db",
    "postgresql+psycopg://me:se@cr/et@host:5432/db?sslmode=require": (
        "postgresql+psycopg://me:***@host:5432/db?sslmode=require"
    ),
    "mysql+pymysql://host/db?user=me&password=secret&charset=utf8": (
        "mysql+pymysql://host/db?user=me&password=***&charset=utf8"
    ),
    "postgresql://me@host/db": "postgresql://me@host/db",
    "journal:runs/log@home": "journal:runs/log@home",
    "sqlite:///study.db": "sqlite:///study.db",
}


@pytest.mark.parametrize("url", URLS)
def test_a_password_is_not_shown(url: str) -> None:
    assert shown(url) == URLS[url]
    assert has_password(url) == (URLS[url] != url)


def test_a_run_takes_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stand in run.yaml, the manifest and pages."""
    with pytest.raises(UserError, match=f"with a password.* set {PASSWORD}") as refused:
        SearchConfig(storage="postgresql://me:secret@host/db")
    assert "secret" not in str(refused.value)
    assert SearchConfig(storage="postgresql://me@host/db").storage
    monkeypatch.setenv(PASSWORD, "from@where")
    assert _with_password("postgresql://me@host/db") == "postgresql+psycopg://me:from%40where@host/db"
    assert _with_password("mysql+pymysql://me:own@host/db") == "mysql+pymysql://me:own@host/db"


@pytest.mark.parametrize(
    "url", ["nosuch://me:secret@host/db", "mysql://me:secret@", "postgresql://me:secret@[bad"]
)
def test_no_error_shows_a_password(url: str) -> None:
    with pytest.raises(UserError) as refused:
        Study.open(MICRO, storage=url)
    error: BaseException | None = refused.value
    while error is not None:
        assert "secret" not in str(error)
        error = error.__cause__
    assert "***" in str(refused.value) or "pip install" in str(refused.value)


class Flaky(PatientDatabase):
    """An SQLite file that is away for some calls."""

    def __init__(self, path: Path, away: int) -> None:
        super().__init__(f"sqlite:///{path}", str(path))
        self.away, self.calls = away, 0

    def wait_for(self, call: Callable[[], object]) -> object:
        def flaky() -> object:
            self.calls += 1
            if 30 <= self.calls < 30 + self.away:
                raise OperationalError("SELECT", {}, Exception("server closed the connection"))
            return call()

        return super().wait_for(flaky)


def test_optunas_tables_are_as_the_statements_here_know_them() -> None:
    """Where this fails, another Optuna has other tables: trials go its own way, slowly, until `LAYOUT` and the
    statements of `database.py` are put right."""
    for table, columns in database.LAYOUT.items():
        assert table.columns.keys() == columns.split(), table.name
    written = {
        "trial_id",
        "number",
        "study_id",
        "state",
        "datetime_start",
        "datetime_complete",
        "key",
        "value_json",
    }
    written |= {"param_name", "param_value", "distribution_json", "objective", "value", "value_type"}
    for table in database.LAYOUT:
        needed = {c.name for c in table.columns if not (c.nullable or c.primary_key or c.default)}
        assert table.name == "studies" or needed <= written, table.name


def test_tables_that_are_not_known_go_optunas_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("known", "unknown"):
        if name == "unknown":
            table = next(iter(database.LAYOUT))
            monkeypatch.setitem(database.LAYOUT, table, "study_id study_name another")
        with Study.open(MICRO, BUDGET, storage=tmp_path / f"{name}.db") as study:
            assert study._storage.is_lean == (name == "known")  # type: ignore[attr-defined]
            search(study, score, searcher=evolution(), num_trials=4)
            found.append(told(study))
    assert found[0] == found[1]


def test_a_database_that_goes_away_is_waited_for_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database, "_WAIT_S", (0.001, 0.01))
    caplog.set_level(logging.WARNING)
    flaky = Flaky(tmp_path / "study.db", away=6)
    with search(Study.open(MICRO, BUDGET, storage=flaky), score, searcher=evolution(), num_trials=8) as study:
        assert len(study.scored()) == 8
    assert flaky.calls > 36
    assert caplog.text.count("is away (server closed the connection); waiting for it") == 1
    assert caplog.text.count("is back") == 1


def test_a_database_that_stays_away_ends_the_search_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_WAIT_S", (0.001, 0.01))
    monkeypatch.setattr(database, "PATIENCE_S", 0.05)
    flaky = Flaky(tmp_path / "study.db", away=10**9)
    with pytest.raises(UserError, match=r"has been away for 0 s .*nothing that was scored is lost"):
        search(Study.open(MICRO, BUDGET, storage=flaky), score, searcher=evolution(), num_trials=12)


def test_a_trial_that_was_written_twice_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the first write was lost with the connection."""
    with Study.open(MICRO, BUDGET, storage=tmp_path / "study.db") as study:
        add = study._storage.create_new_trial
        monkeypatch.setattr(study._storage, "create_new_trial", lambda *given: (add(*given), add(*given))[1])
        first, second = study.ask(evolution()), study.ask(evolution())
        assert first is not None
        assert second is not None
        assert first.genes != second.genes
        assert [trial.number for trial in study.trials()] == [0, 2]
        assert study.num_running() == 2


def other_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE invoices (id INTEGER)")
        database.commit()


def other_study(path: Path) -> None:
    study = optuna.create_study(
        storage=f"sqlite:///{path}", study_name="search", directions=["maximize", "minimize"]
    )
    study.add_trial(optuna.trial.create_trial(values=[0.5, 1.0]))


def change(path: Path, text: str) -> None:
    """A vitnas study in which one trial's attributes are something else."""
    search(Study.open(MICRO, BUDGET, storage=path), score, searcher=evolution(), num_trials=3).close()
    with closing(sqlite3.connect(path)) as database:
        database.execute(
            "UPDATE trial_user_attributes SET value_json=? WHERE key='trial' AND trial_id=2", (text,)
        )
        database.commit()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another program's database": (other_tables, "is a database of another program .it has invoices"),
    "another program's study": (other_study, "was made by another program"),
    "no JSON": (lambda path: change(path, "gASVDAAAAAAAAACMBGV2aWyULg=="), "cannot be read"),
    "a list": (lambda path: change(path, "[1, 2]"), "trial 1 of the study is not as vitnas writes one"),
    "no genes": (
        lambda path: change(path, '{"proposal": 1}'),
        "trial 1 of the study is not as vitnas writes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_foreign_or_damaged_study_is_one_sentence(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    make, said = DAMAGES[damage]
    make(path)
    with pytest.raises(UserError, match=said):
        Study.open(MICRO, BUDGET, storage=path).trials()
    with closing(sqlite3.connect(path)) as database:
        if damage == "another program's database":
            assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("invoices",)]
        elif damage == "another program's study":
            assert not database.execute("SELECT * FROM study_user_attributes").fetchall()


@pytest.mark.parametrize("text", ["not a journal\n", '{"op_code": 99}\n', "\0\1\2\n", "[]\n"])
def test_a_foreign_journal_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(UserError, match=r"log can.* be "):
        Study.open(MICRO, BUDGET, storage=f"journal:{tmp_path / 'log'}")
