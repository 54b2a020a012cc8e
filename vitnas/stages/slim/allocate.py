"""search: how much of what goes at each budget of the front, by predicted damage, and latency as measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from vitnas.budget import Budget, Limit, exact_quantity, format_quantity
from vitnas.errors import UserError
from vitnas.records import Allocation, Candidate, Place
from vitnas.searching import LatencyMeter, TokenClock
from vitnas.searching.latency import LatencyModel, measure_ms
from vitnas.slimming import PredictedDamage, allocate
from vitnas.slimming.allocation import exchanged
from vitnas.space import Genes, Space
from vitnas.stages.run import SearchConfig
from vitnas.stages.work import Work

SHORTLIST = 3  # Archs per budget that are really folded and measured
TIMED = 16  # Archs that the table of latencies is fitted to
ATTEMPTS = 8  # at a latency that the clock says, not the table
MOST_SLOW = 6  # Archs in a row whose fewer tokens are not faster, before no further one is timed
CLOSE = 0.03  # members of the front are further apart than this share of the MACs


class NothingFasterError(UserError):
    """What meets a budget keeps fewer tokens, and is not faster for it."""


@dataclass(frozen=True)
class Allocator:
    """Proposes Archs within a budget.

    Args:
        damage: what is predicted of an Arch.
        meters, tables: of the targets that budgets may limit: a clock, and what was fitted to a few of its readings.
        tokens: says whether keeping fewer tokens is faster, where budgets limit no latency too.
    """

    work: Work
    damage: PredictedDamage
    config: SearchConfig
    meters: Mapping[str, LatencyMeter]
    tables: Mapping[str, LatencyModel]
    tokens: TokenClock

    @property
    def space(self) -> Space:
        return self.damage.space

    def propose(self, budget: Budget, number: int = SHORTLIST) -> tuple[Candidate, ...]:
        """The least damaged Archs that meet `budget`, by the tables, best first.

        Raises:
            UserError: none does, or latency on a target of which there is no table.
        """
        unknown = [target for target in budget.latency_targets if target not in self.tables]
        if unknown:
            raise UserError(
                f"the budget {budget.text!r} limits latency on {', '.join(unknown)}, of which this run made no "
                f"table (it has: {', '.join(self.tables) or 'none'}). Limit macs, params or memory, or slim with that "
                "budget in another folder."
            )
        found, slow = self._faster(self.damage, budget, number)
        if slow:
            found += self._faster(self.damage.keeping_all(), budget, number)[0]
        if not found:
            if not slow:
                raise UserError(f"no network was found that meets {budget.text!r}. Widen the budget.")
            raise NothingFasterError(
                f"what meets {budget.text!r} keeps fewer tokens, and none of it is faster than with all on "
                f"{', '.join(self.tokens.meters)}. Use another selector, tokens=none, or a wider budget."
            )
        best = sorted({each.arch_id: each for each in found}.values(), key=lambda each: each.damage)
        return tuple(best[:number])

    def _faster(self, damage: PredictedDamage, budget: Budget, number: int) -> tuple[list[Candidate], bool]:
        """The least damaged that do not keep fewer tokens in vain, and whether some did; where many in a row do, no
        further one is timed."""
        with quiet_search():
            trials = allocate(
                damage, self._counted(budget), num_trials=self.config.num_trials, seed=self.work.seed
            )
        said, found, slow = self._said(budget), list[Candidate](), 0
        for trial in trials:
            if len(found) == number:
                break
            ms = {target: each(trial.genes) for target, each in said.items()}
            cost, arch = replace(trial.cost, latency_ms=ms), trial.arch
            if budget.misses(cost):
                continue
            if arch.selector and (slow == MOST_SLOW or self.tokens.reasons_against(arch)):
                slow = min(slow + 1, MOST_SLOW)
                continue
            found.append(
                Candidate(arch_id=arch.id, genes=trial.genes, damage=trial.values["damage"], cost=cost)
            )
        return found, slow > 0

    def _said(self, budget: Budget) -> dict[str, Callable[[Genes], float]]:
        """Milliseconds by the tables, per target of a budget, as functions of genes."""

        def of(table: LatencyModel) -> Callable[[Genes], float]:
            predict = table.cost_of(self.space)
            return lambda genes: float(predict(np.asarray([genes], dtype=np.int64))[0])

        return {target: of(self.tables[target]) for target in budget.latency_targets}

    def _counted(self, budget: Budget) -> Budget:
        """A budget without latency: as many MACs as the least damaged Archs may have that the tables call fast enough.

        A search that asked the tables of every Arch would reject most of them, one by one.
        """
        if not budget.latency_targets:
            return budget
        said, most, fastest = self._said(budget), 0, dict[str, float]()
        for genes in exchanged(self.damage):
            macs = int(self.space.cost_table().costs(np.asarray([genes], dtype=np.int64))["macs"][0])
            ms = {target: each(genes) for target, each in said.items()}
            fastest = {target: min(took, fastest.get(target, took)) for target, took in ms.items()}
            if all(not limit.misses(ms[limit.target]) for limit in budget.limits if limit.target):
                most = max(most, macs)
        if not most:
            least = " and ".join(f"{ms:.3g}ms on {target}" for target, ms in fastest.items())
            raise UserError(
                f"no network was found that meets {budget.text!r}; by the table of latencies the fastest takes "
                f"{least}. Widen the budget, or let more go (axes=)."
            )
        known = [limit for limit in budget.counted.limits if limit.quantity == "macs"]
        low = known[0].low if known else None
        high = min([float(most), *(limit.high for limit in known if limit.high is not None)])
        others = [limit for limit in budget.counted.limits if limit.quantity != "macs"]
        return Budget.of((*others, Limit("macs", low, high)))

    def within(self, budget: Budget, tried: list[tuple[str, str, float]]) -> tuple[Candidate, ...]:
        """The same by the clock: what the tables thought fast enough and is not gives way to something smaller.

        Raises:
            UserError: nothing measured meets the budget (with the fastest that was).
        """
        asked = budget
        for _ in range(ATTEMPTS):
            found = self.propose(asked)
            if not budget.latency_targets:
                return found
            timed = [self._timed(candidate, budget, tried) for candidate in found]
            met = tuple(candidate for candidate in timed if not budget.misses(candidate.cost))
            if met:
                return met
            asked = tightened(asked, budget, timed[0])
        fastest = min(ms for _, _, ms in tried)
        raise UserError(
            f"{budget.text} was met by none of {len(tried)} measurements; the fastest took "
            f"{format_quantity(fastest, 'latency')}. Widen the budget, or let more go (axes=)."
        )

    def _timed(self, candidate: Candidate, budget: Budget, tried: list[tuple[str, str, float]]) -> Candidate:
        arch = self.space.arch_of(candidate.genes)
        latency_ms = {target: measure_ms(self.meters[target], arch) for target in budget.latency_targets}
        tried += [(candidate.arch_id, target, ms) for target, ms in latency_ms.items()]
        return replace(candidate, cost=replace(candidate.cost, latency_ms=latency_ms))


@contextmanager
def quiet_search() -> Iterator[None]:
    """A search that comes to the end of a small Space says so, which is no news where many are made."""
    logger = logging.getLogger("vitnas.searching.search")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def tightened(asked: Budget, budget: Budget, missed: Candidate) -> Budget:
    """`asked` with latencies as much lower as `missed` was above `budget`, and a little more."""

    def lower(limit: Limit) -> Limit:
        if limit.quantity != "latency" or limit.high is None:
            return limit
        own = next(
            each for each in budget.limits if each.target == limit.target and each.quantity == "latency"
        )
        over = missed.cost.latency_ms[limit.target] / (own.high or limit.high)
        return replace(limit, high=limit.high / max(1.02, over * 1.01), low=None)

    return Budget.of(tuple(map(lower, asked.limits)))


def fit_tables(space: Space, meters: Mapping[str, LatencyMeter], seed: int) -> dict[str, LatencyModel]:
    """Latency by target as a function of counts, fitted to a few exported files."""
    return {target: LatencyModel.fit(space, meter, n=TIMED, seed=seed) for target, meter in meters.items()}


def share_out(allocator: Allocator, budget: Budget, number: int) -> Allocation:
    """Proposals for `budget` and for `number` - 1 budgets of MACs around it, largest first."""
    tried: list[tuple[str, str, float]] = []
    update = allocator.work.progress.update
    update("search", 0, number, "")
    chosen = allocator.within(budget, tried)
    macs = chosen[0].cost.macs
    least, most = allocator.space.cost_span("macs")
    places: list[Place] = []
    before: list[Candidate] = []
    for index, limit in enumerate(ladder(macs, int(least), int(most), number)):
        asked = None if limit == macs else f"macs<={exact_quantity(limit, 'macs')}"
        try:
            found = chosen if asked is None else _another(allocator, limit, chosen, before)
        except NothingFasterError:  # so small a network would need fewer tokens
            continue
        if asked is not None:
            before += found
        places.append(Place(number=len(places) + 1, budget=asked or budget.text, candidates=found))
        update("search", index + 1, number, "")
    return Allocation(
        places=tuple(places),
        chosen=1 + next(i for i, place in enumerate(places) if place.candidates is chosen),
        latency_error={target: table.error for target, table in allocator.tables.items()},
        tried=tuple(tried),
    )


def _another(
    allocator: Allocator, limit: int, chosen: Sequence[Candidate], before: Sequence[Candidate]
) -> tuple[Candidate, ...]:
    """The least damaged Arch of at most `limit` MACs that is no twin of others: further from all of them than `CLOSE`,
    or where the Space has none, another one at least.

    Args:
        chosen: the proposals for the budget itself.
        before: what was found for larger limits.
    """
    found = allocator.propose(Budget.of((Limit("macs", None, limit),)), 1)
    others = [*chosen, *before]
    if all(abs(found[0].cost.macs / other.cost.macs - 1) >= CLOSE for other in others):
        return found
    larger, smaller = (before, chosen) if limit > chosen[0].cost.macs else (others, ())
    high = min([limit, *(int(other.cost.macs * (1 - CLOSE)) for other in larger)])
    low = max((int(other.cost.macs * (1 + CLOSE)) + 1 for other in smaller), default=None)
    bands = [Limit("macs", low, high)] if low is None or low <= high else []
    taken = {other.arch_id for other in others}
    for band in (*bands, Limit("macs", None, limit)):
        try:
            proposed = allocator.propose(Budget.of((band,)), 1 + len(taken))
        except NothingFasterError:
            raise
        except UserError:  # no Arch is that large
            continue
        if apart := [each for each in proposed if each.arch_id not in taken]:
            return (apart[0],)
    return found


def ladder(macs: int, least: int, most: int, number: int) -> list[int]:
    """`number` limits of MACs, largest first, `macs` among them: as many above as below where there is room.

    >>> ladder(50, 10, 100, 5)
    [83, 67, 50, 38, 25]
    """
    low, high = max(1.5 * least, macs / 2), most  # the very smallest are of no use to anyone
    room_below, room_above = (macs - low) / macs > 2 * CLOSE, (high - macs) / macs > 2 * CLOSE
    below = (number - 1) // 2 if room_below and room_above else number - 1 if room_below else 0
    above = number - 1 - below
    upper = [round(macs + (high - macs) * i / (above + 1)) for i in range(above, 0, -1)]
    lower = [round(macs - (macs - low) * i / below) for i in range(1, below + 1)]
    return [*upper, macs, *lower]
