"""Optuna's tables in a handful of statements a trial, where its mapper of objects takes thirty and most of the time."""

from __future__ import annotations

import copy
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property, partial, wraps
from importlib import import_module
from typing import Any

import sqlalchemy as sql
from optuna.distributions import distribution_to_json
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from vitnas.errors import UserError
from vitnas.runs import parse_json
from vitnas.searching.passwords import reason
from vitnas.searching.trial import MADE

logger = logging.getLogger(__name__)

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)
_STUDIES: Any = models.StudyModel.__table__
_TRIALS: Any = models.TrialModel.__table__
_ATTRS: Any = models.TrialUserAttributeModel.__table__
_SYSTEM: Any = models.TrialSystemAttributeModel.__table__
_PARAMS: Any = models.TrialParamModel.__table__
_VALUES: Any = models.TrialValueModel.__table__
# Optuna's tables as the statements here know them. Where another version has others, all goes Optuna's own way.
LAYOUT = {
    _STUDIES: "study_id study_name",
    _TRIALS: "trial_id number study_id state datetime_start datetime_complete",
    _ATTRS: "trial_user_attribute_id trial_id key value_json",
    _SYSTEM: "trial_system_attribute_id trial_id key value_json",
    _PARAMS: "param_id trial_id param_name param_value distribution_json",
    _VALUES: "trial_value_id trial_id objective value value_type",
}

# For PostgreSQL. What makes a trial is sent together: whoever does keeps all others waiting while the server works.
_LOOK = """
SELECT t.trial_id, t.number, t.state::text, t.datetime_start, t.datetime_complete, a.key, a.value_json
FROM trials t LEFT JOIN trial_user_attributes a ON a.trial_id = t.trial_id
WHERE t.study_id = %(study)s AND t.trial_id > %(after)s
UNION ALL
SELECT t.trial_id, t.number, t.state::text, t.datetime_start, t.datetime_complete, a.key, a.value_json
FROM trials t LEFT JOIN trial_user_attributes a ON a.trial_id = t.trial_id AND a.key <> %(made)s
WHERE t.trial_id = ANY(%(unfinished)s::int[]) AND (t.state NOT IN ('RUNNING', 'WAITING') OR a.key IS NOT NULL)
ORDER BY 1
"""
_LOCK = "SELECT study_id FROM studies WHERE study_id = %(study)s FOR UPDATE"
_MAKE = """
WITH made AS (
  INSERT INTO trials (number, study_id, state, datetime_start)
  SELECT coalesce((SELECT number + 1 FROM trials WHERE study_id = %(study)s ORDER BY trial_id DESC LIMIT 1), 0),
         %(study)s, %(state)s::trialstate, %(start)s::timestamp
  RETURNING trial_id, number),
own AS (
  INSERT INTO trial_user_attributes (trial_id, key, value_json)
  SELECT trial_id, k, v FROM made, json_each_text(%(own)s::json) AS given (k, v)),
system AS (
  INSERT INTO trial_system_attributes (trial_id, key, value_json)
  SELECT trial_id, k, v FROM made, json_each_text(%(system)s::json) AS given (k, v)),
params AS (
  INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
  SELECT trial_id, param_name, param_value, distribution_json
  FROM made, json_to_recordset(%(params)s::json)
    AS given (param_name text, param_value float8, distribution_json text))
SELECT trial_id, number FROM made
"""
_FINISH = """
WITH ended AS (
  UPDATE trials SET state = %(state)s::trialstate, datetime_complete = %(end)s::timestamp
  WHERE trial_id = %(trial)s AND state IN ('RUNNING', 'WAITING')
  RETURNING trial_id),
own AS (
  INSERT INTO trial_user_attributes (trial_id, key, value_json)
  SELECT trial_id, k, v FROM ended, json_each_text(%(own)s::json) AS given (k, v)
  ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json),
told AS (
  INSERT INTO trial_values (trial_id, objective, value, value_type)
  SELECT trial_id, o - 1, v, t::trialvaluetype
  FROM ended, unnest(%(values)s::float8[], %(types)s::text[]) WITH ORDINALITY AS given (v, t, o))
SELECT trial_id FROM ended
"""


class Database(RDBStorage):
    """An SQLite file or a PostgreSQL database, as Optuna lays it out; any other database goes Optuna's own way."""

    @cached_property
    def is_lean(self) -> bool:
        """Whether this is a database whose statements are known here."""
        is_known = all(columns.split() == table.columns.keys() for table, columns in LAYOUT.items())
        return is_known and str(self.engine.name) in ("sqlite", "postgresql")

    def changed(self, study_id: int, after: int, unfinished: Collection[int]) -> list[FrozenTrial]:
        """The trials made after the trial of id `after`, and of the ids `unfinished` those that changed, by number.

        Each has its state, times (in UTC, as stored) and user attributes, those of `unfinished` without what never
        changes (`MADE`): what a Study reads. Parameters, values and constraints are for other programs. A trial has
        changed where it ended or its lease was renewed, which may have been seen before.
        """
        if not self.is_lean:
            every = self.get_all_trials(study_id, deepcopy=False)
            return [each for each in every if each._trial_id > after or each._trial_id in unfinished]
        given = {"study": study_id, "after": after, "unfinished": list(unfinished)}
        array = f"{{{','.join(map(str, unfinished))}}}"
        rows: Sequence[Any] | None = self._at_once(_LOOK, given={**given, "unfinished": array, "made": MADE})
        if rows is None:
            with self._connected(writes=False) as connection:
                halves = self._look if unfinished else self._look[1:]
                rows = [row for half in halves for row in connection.execute(half, given)]
        found: dict[int, FrozenTrial] = {}
        for trial_id, number, state, start, end, key, text in rows:
            if trial_id not in found:
                state = TrialState[state] if isinstance(state, str) else state
                found[trial_id] = FrozenTrial(
                    number=number, state=state, value=None, datetime_start=start, datetime_complete=end,
                    params={}, distributions={}, user_attrs={}, system_attrs={}, intermediate_values={},
                    trial_id=trial_id,
                )  # fmt: skip
            if key is not None:
                found[trial_id].user_attrs[key] = parse_json(text)
        return list(found.values())

    def finish(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """End an unfinished trial in one transaction.

        Raises:
            UpdateFinishedTrialError: it has ended.
        """
        if not self.is_lean:
            for name, value in (attrs or {}).items():
                self.set_trial_user_attr(trial_id, name, value)
            self.set_trial_state_values(trial_id, state, values)
            return
        given = self._at_once(_FINISH, given=_ended(trial_id, state, values or (), attrs or {}))
        if given is not None:
            if not given:
                raise UpdateFinishedTrialError(f"trial {trial_id} has ended")
            return
        with self._connected(writes=True) as connection:
            ended = connection.execute(
                sql.update(_TRIALS)
                .where(_TRIALS.c.trial_id == trial_id, _TRIALS.c.state.in_(UNFINISHED))
                .values(state=state, datetime_complete=datetime.now(UTC).replace(tzinfo=None))
            )
            if not ended.rowcount:
                raise UpdateFinishedTrialError(f"trial {trial_id} has ended")
            if attrs:
                connection.execute(self._set_attr, _rows(trial_id, attrs))
            if values is not None:
                stored = map(models.TrialValueModel.value_to_stored_repr, values)
                connection.execute(
                    sql.insert(_VALUES),
                    [
                        {"trial_id": trial_id, "objective": place, "value": value, "value_type": kind}
                        for place, (value, kind) in enumerate(stored)
                    ],
                )

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        if not self.is_lean or template_trial is None or template_trial.state not in UNFINISHED:
            return super()._create_new_trial(study_id, template_trial)
        made = self._at_once(_LOCK, _MAKE, given={"study": study_id, **_made_of(template_trial)})
        if made:
            return _named(template_trial, *made[0])
        with self._connected(writes=True) as connection:
            # One worker at a time from here on, so that numbers and ids rise in the order in which trials are seen.
            # (SQLite has no such lock; there the first write is one.)
            connection.execute(
                sql.select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == study_id).with_for_update()
            )
            result = connection.execute(self._make, {"study": study_id, **_begun(template_trial)})
            trial_id = int((result.inserted_primary_key or (0,))[0])
            number = connection.execute(
                sql.select(_TRIALS.c.number).where(_TRIALS.c.trial_id == trial_id)
            ).scalar_one()
            for table, given in ((_ATTRS, template_trial.user_attrs), (_SYSTEM, template_trial.system_attrs)):
                if given:
                    connection.execute(sql.insert(table), _rows(trial_id, given))
            if template_trial.params:
                connection.execute(sql.insert(_PARAMS), _params(trial_id, template_trial))
        return _named(template_trial, trial_id, number)

    def _at_once(self, *statements: str, given: Mapping[str, Any]) -> list[tuple[Any, ...]] | None:
        """The rows that the last of some statements gives: one transaction, one way to the server and back.

        None where the driver cannot do that.
        """
        if self.engine.driver != "psycopg" or not self.engine.dialect.loaded_dbapi.Pipeline.is_supported():
            return None
        with self._connected(writes=False) as connection:
            raw: Any = connection.connection.driver_connection
            try:
                if len(statements) == 1:
                    return list(raw.execute(*statements, given).fetchall())
                with raw.pipeline(), raw.transaction():
                    for statement in statements:
                        cursor = raw.execute(statement, given)
                return list(cursor.fetchall())
            except connection.dialect.loaded_dbapi.OperationalError as error:
                connection.invalidate(error)
                raise StorageInternalError("a statement of the search was refused") from error

    @cached_property
    def _reader(self) -> sql.Engine:
        return self.engine.execution_options(isolation_level="AUTOCOMMIT")

    @cached_property
    def _look(self) -> tuple[sql.Select[Any], sql.Select[Any]]:
        """The halves of `_LOOK`, apart, as each goes by an index: it costs the same in a long search."""
        named = ("trial_id", "number", "state", "datetime_start", "datetime_complete")
        columns = (*(_TRIALS.c[name] for name in named), _ATTRS.c.key, _ATTRS.c.value_json)

        def of(on: sql.ColumnElement[bool]) -> sql.Select[Any]:
            joined = _TRIALS.outerjoin(_ATTRS, (_ATTRS.c.trial_id == _TRIALS.c.trial_id) & on)
            return sql.select(*columns).select_from(joined).order_by(_TRIALS.c.trial_id)

        changed = of(_ATTRS.c.key != MADE).where(
            _TRIALS.c.trial_id.in_(sql.bindparam("unfinished", expanding=True)),
            _TRIALS.c.state.not_in(UNFINISHED) | _ATTRS.c.key.is_not(None),
        )
        new = of(sql.true()).where(
            _TRIALS.c.study_id == sql.bindparam("study"), _TRIALS.c.trial_id > sql.bindparam("after")
        )
        return changed, new

    @cached_property
    def _make(self) -> sql.Insert:
        """A trial whose number is one more than that of the newest."""
        newest = (
            sql.select(_TRIALS.c.number + 1)
            .where(_TRIALS.c.study_id == sql.bindparam("study"))
            .order_by(_TRIALS.c.trial_id.desc())
            .limit(1)
            .scalar_subquery()
        )
        return sql.insert(_TRIALS).values(
            study_id=sql.bindparam("study"), number=sql.func.coalesce(newest, 0)
        )

    @cached_property
    def _set_attr(self) -> Any:
        """An attribute, in place of an earlier one of its name."""
        insert = import_module(f"sqlalchemy.dialects.{self.engine.name}").insert(_ATTRS)
        return insert.on_conflict_do_update(
            index_elements=["trial_id", "key"], set_={"value_json": insert.excluded.value_json}
        )

    @contextmanager
    def _connected(self, writes: bool) -> Iterator[sql.Connection]:
        """A connection; a transaction where something is written, as its begin and end are round trips of their own."""
        try:
            with self.engine.begin() if writes else self._reader.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise StorageInternalError("a statement of the search was refused") from error


def _named(template: FrozenTrial, trial_id: int, number: int) -> FrozenTrial:
    trial = copy.copy(template)
    trial._trial_id, trial.number = trial_id, number
    return trial


def _made_of(trial: FrozenTrial) -> dict[str, Any]:
    """What `_MAKE` asks for."""
    return {
        "state": trial.state.name,
        "start": _begun(trial)["datetime_start"],
        "own": _texts(trial.user_attrs),
        "system": _texts(trial.system_attrs),
        "params": json.dumps(_params(0, trial)),
    }


def _texts(attrs: Mapping[str, Any]) -> str:
    """Attributes as JSON of JSON texts, as they are stored; one text goes to the driver faster than an array."""
    return json.dumps({key: json.dumps(value) for key, value in attrs.items()})


def _ended(
    trial_id: int, state: TrialState, values: Sequence[float], attrs: Mapping[str, Any]
) -> dict[str, Any]:
    """What `_FINISH` asks for."""
    stored = [models.TrialValueModel.value_to_stored_repr(value) for value in values]
    return {
        "trial": trial_id,
        "state": state.name,
        "end": datetime.now(UTC).replace(tzinfo=None),
        "own": _texts(attrs),
        "values": [value for value, _ in stored],
        "types": [kind.name for _, kind in stored],
    }


def _rows(trial_id: int, attrs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()
    ]


def _params(trial_id: int, trial: FrozenTrial) -> list[dict[str, Any]]:
    return [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": trial.distributions[name].to_internal_repr(value),
            "distribution_json": distribution_to_json(trial.distributions[name]),
        }
        for name, value in trial.params.items()
    ]


def _begun(trial: FrozenTrial) -> dict[str, Any]:
    start = trial.datetime_start
    return {"state": trial.state, "datetime_start": start and start.astimezone(UTC).replace(tzinfo=None)}


PATIENCE_S = 600.0
_WAIT_S = (0.5, 15.0)  # the first and the longest


class PatientDatabase(Database):
    """A database that may go away for a while, as one that is restarted does: calls wait for it, longer and longer.

    What was written before the answer was lost is written once more. That changes nothing but for a new trial, of
    which there may be two with one token; `Study` drops the second.

    Raises:
        UserError: it did not come back within `PATIENCE_S`.
    """

    def __init__(self, url: str, name: str) -> None:
        self._name, self._outage = name, threading.Lock()
        self._said = False
        for each in ("optuna.storages._rdb", "psycopg"):  # they would tell of each call
            logging.getLogger(each).setLevel(logging.ERROR)
        # One connection a worker, and one for the thread that renews its lease now and then. Made anew in time, as what
        # stands between here and a database may forget one that was idle; a call that finds it gone is made again.
        super().__init__(url, engine_kwargs={"pool_size": 1, "max_overflow": 1, "pool_recycle": 240})

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
    method = getattr(Database, name)

    @wraps(method)
    def call(self: PatientDatabase, *args: Any, **options: Any) -> Any:
        return self.wait_for(partial(method, self, *args, **options))

    return call


for _name in (
    "_create_new_trial",
    "_get_trials",
    "changed",
    "create_new_study",
    "finish",
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
    setattr(PatientDatabase, _name, _waiting(_name))


def is_outage(error: BaseException | None) -> bool:
    """Whether a database was not there, or gave up a transaction that may be tried again."""
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}  # SQLAlchemy's, or the driver's own
        if kinds & {"OperationalError", "InterfaceError", "PendingRollbackError"}:
            return True
        error = error.__cause__
    return False
