"""Rows of a Study as Optuna keeps them: whose they are, what they repeat, and which search they belong to."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from vitnas.budget import Budget, Cost, Limit
from vitnas.errors import UserError
from vitnas.searching.problem import Problem
from vitnas.searching.storage import is_alive, open_storage, quiet, this_host
from vitnas.searching.trial import Trial

# What databases say when another process makes the same tables or the same Study at the same moment.
_RACE_WORDS = ("locked", "already exists", "unique constraint", "duplicate")

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


def proposal_rng(seed: int, index: int) -> random.Random:
    """The generator of proposal `index`: the same in every process, and after a resume."""
    return random.Random(f"{seed}/{index}")


def record(row: FrozenTrial) -> dict[str, Any]:
    """What `Study` wrote into the row when it was made: proposal, genes, cost, lease and links."""
    value: dict[str, Any] = row.user_attrs["trial"]
    return value


def counted(cost: Cost) -> dict[str, int]:
    """The part of a Cost that is known without measuring."""
    return {"macs": cost.macs, "params": cost.params, "memory_bytes": cost.memory_bytes}


def missed(trial: Trial, budget: Budget) -> list[str]:
    """The text of each limit that a rejected Trial missed; other reasons stand as they are."""
    if trial.state != "rejected":
        return []
    return [str(li) for li in budget.limits if _share(li, trial.cost) > 0] or list(trial.reasons)


def _share(limit: Limit, cost: Cost) -> float:
    """By how much the limit is missed; 0 for a latency that was not measured, as counting decided before."""
    if limit.quantity == "latency" and limit.target not in cost.latency_ms:
        return 0.0
    return limit.violation(cost.value(limit.quantity, limit.target))


def num_taken(rows: Sequence[FrozenTrial]) -> int:
    """Places of a limited search that are taken: scored or running Archs, a run again counting once."""
    again = {record(row).get("retry_of") for row in rows}
    taken = (TrialState.COMPLETE, *UNFINISHED)
    return sum(row.state in taken and row.number not in again for row in rows)


def ancestors_of(mine: FrozenTrial, rows: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of the Trials that this one runs again."""
    links = {row.number: record(row).get("retry_of") for row in rows}
    numbers: set[int] = set()
    number = links[mine.number]
    while number is not None:
        numbers.add(number)
        number = links.get(number)
    return numbers


def is_dead(row: FrozenTrial) -> bool:
    lease = row.user_attrs.get("lease", record(row)["lease"])
    if lease["until"] < time.time():
        return True
    return lease["host"] == this_host() and not is_alive(lease["pid"], lease.get("start", ""))


def open_study(
    storage: str | Path | BaseStorage, name: str, problem: Problem
) -> tuple[BaseStorage, optuna.Study]:
    """Open the storage and the Study; again where another worker is making the same tables just now."""
    directions = [StudyDirection[o.direction.upper()] for o in problem.objectives]
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
                study.set_metric_names([objective.name for objective in problem.objectives])
                return opened, study
        except Exception as error:
            is_race = any(word in f"{error} {error.__cause__}".lower() for word in _RACE_WORDS)
            if not is_race or attempt == 4:
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("not reached")


def check_identity(study: optuna.Study, problem: Problem, seed: int) -> None:
    """Write down what a new Study searches; refuse to go on with an old one that searched something else."""
    space_json = json.dumps(problem.space.to_json(), sort_keys=True)
    mine = {
        "space": f"{problem.space.name}-{hashlib.sha256(space_json.encode()).hexdigest()[:12]}",
        "budget": problem.budget.text,
        "objectives": ", ".join(f"{o.name} ({o.direction})" for o in problem.objectives),
        "seed": seed,
    }
    stored = study.user_attrs.get("vitnas")
    if stored is None:
        study.set_user_attr("vitnas", mine)
        return
    for name, value in mine.items():
        if stored[name] != value:
            raise UserError(
                f"{name} is {value!r}; study {study.study_name!r} was made with {stored[name]!r}. "
                "Give the same, or another study name."
            )
