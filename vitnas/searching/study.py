"""The record of a search: Trials asked, told and rejected, in an Optuna storage that several workers may share.

A Trial is created in one transaction, genes included. Whoever has the lower trial number owns an Arch: a worker
that finds its Arch under a lower number drops its own Trial and asks again, so that no Arch is scored twice. A
running Trial carries a lease (worker, host, process, end); when the process is gone or the lease has run out, the
next worker to ask closes it and runs the same genes again.

The genes, cost and result are JSON attributes, and what counts. For dashboards and other tools the genes that matter
to an Arch are Optuna parameters too (`vitnas.searching.parameters`), written in the same transaction.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from vitnas.budget import Budget, Cost, Limit
from vitnas.errors import UserError, first_line
from vitnas.searching.goal import DEFAULT_OBJECTIVES, Goal, Objective, oriented
from vitnas.searching.ledger import SETTLED, UNFINISHED, Leases, Ledger, made_of
from vitnas.searching.parameters import Parameters
from vitnas.searching.pareto import front, hypervolume_history
from vitnas.searching.storage import Lean, check_identity, finish, open_study, this_process
from vitnas.searching.trial import MADE, History, NothingLeftError, Searcher, SearchRecord, State, Trial
from vitnas.space import Genes, Space

logger = logging.getLogger(__name__)

LEASE_S = 600.0
BREAK_S = 60.0
SECOND = "another worker was first with this Arch"
MAX_ATTEMPTS = 10  # an Arch whose workers died so often is left as failed; fewer may have been killed

_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "scored",
    TrialState.PRUNED: "rejected",
    TrialState.FAIL: "failed",
}


WITHDRAWN = "withdrawn"  # of the Study: trial number -> reasons; a finished trial itself cannot be changed


class Study:
    """Trials of one search. Make it with `Study.open`; close it, or use it as a context manager."""

    def __init__(
        self, study: optuna.Study, storage: BaseStorage, goal: Goal, seed: int, lease_s: float
    ) -> None:
        self.goal, self.seed, self.lease_s = goal, seed, lease_s
        self.worker = uuid.uuid4().hex[:12]
        self._study, self._storage = study, storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._ledger = Ledger(self._trial, len(goal.space.genes))
        self._leases = Leases(lease_s)
        self._num_closed = 0  # trials of dead workers
        self._chance: random.Random = random.SystemRandom()  # of what differs between workers
        self._parameters = Parameters(goal.space)
        self._withdrawn: dict[str, list[str]] = dict(study.user_attrs.get(WITHDRAWN, {}))

    @classmethod
    def open(
        cls,
        space: Space,
        budget: Budget | str | None = None,
        *,
        storage: str | Path | BaseStorage | None = None,
        name: str = "search",
        objectives: Sequence[Objective] = DEFAULT_OBJECTIVES,
        seed: int = 0,
        lease_s: float = LEASE_S,
    ) -> Study:
        """Open or make a Study.

        Args:
            space: the Space that is searched.
            budget: what an Arch may cost, as a Budget or text such as 'macs<=1.3G'; None for no limits.
            storage: a path (SQLite), `journal:path`, a database URL, or an Optuna storage; None keeps the Study in
                memory, gone with the process.
            name: of the Study inside the storage.
            objectives: what to optimise; the first decides `best`.
            seed: of every proposal, together with its number.
            lease_s: seconds after which a Trial that was not touched counts as dead, by this worker's own clock.

        Raises:
            UserError: the storage cannot be opened, or holds this Study with another space, budget, objectives
                or seed.
        """
        budget = Budget.parse(budget) if isinstance(budget, str) else (budget or Budget())
        goal = Goal(space, budget, tuple(objectives))
        if len({o.name for o in objectives}) != len(objectives) or not objectives:
            raise UserError(f"objectives are {[o.name for o in objectives]}; give one or more, each once.")
        opened, study = open_study(InMemoryStorage() if storage is None else storage, name, goal.objectives)
        check_identity(study, goal, seed)
        return cls(study, opened, goal, seed, lease_s)

    def ask(self, searcher: Searcher, *, limit: int | None = None) -> Trial | None:
        """The next Trial, running and leased to this worker: first what dead workers left, then a new one.

        Args:
            searcher: proposes the genes, as a function of the history.
            limit: None is returned where so many Trials, over all workers, are scored or running.

        Raises:
            NothingLeftError: the Searcher knows no further Arch within the Budget.
        """
        while True:
            self._look()
            closed = self._num_closed
            retry = self._retry_dead()
            if retry is not None:
                return retry
            if self._num_closed > closed:
                continue  # to look again: the dead are no workers beside this one
            if limit is not None and self._ledger.num_taken() >= limit:
                return None
            history = self._ledger.history()
            index, rng = self._next(history)
            genes = searcher.propose(self.goal, history, index, rng)
            if genes is None:
                raise NothingLeftError(
                    f"the search has tried {len(history)} Archs; no other was found that meets "
                    f"{self.goal.budget.counted.text or 'an empty budget'}. Widen the budget or the space."
                )
            attrs = {"proposal": index, "generation": searcher.generation(index), "attempt": 1}
            claimed = self._claim(self.goal.space.canonical(genes), attrs, limit)
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
        numbers = [objective.value(scores, cost) for objective in self.goal.objectives]
        return self._finish(trial, TrialState.COMPLETE, cost, {"values": scores}, numbers)

    def reject(self, trial: Trial, reasons: Sequence[str], cost: Cost | None = None) -> bool:
        """Record that the Trial's Arch misses the Budget, and why. It gets no score.

        Returns:
            False where the lease was lost meanwhile.
        """
        assert reasons, "a rejection needs a reason"
        return self._finish(trial, TrialState.PRUNED, cost or trial.cost, {"reasons": list(reasons)}, None)

    def withdraw(self, trial: Trial, reasons: Sequence[str]) -> None:
        """Count a scored Trial as rejected after all, for reasons that were found when the search was over."""
        self._withdrawn[str(trial.number)] = list(reasons)
        self._study.set_user_attr(WITHDRAWN, self._withdrawn)
        self._ledger.reset()

    def touch(self, trial: Trial) -> bool:
        """Renew the lease of a running Trial; False where it was lost."""
        return self._set_lease(trial, self.lease_s)

    def release(self, trial: Trial) -> bool:
        """Give a running Trial back: the next worker to ask runs the same Arch again."""
        return self._set_lease(trial, 0.0)

    def trials(self) -> list[Trial]:
        """All Trials by proposal; one that was run again stands there once, as its latest run."""
        self._look()
        return self._ledger.history()

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
        within = Budget.parse(budget) if isinstance(budget, str) else (budget or self.goal.budget)
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

    def seconds(self) -> float:
        """Seconds in which some worker was at work on what was scored or rejected. Between two Trials a Searcher
        thinks, but not for long: what is longer was a break. A failed trial was closed when another worker came."""
        total, end = 0.0, None
        for frozen in sorted(self._stored(), key=lambda each: str(each.datetime_start)):
            if (
                frozen.state not in SETTLED
                or frozen.datetime_start is None
                or frozen.datetime_complete is None
            ):
                continue
            gap = 0.0 if end is None else (frozen.datetime_start - end).total_seconds()
            first = frozen.datetime_start if end is None or gap > BREAK_S else end
            if (more := (frozen.datetime_complete - first).total_seconds()) > 0:
                total, end = total + more, frozen.datetime_complete
        return total

    def summary(self) -> SearchRecord:
        """What search.json holds."""
        self._look()
        trials = [trial for trial in self._ledger.history() if trial.state != "running"]
        rejections: dict[str, int] = {}
        for trial in trials:
            for limit in missed(trial, self.goal.budget):
                rejections[limit] = rejections.get(limit, 0) + 1
        scored = [trial for trial in trials if trial.state == "scored"]
        return SearchRecord(
            objectives=self.goal.objectives,
            budget=self.goal.budget.text,
            seed=self.seed,
            num_scored=len(scored),
            num_rejected=sum(trial.state == "rejected" for trial in trials),
            rejections=rejections,
            trials=tuple(trial.record() for trial in trials),
            front=tuple(trial.arch.id for trial in self.front()),
            chosen=self.best().arch.id if scored else None,
            hypervolume=tuple(self.hypervolume()),
            seconds=self.seconds(),
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

    def _stored(self) -> list[FrozenTrial]:
        """Every Optuna trial of the Study, by number, with what a Study writes."""
        if isinstance(self._storage, Lean):
            return self._storage.changed(self._study_id, -1, [])
        return self._study.get_trials(deepcopy=False)

    def _changed(self) -> list[FrozenTrial]:
        """What the ledger has not seen, or not yet as it ended."""
        ledger = self._ledger
        if isinstance(self._storage, Lean):
            return self._storage.changed(self._study_id, ledger.newest, ledger.unfinished.values())
        return [each for each in self._stored()[ledger.first :] if not ledger.has_ended(each.number)]

    def _look(self) -> None:
        """Take into the ledger what the storage holds now.

        Raises:
            UserError: trials that are not as a Study writes them.
        """
        try:
            self._ledger.update(self._changed())
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"study {self._study.study_name!r} cannot be read ({first_line(error)}); it must be as vitnas wrote "
                "it. Restore it, or give another storage or study name."
            ) from error

    def _trial(self, frozen: FrozenTrial) -> Trial:
        attrs = made_of(frozen)
        result = frozen.user_attrs.get("result", {}) if frozen.state not in UNFINISHED else {}
        withdrawn = self._withdrawn.get(str(frozen.number))
        return Trial(
            number=frozen.number,
            proposal=attrs["proposal"],
            genes=tuple(attrs["genes"]),
            space=self.goal.space,
            state="rejected" if withdrawn else _STATES.get(frozen.state, "running"),
            cost=Cost(**result.get("cost", attrs["cost"])),
            values=result.get("values", {}),
            reasons=tuple(withdrawn or result.get("reasons", ())),
            generation=attrs.get("generation"),
        )

    def _points(self, trials: Sequence[Trial]) -> Any:
        values = [[o.value(trial.values, trial.cost) for o in self.goal.objectives] for trial in trials]
        return oriented(values, self.goal.objectives)

    def _claim(self, genes: Genes, attrs: Mapping[str, Any], limit: int | None) -> Trial | None:
        """Create a running Trial; None where another worker was first with these genes, or took the last place."""
        token = uuid.uuid4().hex
        cost = self.goal.cost(genes)
        shares = self.goal.budget.counted.violations(cost)
        params, distributions = self._parameters(genes)
        self._storage.create_new_trial(  # Optuna's `add_trial` copies it, deeply
            self._study_id,
            create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=distributions,
                # One attribute, not ten: each is a statement of its own in the database.
                user_attrs={
                    MADE: {
                        **attrs,
                        "arch": self.goal.space.decode(genes).id,
                        "genes": list(genes),
                        "cost": counted(cost),
                        "token": token,
                        "lease": self._lease(self.lease_s),
                    }
                },
                constraints=shares or None,
            ),
        )
        self._look()
        # There may be two of the token, where a database went away before it said that it had written the first.
        mine, *copies = [frozen for frozen in self._ledger.open if made_of(frozen)["token"] == token]
        ancestors = self._ledger.ancestors(mine.number)
        reason = None
        if self._is_second(mine):
            reason = SECOND
        elif limit is not None and not ancestors and self._ledger.num_taken(before=mine.number) >= limit:
            reason = "another worker took the last place"
        for frozen in copies if reason is None else (mine, *copies):
            self._drop(frozen.number, reason or "written twice")
        return self._trial(mine) if reason is None else None

    def _next(self, history: History) -> tuple[int, random.Random]:
        """The number of the next proposal, one more than the last, and its generator, where nobody else is at work.

        Workers that ask at one moment would propose the same Arch of it, which all but one would drop. Beside others a
        worker takes any of the first numbers that no Trial has, so that none is left out, and numbers of its own.
        """
        end = history[-1].proposal + 1 if history else 0
        others = self._ledger.num_running_of_others(self.worker)
        if not others:
            return end, proposal_rng(self.seed, end)
        places = 2 * others + 1
        begin = max(0, end - 4 * places)  # further back nothing is left, or is left for good
        used = set(itertools.takewhile(begin.__le__, (trial.proposal for trial in reversed(history))))
        free = (index for index in range(begin, end + places) if index not in used)
        index = self._chance.choice(list(itertools.islice(free, places)))
        return index, random.Random(f"{self.seed}/{index}/{self._chance.getrandbits(64)}")

    def _retry_dead(self) -> Trial | None:
        """Close the running Trials of dead workers and start the first of them again."""
        again = {before: number for number, before in self._ledger.links.items()}
        running = {frozen.number: frozen for frozen in self._ledger.open if frozen.state in UNFINISHED}
        for frozen in running.values():
            if not self._leases.is_dead(frozen):
                continue
            attempt, retry = made_of(frozen)["attempt"], again.get(frozen.number)
            if self._is_second(frozen):  # its worker died before it could drop it
                self._drop(frozen.number, SECOND)
            elif retry is not None:
                # Whoever runs it again closes it, or drops the retry and leaves it; unless that worker died, too.
                if retry not in running or self._leases.is_dead(running[retry]):
                    self._close_failed(frozen.number)
            elif attempt >= MAX_ATTEMPTS:
                reason = f"its worker died {attempt} times"
                logger.warning("trial %d is left as failed: %s", frozen.number, reason)
                self._close_failed(frozen.number, "result", {"reasons": [reason]})
            else:
                kept = {name: made_of(frozen)[name] for name in ("proposal", "generation")}
                attrs = {**kept, "attempt": attempt + 1, "retry_of": frozen.number}
                # The new Trial first: a kill between the two leaves a link that the next worker follows. Where
                # another worker's trial of the same Arch stands in the way, that one may itself be on its way
                # out (it found the dead trial under a lower number): the dead trial stays for the next to ask.
                claimed = self._claim(tuple(made_of(frozen)["genes"]), attrs, None)
                if claimed is not None:
                    logger.warning("trial %d lost its worker; the same Arch is run again", frozen.number)
                    self._close_failed(frozen.number)
                    return claimed
        return None

    def _is_second(self, frozen: FrozenTrial) -> bool:
        """Whether another trial of the same Arch has a lower number, but for those that this one runs again."""
        numbers = self._ledger.numbers(tuple(made_of(frozen)["genes"]))
        return bool({n for n in numbers if n < frozen.number} - self._ledger.ancestors(frozen.number))

    def _drop(self, number: int, reason: str) -> None:
        self._close_failed(number, "dropped", reason)

    def _finish(
        self,
        trial: Trial,
        state: TrialState,
        cost: Cost,
        result: Mapping[str, Any],
        numbers: Sequence[float] | None,
    ) -> bool:
        outcome = {**result, "cost": {**counted(cost), "latency_ms": dict(cost.latency_ms)}}
        trial_id = self._id(trial.number)
        try:
            if cost.latency_ms and self.goal.budget.latency_targets:
                handle = optuna.Trial(self._study, trial_id)
                for limit in self.goal.budget.limits:
                    if limit.quantity == "latency":
                        value = cost.value(limit.quantity, limit.target)
                        handle.set_constraint(str(limit), limit.violation(value))
            finish(self._storage, trial_id, state, numbers, {"result": outcome})
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
        return {"worker": self.worker, **this_process(os.getpid()), "until": until}

    def _close_failed(self, number: int, key: str = "", value: Any = None) -> None:
        """Close a running trial, with an attribute that says why; another worker may do the same at the same moment."""
        self._num_closed += 1
        try:
            finish(self._storage, self._id(number), TrialState.FAIL, None, {key: value} if key else {})
        except UpdateFinishedTrialError:
            logger.debug("trial %d was closed by another worker", number)

    def _id(self, number: int) -> int:
        """The storage's own name of a trial."""
        if number in self._ledger.unfinished:
            return self._ledger.unfinished[number]
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def proposal_rng(seed: int, index: int) -> random.Random:
    """The generator of proposal `index`: the same in every process, and after a resume."""
    return random.Random(f"{seed}/{index}")


def counted(cost: Cost) -> dict[str, int]:
    """The part of a Cost that is known without measuring."""
    return {"macs": cost.macs, "params": cost.params, "memory_bytes": cost.memory_bytes}


def missed(trial: Trial, budget: Budget) -> list[str]:
    """The text of each limit that a rejected Trial missed; of other reasons what stands before their numbers."""
    if trial.state != "rejected":
        return []
    limits = [str(limit) for limit in budget.limits if _share(limit, trial.cost) > 0]
    return limits or [reason.partition(":")[0] for reason in trial.reasons]


def _share(limit: Limit, cost: Cost) -> float:
    """By how much the limit is missed; 0 for a latency that was not measured, as counting decided before."""
    if limit.quantity == "latency" and limit.target not in cost.latency_ms:
        return 0.0
    return limit.violation(cost.value(limit.quantity, limit.target))
