"""The search loop: ask for an Arch, hold it against the Budget, score it, tell the Study."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from vitnas.arch import Arch
from vitnas.errors import UserError, check_word
from vitnas.searching.feasibility import feasibility
from vitnas.searching.latency import Build, LatencyMeter, PredictedLatency, measure_ms, meters_of
from vitnas.searching.searchers import SEARCHERS
from vitnas.searching.study import Study
from vitnas.searching.tokens import token_speeds
from vitnas.searching.trial import NothingLeftError, Searcher, Trial

logger = logging.getLogger(__name__)

NUM_TRIALS = 200
_POLL_S = 0.5


class Evaluator(Protocol):
    """Scores an Arch on held-out training images; must give 'accuracy' if that is an objective."""

    def __call__(self, arch: Arch) -> Mapping[str, float]: ...


def search(
    study: Study,
    evaluator: Evaluator,
    *,
    searcher: Searcher | str | None = None,
    num_trials: int | None = None,
    latency_meter: LatencyMeter | Mapping[str, LatencyMeter] | None = None,
    build: Build | None = None,
    on_trial: Callable[[Study, Trial], None] | None = None,
    max_rejections: int | None = None,
) -> Study:
    """Search for the best Archs of a Study's Space within its Budget. Several processes may do so on one storage.

    What misses the Budget is rejected with reasons and never scored: first the counted limits, then latency as
    measured on the Model, and only then does the evaluator run. Where latency is measured, an Arch that keeps fewer
    tokens is timed beside itself with all tokens, and rejected if it is not faster.

    Args:
        study: an open Study, see `Study.open`; what it holds already counts.
        evaluator: Arch to scores by name, on held-out training images.
        searcher: a Searcher or a name of `SEARCHERS`; default an Evolution sized for `num_trials`.
        num_trials: scored Archs over all workers, earlier runs included; default the searcher's own, else 200.
        latency_meter: a meter, or one per latency target of the Budget and the objectives.
        build: Arch to the Model that is timed; default `vitnas.model.build`.
        on_trial: called after each Trial of this worker, with the Study and the Trial.
        max_rejections: stop after so many; default 10 per scored Trial wanted.

    Returns:
        The same Study; `study.best().arch` is the answer.

    Raises:
        UserError: an evaluator that looks at test images, an impossible Budget (with the feasible range), a
            latency limit without a meter, a score that is missing or not finite.
    """
    if getattr(evaluator, "split", None) == "test":
        raise UserError(
            "the evaluator's split is 'test'; a search that looks at test images makes the test worthless. "
            "Score on a held-out part of the training images."
        )
    chosen, wanted = _searcher(searcher, num_trials)
    limits = study.goal.budget
    timed = [o.target for o in study.goal.objectives if o.quantity == "latency"]
    meters = meters_of(latency_meter, list(dict.fromkeys((*limits.latency_targets, *timed))))
    if limits.counted and not study.trials():
        feasibility(study.goal.space, limits.counted, n=10_000, seed=study.seed)
    allowed = 10 * wanted if max_rejections is None else max_rejections
    while (trial := _ask(study, chosen, wanted)) is not None:
        done = _run(study, trial, evaluator, meters, build)
        if on_trial is not None:
            on_trial(study, done)
        if done.state == "rejected" and study.num_rejected() >= allowed:
            logger.warning("stopped after %d Archs missed the budget", allowed)
            break
    return study


def _run(
    study: Study, trial: Trial, evaluator: Evaluator, meters: Mapping[str, LatencyMeter], build: Build | None
) -> Trial:
    """Score or reject one running Trial; given back to the Study if anything raises."""
    budget, cost = study.goal.budget, trial.cost
    try:
        with _kept(study, trial):
            reasons = budget.counted.misses(cost)
            if meters and not reasons:
                latency_ms, slower = _timed(trial.arch, meters, build)
                cost = replace(cost, latency_ms=latency_ms)
                reasons = budget.misses(cost) or slower
            if reasons:
                study.reject(trial, reasons, cost)
                return replace(trial, state="rejected", cost=cost, reasons=tuple(reasons))
            values = dict(evaluator(trial.arch))
            study.tell(trial, values, cost)
            return replace(trial, state="scored", cost=cost, values=values)
    except BaseException:
        study.release(trial)
        raise


def _timed(
    arch: Arch, meters: Mapping[str, LatencyMeter], build: Build | None
) -> tuple[dict[str, float], list[str]]:
    """Milliseconds per target, and why an Arch that keeps fewer tokens does so in vain."""
    told = all(isinstance(meter, PredictedLatency) for meter in meters.values())
    if arch.selector is None or told:  # what is predicted of fewer tokens is always faster
        return {name: measure_ms(meter, arch, build) for name, meter in meters.items()}, []
    speeds = token_speeds(arch, meters, build)
    slower = [speed.reason for speed in speeds if not speed.is_faster]
    return {speed.target: speed.ms for speed in speeds}, slower


def _ask(study: Study, searcher: Searcher, num_trials: int) -> Trial | None:
    """The next Trial to run, or None when the search is over.

    Waits while other workers run the last ones: if one of them dies, its Arch is run here.
    """
    while True:
        try:
            trial = study.ask(searcher, limit=num_trials)
        except NothingLeftError as error:
            trial = None
            if study.num_running() == 0:
                logger.warning("%s", error)
                return None
        if trial is not None:
            return trial
        if study.num_running() == 0:
            return None
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _kept(study: Study, trial: Trial) -> Iterator[None]:
    """Renew the Trial's lease from a thread, however long the scoring takes."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(study.lease_s / 3):
            study.touch(trial)

    thread = threading.Thread(target=renew, name="vitnas-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _searcher(searcher: Searcher | str | None, num_trials: int | None) -> tuple[Searcher, int]:
    """The Searcher and how many Trials it is to have scored."""
    if num_trials is not None and num_trials < 1:
        raise UserError(f"num_trials is {num_trials}; a search scores at least 1 Arch.")
    if searcher is None or isinstance(searcher, str):
        named = searcher or "evolution"
        check_word("searcher", named, SEARCHERS)
        searcher = SEARCHERS[named].sized(num_trials or NUM_TRIALS)
    own = getattr(searcher, "num_trials", NUM_TRIALS)
    return searcher, num_trials if num_trials is not None else int(own)
