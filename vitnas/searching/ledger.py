"""What a Study holds, kept up to date at a cost that does not grow with it: finished trials are looked at once."""

from __future__ import annotations

import bisect
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from vitnas.errors import UserError
from vitnas.searching.storage import is_alive, this_host
from vitnas.searching.trial import MADE, History, Trial
from vitnas.space import Genes

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)
LOOK_S = 10.0
SETTLED = (TrialState.COMPLETE, TrialState.PRUNED)  # a failed one may still be linked to, or dropped


def made_of(frozen: FrozenTrial) -> dict[str, Any]:
    """What `Study` wrote into the trial when it was made: proposal, genes, cost, lease and links."""
    value: dict[str, Any] = frozen.user_attrs[MADE]
    return value


def lease_of(frozen: FrozenTrial) -> dict[str, Any]:
    """Who runs a trial: worker, host, process and its start, and until when as that host's clock says."""
    value: dict[str, Any] = frozen.user_attrs.get("lease", made_of(frozen)["lease"])
    return value


class Leases:
    """Which running trials have lost their worker.

    A worker renews its leases, and each renewal differs from the one before. One that has not changed for `lease_s` of
    the clock that only runs forward here has lost its worker, so clocks of other hosts do not matter, nor whether they
    jump. A process of this host is looked up.
    """

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._here = this_host()
        self._seen: dict[int, tuple[Any, float]] = {}
        self._looked: dict[tuple[int, str], float] = {}  # by process and its start

    def is_dead(self, frozen: FrozenTrial) -> bool:
        """Whether a running trial's worker is gone; to be asked now and then."""
        lease, now = lease_of(frozen), time.monotonic()
        if not lease["until"]:  # given back
            return True
        if lease["host"] == self._here and not self._is_alive(lease):
            return True
        mark, since = self._seen.get(frozen.number, (None, now))
        if mark != lease["until"]:
            self._seen[frozen.number] = lease["until"], now
            return False
        return now - since >= self.lease_s

    def _is_alive(self, lease: Mapping[str, Any]) -> bool:
        """Whether a process of this host lives. Whether its number was used again is looked at now and then only."""
        try:
            os.kill(lease["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        process, now = (lease["pid"], lease.get("start", "")), time.monotonic()
        if now - self._looked.get(process, -LOOK_S) < LOOK_S:
            return True
        if not is_alive(*process):
            return False
        self._looked[process] = now
        return True


class Ledger:
    """The trials of a Study that count.

    Args:
        read: what a FrozenTrial says as a Trial.
        num_genes: of the Space.
    """

    def __init__(self, read: Callable[[FrozenTrial], Trial], num_genes: int) -> None:
        self._read, self._num_genes = read, num_genes
        self.reset()

    def reset(self) -> None:
        """Forget all, as where a finished trial has become another one."""
        self.newest = -1  # the id of the newest trial that was seen
        self.unfinished: dict[int, int] = {}  # number: id
        self.first = 0  # the lowest number that has not ended
        self._ended: set[int] = set()  # of those above
        self._done: list[Trial] = []  # settled and not run again by one that settled, by proposal
        self._settled: dict[int, Trial] = {}  # the same ones, by number
        self._scored: list[int] = []  # the numbers of those that were scored
        self._genes: dict[Genes, list[int]] = {}  # numbers of the trials that count
        self.links: dict[int, int] = {}  # by the number of a trial the one that it runs again
        self._open: dict[int, FrozenTrial] = {}
        self._running: dict[int, Trial] = {}  # the same ones, as Trials

    @property
    def open(self) -> list[FrozenTrial]:
        """The trials that count and may still be linked to or dropped: what runs, and what failed."""
        return list(self._open.values())

    def has_ended(self, number: int) -> bool:
        """Whether a trial was seen that cannot change any more."""
        return number < self.first or number in self._ended

    def update(self, changed: Iterable[FrozenTrial]) -> None:
        """Take in trials that are new or may have changed, by number."""
        for frozen in changed:
            self._take(frozen)
            self.newest = max(self.newest, frozen._trial_id)
            if frozen.state in UNFINISHED:
                self.unfinished[frozen.number] = frozen._trial_id
            else:
                self.unfinished.pop(frozen.number, None)
                self._ended.add(frozen.number)
        while self.first in self._ended:
            self._ended.remove(self.first)
            self.first += 1

    def _take(self, frozen: FrozenTrial) -> None:
        before = self._open.get(frozen.number)
        if before is not None and MADE not in frozen.user_attrs:  # what was read once is not read again
            frozen.user_attrs = {**before.user_attrs, **frozen.user_attrs}
        attrs = frozen.user_attrs
        if "dropped" in attrs or MADE not in attrs:
            if before is not None:
                del self._open[frozen.number], self._running[frozen.number]
                self.links.pop(frozen.number, None)
                self._forget(tuple(made_of(before)["genes"]), frozen.number)
            return
        if before is None:
            self._check(frozen)
            self._genes.setdefault(tuple(made_of(frozen)["genes"]), []).append(frozen.number)
            if (again := made_of(frozen).get("retry_of")) is not None:
                self.links[frozen.number] = again
        elif not _is_told(frozen):
            raise _foreign(frozen)
        if frozen.state in SETTLED:
            self._open.pop(frozen.number, None)
            self._running.pop(frozen.number, None)
            self._settle(frozen)
        else:
            self._open[frozen.number] = frozen
            if before is None or before.state != frozen.state:
                self._running[frozen.number] = self._read(frozen)

    def _forget(self, genes: Genes, number: int) -> None:
        self._genes[genes].remove(number)
        if not self._genes[genes]:
            del self._genes[genes]

    def _settle(self, frozen: FrozenTrial) -> None:
        number, again = frozen.number, self.links.get(frozen.number, -1)
        if (other := self._settled.pop(again, None)) is not None:
            _take_out(self._done, other)
            if again in self._scored:
                self._scored.remove(again)
        self._settled[number] = trial = self._read(frozen)
        bisect.insort(self._done, trial, key=_order)
        if frozen.state == TrialState.COMPLETE:
            bisect.insort(self._scored, number)

    def history(self) -> History:
        """All Trials by proposal; one that was run again stands there once, as its latest run."""
        trials, again = History(self._done, self._genes.keys()), set(self.links.values())
        # Of what is done little was run again; nothing else of it is looked at, as that would grow with the study.
        for number in again & self._settled.keys():
            _take_out(trials, self._settled[number])
        for number, trial in self._running.items():
            if number not in again:
                bisect.insort(trials, trial, key=_order)
        return trials

    def num_taken(self, before: float = float("inf")) -> int:
        """Places of a limited search that are taken: scored or running Archs, a run again counting once.

        Args:
            before: only trials of lower numbers.
        """
        again = set(self.links.values())
        runs = (f.number for f in self._open.values() if f.state in UNFINISHED and f.number not in again)
        lost = sum(n < before and n in self._scored for n in again & self._settled.keys())
        return bisect.bisect_left(self._scored, before) - lost + sum(number < before for number in runs)

    def num_running_of_others(self, worker: str) -> int:
        """Trials that run elsewhere."""
        ours = (frozen for frozen in self._open.values() if frozen.state in UNFINISHED)
        return sum(lease_of(frozen).get("worker") != worker for frozen in ours)

    def numbers(self, genes: Genes) -> list[int]:
        """The numbers of all trials with these genes."""
        return self._genes.get(genes, [])

    def ancestors(self, number: int) -> set[int]:
        """The numbers of the trials that this one runs again."""
        found: set[int] = set()
        while (before := self.links.get(number)) is not None and before not in found:
            found.add(before)
            number = before
        return found

    def _check(self, frozen: FrozenTrial) -> None:
        """Raise UserError where a trial is not as a Study writes one, as in a study of another program."""
        made = frozen.user_attrs[MADE]
        kinds: Mapping[str, type] = {"proposal": int, "attempt": int, "arch": str, "token": str, "cost": dict}
        if not (
            isinstance(made, dict)
            and all(type(made.get(name)) is kind for name, kind in kinds.items())
            and isinstance(made.get("genes"), list)
            and len(made["genes"]) == self._num_genes
            and set(map(type, made["genes"])) <= {int}
            and _is_told(frozen)
        ):
            raise _foreign(frozen)


def _is_told(frozen: FrozenTrial) -> bool:
    """Whether what a Study writes into a trial later is as it writes it."""
    lease, result = lease_of(frozen), frozen.user_attrs.get("result", {})
    if not (
        isinstance(lease, dict) and {"host", "pid", "until"} <= lease.keys() and isinstance(result, dict)
    ):
        return False
    if frozen.state != TrialState.COMPLETE:
        return True
    values = result.get("values")
    return isinstance(values, dict) and all(isinstance(value, int | float) for value in values.values())


def _foreign(frozen: FrozenTrial) -> UserError:
    return UserError(
        f"trial {frozen.number} of the study is not as vitnas writes one; only searches write to it. Restore it, or "
        "give another storage or study name."
    )


def _order(trial: Trial) -> tuple[int, int]:
    return trial.proposal, trial.number


def _take_out(trials: list[Trial], trial: Trial) -> None:
    """Remove a Trial from those by proposal."""
    del trials[bisect.bisect_left(trials, _order(trial), key=_order)]
