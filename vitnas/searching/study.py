"""The record of a search: Trials asked, told and rejected, in an Optuna storage that several workers may share.

A Trial is created in one transaction, genes included. Whoever has the lower trial number owns an Arch: a worker
that finds its Arch under a lower number drops its own Trial and asks again, so that no Arch is scored twice. A
running Trial carries a lease (worker, host, process, end); when the process is gone or the lease has run out, the
next worker to ask closes it and runs the same genes again.

The genes, cost and result are JSON attributes, not Optuna parameters: one parameter per gene would cost about 5 ms
each on SQLite (44 genes: 237 ms instead of 26 ms to create a Trial, measured on a busy 2-core machine), and
optuna-dashboard shows attributes, values and the front all the same.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from vitnas.budget import Budget, Cost
from vitnas.errors import UserError
from vitnas.searching.pareto import front, hypervolume_history
from vitnas.searching.problem import DEFAULT_OBJECTIVES, Objective, Problem, oriented
from vitnas.searching.rows import (
    UNFINISHED,
    ancestors_of,
    check_identity,
    counted,
    is_dead,
    missed,
    num_taken,
    open_study,
    proposal_rng,
    record,
)
from vitnas.searching.storage import started, this_host
from vitnas.searching.trial import NothingLeftError, Searcher, SearchRecord, State, Trial
from vitnas.space import Genes, Space

logger = logging.getLogger(__name__)

LEASE_S = 600.0
MAX_ATTEMPTS = 3  # an Arch whose workers died this often is left as failed

_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "scored",
    TrialState.PRUNED: "rejected",
    TrialState.FAIL: "failed",
}


class Study:
    """Trials of one search. Make it with `Study.open`; close it, or use it as a context manager."""

    def __init__(
        self, study: optuna.Study, storage: BaseStorage, problem: Problem, seed: int, lease_s: float
    ) -> None:
        self.problem, self.seed, self.lease_s = problem, seed, lease_s
        self.worker = uuid.uuid4().hex[:12]
        self._study, self._storage = study, storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._finished: dict[int, Trial] = {}

    @classmethod
    def open(
        cls,
        storage: str | Path | BaseStorage,
        *,
        name: str = "search",
        space: Space,
        budget: Budget | str | None = None,
        objectives: Sequence[Objective] = DEFAULT_OBJECTIVES,
        seed: int = 0,
        lease_s: float = LEASE_S,
    ) -> Study:
        """Open or make a Study.

        Args:
            storage: a path (SQLite), `journal:path`, a database URL, or an Optuna storage.
            name: of the Study inside the storage.
            space: the Space that is searched.
            budget: what an Arch may cost, as a Budget or as text; None for no limits.
            objectives: what to optimise; the first decides `best`.
            seed: of every proposal, together with its number.
            lease_s: seconds after which a Trial that was not touched counts as dead. Clocks of several machines
                must agree to well within this.

        Raises:
            UserError: the storage cannot be opened, or holds this Study with another space, budget, objectives
                or seed.
        """
        budget = Budget.parse(budget) if isinstance(budget, str) else (budget or Budget())
        problem = Problem(space, budget, tuple(objectives))
        if len({o.name for o in objectives}) != len(objectives) or not objectives:
            raise UserError(f"objectives are {[o.name for o in objectives]}; give one or more, each once.")
        opened, study = open_study(storage, name, problem)
        check_identity(study, problem, seed)
        return cls(study, opened, problem, seed, lease_s)

    def ask(self, searcher: Searcher, *, limit: int | None = None) -> Trial | None:
        """The next Trial, running and leased to this worker: first what dead workers left, then a new one.

        Args:
            searcher: proposes the genes, as a function of the history.
            limit: None is returned where so many Trials, over all workers, are scored or running.

        Raises:
            NothingLeftError: the Searcher knows no further Arch within the Budget.
        """
        while True:
            rows = self._rows()
            retry = self._retry_dead(rows)
            if retry is not None:
                return retry
            if limit is not None and num_taken(rows) >= limit:
                return None
            history = self._history(rows)
            index = 1 + max((trial.proposal for trial in history), default=-1)
            genes = searcher.propose(self.problem, history, index, proposal_rng(self.seed, index))
            if genes is None:
                raise NothingLeftError(
                    f"the search has tried {len(history)} Archs; no other was found that meets "
                    f"{self.problem.budget.counted.text or 'an empty budget'}. Widen the budget or the space."
                )
            attrs = {"proposal": index, "generation": searcher.generation(index), "attempt": 1}
            claimed = self._claim(self.problem.space.canonical(genes), attrs, limit)
            if claimed is not None:
                return claimed

    def tell(self, trial: Trial, values: Mapping[str, float], cost: Cost | None = None) -> bool:
        """Record the evaluator's `values` (and the Cost, where latency was measured) of a running Trial.

        Returns:
            False where the Trial's lease was lost meanwhile and another worker runs it again: the values are
            dropped, so that each Arch counts once.

        Raises:
            UserError: a value is missing or not a finite number.
        """
        cost = cost or trial.cost
        scores = {name: float(value) for name, value in values.items()}
        for name, value in scores.items():
            if not abs(value) < float("inf"):
                raise UserError(
                    f"{name} of Arch {trial.arch.id} is {value}; a score must be a finite number."
                )
        numbers = [objective.value(scores, cost) for objective in self.problem.objectives]
        return self._finish(trial, TrialState.COMPLETE, cost, {"values": scores}, numbers)

    def reject(self, trial: Trial, reasons: Sequence[str], cost: Cost | None = None) -> bool:
        """Record that the Trial's Arch misses the Budget, and why. It gets no score.

        Returns:
            False where the lease was lost meanwhile.
        """
        assert reasons, "a rejection needs a reason"
        return self._finish(trial, TrialState.PRUNED, cost or trial.cost, {"reasons": list(reasons)}, None)

    def touch(self, trial: Trial) -> bool:
        """Renew the lease of a running Trial; False where it was lost."""
        return self._set_lease(trial, self.lease_s)

    def release(self, trial: Trial) -> bool:
        """Give a running Trial back: the next worker to ask runs the same Arch again."""
        return self._set_lease(trial, 0.0)

    def trials(self) -> list[Trial]:
        """All Trials by proposal; one that was run again stands there once, as its latest run."""
        return self._history(self._rows())

    def scored(self) -> list[Trial]:
        """The Trials that have values."""
        return [trial for trial in self.trials() if trial.state == "scored"]

    def num_running(self) -> int:
        """Trials that some worker is evaluating."""
        return sum(trial.state == "running" for trial in self.trials())

    def num_rejected(self) -> int:
        """Trials whose Arch missed the Budget."""
        return sum(trial.state == "rejected" for trial in self.trials())

    def front(self) -> list[Trial]:
        """The scored Trials that none beats in all objectives, best in the first objective first."""
        scored = self.scored()
        points = self._points(scored)
        return [scored[place] for place in sorted(front(points), key=lambda i: (*(-points[i]), i))]

    def best(self, budget: Budget | str | None = None) -> Trial:
        """The scored Trial that is best in the first objective, within `budget` (default: the Study's own).

        Equal Trials are told apart by the other objectives, then by age.

        Raises:
            UserError: no scored Trial meets the budget.
        """
        within = Budget.parse(budget) if isinstance(budget, str) else (budget or self.problem.budget)
        scored = self.scored()
        met = [trial for trial in scored if not within.misses(trial.cost)]
        if not met:
            raise UserError(
                f"none of {len(scored)} scored Archs meets the budget {within.text!r}. Search with that budget, "
                "or for longer."
            )
        points = self._points(met)
        return met[min(range(len(met)), key=lambda i: (*(-points[i]), i))]

    def hypervolume(self) -> list[tuple[int, float]]:
        """(scored Trials so far, hypervolume) where it grows; see `pareto.hypervolume_history`."""
        return hypervolume_history(self._points(self.scored()))

    def summary(self) -> SearchRecord:
        """What search.json holds."""
        rows = self._rows()
        trials = [trial for trial in self._history(rows) if trial.state != "running"]
        rejections: dict[str, int] = {}
        for trial in trials:
            for limit in missed(trial, self.problem.budget):
                rejections[limit] = rejections.get(limit, 0) + 1
        scored = [trial for trial in trials if trial.state == "scored"]
        starts = [row.datetime_start for row in rows if row.datetime_start]
        ends = [row.datetime_complete for row in rows if row.datetime_complete]
        return SearchRecord(
            objectives=self.problem.objectives,
            budget=self.problem.budget.text,
            seed=self.seed,
            num_scored=len(scored),
            num_rejected=sum(trial.state == "rejected" for trial in trials),
            rejections=rejections,
            trials=tuple(trial.record() for trial in trials),
            front=tuple(trial.arch.id for trial in self.front()),
            chosen=self.best().arch.id if scored else None,
            hypervolume=tuple(self.hypervolume()),
            seconds=(max(ends) - min(starts)).total_seconds() if ends else 0.0,
        )

    def close(self) -> None:
        """Let go of the storage's connections."""
        backend = cast(Any, self._storage)
        if hasattr(backend, "engine"):
            backend.remove_session()
            backend.engine.dispose()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self) -> list[FrozenTrial]:
        """Every Optuna trial of the Study that was not dropped."""
        rows = self._study.get_trials(deepcopy=False)
        return [row for row in rows if "trial" in row.user_attrs and "dropped" not in row.user_attrs]

    def _history(self, rows: Sequence[FrozenTrial]) -> list[Trial]:
        again = {record(row).get("retry_of") for row in rows}
        latest = [self._trial(row) for row in rows if row.number not in again]
        return sorted(latest, key=lambda trial: (trial.proposal, trial.number))

    def _trial(self, row: FrozenTrial) -> Trial:
        if row.number in self._finished:
            return self._finished[row.number]
        attrs = record(row)
        result = row.user_attrs.get("result", {}) if row.state not in UNFINISHED else {}
        trial = Trial(
            number=row.number,
            proposal=attrs["proposal"],
            genes=tuple(attrs["genes"]),
            space=self.problem.space,
            state=_STATES.get(row.state, "running"),
            cost=Cost(**result.get("cost", attrs["cost"])),
            values=result.get("values", {}),
            reasons=tuple(result.get("reasons", ())),
            generation=attrs.get("generation"),
        )
        if row.state not in UNFINISHED:
            self._finished[row.number] = trial
        return trial

    def _points(self, trials: Sequence[Trial]) -> Any:
        values = [[o.value(trial.values, trial.cost) for o in self.problem.objectives] for trial in trials]
        return oriented(values, self.problem.objectives)

    def _claim(self, genes: Genes, attrs: Mapping[str, Any], limit: int | None) -> Trial | None:
        """Create a running Trial; None where another worker was first with these genes, or took the last place."""
        token = uuid.uuid4().hex
        cost = self.problem.cost(genes)
        shares = self.problem.budget.counted.violations(cost)
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                # One attribute, not ten: each is a statement of its own in the database.
                user_attrs={
                    "trial": {
                        **attrs,
                        "arch": self.problem.space.decode(genes).id,
                        "genes": list(genes),
                        "cost": counted(cost),
                        "token": token,
                        "lease": self._lease(self.lease_s),
                    }
                },
                constraints=shares or None,
            )
        )
        rows = self._rows()
        mine = next(row for row in reversed(rows) if record(row)["token"] == token)
        earlier = [row for row in rows if row.number < mine.number]
        ancestors = ancestors_of(mine, rows)
        reason = None
        if any(row.number not in ancestors and tuple(record(row)["genes"]) == genes for row in earlier):
            reason = "another worker was first with this Arch"
        elif limit is not None and not ancestors and num_taken(earlier) >= limit:
            reason = "another worker took the last place"
        if reason is None:
            return self._trial(mine)
        self._storage.set_trial_user_attr(self._id(mine.number), "dropped", reason)
        self._close_failed(mine.number)
        return None

    def _retry_dead(self, rows: Sequence[FrozenTrial]) -> Trial | None:
        """Close the running Trials of dead workers and start the first of them again."""
        again = {record(row).get("retry_of") for row in rows}
        for row in rows:
            if row.state not in UNFINISHED or not is_dead(row):
                continue
            attempt = record(row)["attempt"]
            if row.number in again:  # the worker that ran it again died before closing it
                self._close_failed(row.number)
            elif attempt >= MAX_ATTEMPTS:
                reason = f"its worker died {attempt} times"
                logger.warning("trial %d is left as failed: %s", row.number, reason)
                self._storage.set_trial_user_attr(self._id(row.number), "result", {"reasons": [reason]})
                self._close_failed(row.number)
            else:
                logger.warning("trial %d lost its worker; the same Arch is run again", row.number)
                kept = {name: record(row)[name] for name in ("proposal", "generation")}
                attrs = {**kept, "attempt": attempt + 1, "retry_of": row.number}
                # The new Trial first: a kill between the two leaves a link that the next worker follows. Where
                # another worker's trial of the same Arch stands in the way, that one may itself be on its way
                # out (it found the dead trial under a lower number): the dead trial stays for the next to ask.
                claimed = self._claim(tuple(record(row)["genes"]), attrs, None)
                if claimed is not None:
                    self._close_failed(row.number)
                    return claimed
        return None

    def _finish(
        self,
        trial: Trial,
        state: TrialState,
        cost: Cost,
        result: Mapping[str, Any],
        numbers: Sequence[float] | None,
    ) -> bool:
        told = {**result, "cost": {**counted(cost), "latency_ms": dict(cost.latency_ms)}}
        trial_id = self._id(trial.number)
        try:
            self._storage.set_trial_user_attr(trial_id, "result", told)
            if cost.latency_ms and self.problem.budget.latency_targets:
                handle = optuna.Trial(self._study, trial_id)
                for limit in self.problem.budget.limits:
                    if limit.quantity == "latency":
                        value = cost.value(limit.quantity, limit.target)
                        handle.set_constraint(str(limit), limit.violation(value))
            self._storage.set_trial_state_values(trial_id, state, numbers)
        except UpdateFinishedTrialError:
            logger.warning("trial %d lost its lease to another worker; its result is dropped", trial.number)
            return False
        return True

    def _set_lease(self, trial: Trial, seconds: float) -> bool:
        try:
            self._storage.set_trial_user_attr(self._id(trial.number), "lease", self._lease(seconds))
        except UpdateFinishedTrialError:
            return False
        return True

    def _lease(self, seconds: float) -> dict[str, Any]:
        until = time.time() + seconds if seconds else 0.0
        pid = os.getpid()
        return {"worker": self.worker, "host": this_host(), "pid": pid, "start": started(pid), "until": until}

    def _close_failed(self, number: int) -> None:
        try:
            self._storage.set_trial_state_values(self._id(number), TrialState.FAIL, None)
        except UpdateFinishedTrialError:
            logger.debug("trial %d was closed by another worker", number)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
