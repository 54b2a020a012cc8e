"""What a Study holds, kept up to date at a cost that does not grow with it: finished trials are looked at once."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from vitnas.errors import UserError
from vitnas.searching.storage import is_alive, this_host
from vitnas.searching.trial import Trial
from vitnas.space import Genes

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)
SETTLED = (TrialState.COMPLETE, TrialState.PRUNED)  # a failed one may still be linked to, or dropped


def made_of(frozen: FrozenTrial) -> dict[str, Any]:
    """What `Study` wrote into the trial when it was made: proposal, genes, cost, lease and links."""
    value: dict[str, Any] = frozen.user_attrs["trial"]
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
        self._seen: dict[int, tuple[Any, float]] = {}

    def is_dead(self, frozen: FrozenTrial) -> bool:
        """Whether a running trial's worker is gone; to be asked now and then."""
        lease, now = lease_of(frozen), time.monotonic()
        if not lease["until"]:  # given back
            return True
        if lease["host"] == this_host() and not is_alive(lease["pid"], lease.get("start", "")):
            return True
        mark, since = self._seen.get(frozen.number, (None, now))
        if mark != lease["until"]:
            self._seen[frozen.number] = lease["until"], now
            return False
        return now - since >= self.lease_s


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
        self._settled: set[int] = set()
        self._first = 0  # all below are settled
        self._done: list[Trial] = []  # settled and not run again, by proposal
        self._num_scored = 0
        self._genes: dict[Genes, list[int]] = {}
        self._links: dict[int, int] = {}  # settled trial: the one that it runs again
        self.open: list[FrozenTrial] = []

    def update(self, stored: Sequence[FrozenTrial]) -> None:
        """Take in what the storage holds now, all of it, by number."""
        self.open = []
        for frozen in stored[self._first :]:
            if frozen.number in self._settled:
                continue
            attrs = frozen.user_attrs
            if "dropped" in attrs or "trial" not in attrs:
                if frozen.state not in UNFINISHED:
                    self._settled.add(frozen.number)
                continue
            self._check(frozen)
            if frozen.state in SETTLED:
                self._settle(frozen)
            else:
                self.open.append(frozen)
        while self._first in self._settled:
            self._settled.remove(self._first)
            self._first += 1

    def _settle(self, frozen: FrozenTrial) -> None:
        trial = self._read(frozen)
        self._settled.add(frozen.number)
        self._genes.setdefault(trial.genes, []).append(frozen.number)
        again = made_of(frozen).get("retry_of")
        if again is not None:
            self._links[frozen.number] = again
            for place, other in enumerate(self._done):
                if other.number == again:
                    self._num_scored -= other.state == "scored"
                    del self._done[place]
                    break
        bisect.insort(self._done, trial, key=_order)
        self._num_scored += frozen.state == TrialState.COMPLETE

    def links(self) -> dict[int, int]:
        """By the number of a trial the one that it runs again."""
        found = dict(self._links)
        for frozen in self.open:
            again = made_of(frozen).get("retry_of")
            if again is not None:
                found[frozen.number] = again
        return found

    def history(self) -> list[Trial]:
        """All Trials by proposal; one that was run again stands there once, as its latest run."""
        again = set(self.links().values())
        trials = list(self._done)
        if again:
            trials = [trial for trial in trials if trial.number not in again]
        for frozen in self.open:
            if frozen.number not in again:
                bisect.insort(trials, self._read(frozen), key=_order)
        return trials

    def num_taken(self, before: int | None = None) -> int:
        """Places of a limited search that are taken: scored or running Archs, a run again counting once.

        Args:
            before: only trials of lower numbers.
        """
        again = set(self.links().values())
        ours = [f for f in self.open if f.state in UNFINISHED and f.number not in again]
        if before is None:
            lost = sum(t.number in again and t.state == "scored" for t in self._done) if again else 0
            return self._num_scored - lost + len(ours)
        done = sum(t.number < before and t.number not in again and t.state == "scored" for t in self._done)
        return done + sum(f.number < before for f in ours)

    def numbers(self, genes: Genes) -> list[int]:
        """The numbers of all trials with these genes."""
        found = list(self._genes.get(genes, ()))
        return found + [f.number for f in self.open if tuple(made_of(f)["genes"]) == genes]

    def ancestors(self, number: int) -> set[int]:
        """The numbers of the trials that this one runs again."""
        links = self.links()
        found: set[int] = set()
        while (before := links.get(number)) is not None and before not in found:
            found.add(before)
            number = before
        return found

    def _check(self, frozen: FrozenTrial) -> None:
        """Raise UserError where a trial is not as a Study writes one, as in a study of another program."""
        made = frozen.user_attrs["trial"]
        kinds: Mapping[str, type] = {"proposal": int, "attempt": int, "arch": str, "token": str, "cost": dict}
        whole = (
            isinstance(made, dict)
            and all(type(made.get(name)) is kind for name, kind in kinds.items())
            and isinstance(made.get("genes"), list)
            and len(made["genes"]) == self._num_genes
            and all(type(gene) is int for gene in made["genes"])
            and isinstance(lease := lease_of(frozen), dict)
            and {"host", "pid", "until"} <= lease.keys()
            and isinstance(frozen.user_attrs.get("result", {}), dict)
        )
        if whole and frozen.state == TrialState.COMPLETE:
            values = frozen.user_attrs.get("result", {}).get("values")
            whole = isinstance(values, dict) and all(isinstance(v, int | float) for v in values.values())
        if not whole:
            raise UserError(
                f"trial {frozen.number} of the study is not as vitnas writes one; only searches write to it. Restore "
                "it, or give another storage or study name."
            )


def _order(trial: Trial) -> tuple[int, int]:
    return trial.proposal, trial.number
