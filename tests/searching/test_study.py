"""The Study: what it refuses, what it keeps, leases, retries, best, front and search.json."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial
from search_help import BUDGET, DOZEN, MICRO, evolution, score, told
from sqlalchemy import event

from vitnas.errors import UserError
from vitnas.searching import (
    DEFAULT_OBJECTIVES,
    NothingLeftError,
    Objective,
    RandomSearch,
    SearchRecord,
    Study,
    Trial,
    search,
)
from vitnas.searching.storage import this_process
from vitnas.searching.study import MAX_ATTEMPTS, made_of, proposal_rng


def open_micro(storage: object | None = None, **options: object) -> Study:
    given = {"space": MICRO, "budget": BUDGET, "storage": storage, **options}
    return Study.open(**given)  # type: ignore[arg-type]


def run(study: Study, num: int) -> list[Trial]:
    trials = []
    for _ in range(num):
        trial = study.ask(RandomSearch())
        assert trial is not None
        study.tell(trial, score(trial.arch))
        trials.append(trial)
    return trials


def test_ask_tell_reject() -> None:
    study = open_micro()
    first, second = study.ask(RandomSearch()), study.ask(RandomSearch())
    assert first is not None
    assert second is not None
    assert first.genes != second.genes
    assert study.num_running() == 2
    assert study.tell(first, {"accuracy": 0.5, "loss": 1.25})
    assert study.reject(second, ["latency is 9ms; the budget allows at most 8ms"])
    done = study.trials()
    assert [trial.state for trial in done] == ["scored", "rejected"]
    assert done[0].values == {"accuracy": 0.5, "loss": 1.25}
    assert done[1].values == {}
    assert done[1].reasons == ("latency is 9ms; the budget allows at most 8ms",)
    assert study.scored() == [done[0]]


def test_what_counting_rejects_needs_no_latency_in_the_summary() -> None:
    study = open_micro(budget="macs<=700K and latency<=6ms")
    trial = study.ask(RandomSearch())
    assert trial is not None
    big = replace(trial.cost, macs=800_000)
    study.reject(trial, study.goal.budget.counted.misses(big), big)
    assert study.summary().rejections == {"macs<=700K": 1}


def test_optuna_sees_values_names_and_constraints() -> None:
    storage = InMemoryStorage()
    run(open_micro(storage), 3)
    study = optuna.load_study(study_name="search", storage=storage)
    assert study.metric_names == ["accuracy", "macs"]
    assert all(trial.constraints == {BUDGET: 0.0} for trial in study.trials)
    assert len(study.best_trials) >= 1


def test_sqlite_and_journal_keep_everything(tmp_path: Path) -> None:
    for where in (str(tmp_path / "a" / "s.db"), f"journal:{tmp_path / 'j.log'}"):
        with open_micro(where) as study:
            run(study, 3)
            before = told(study)
        with open_micro(where) as again:
            assert told(again) == before
            assert [trial.proposal for trial in again.trials()] == [0, 1, 2]
    assert (tmp_path / "a" / "s.db").exists()


def test_another_search_under_the_same_name_is_refused() -> None:
    storage = InMemoryStorage()
    open_micro(storage)
    with pytest.raises(
        UserError, match=r"budget is 'macs<=1G'; study 'search' was made with 'macs<=700K'\. Give"
    ):
        open_micro(storage, budget="macs<=1G")
    with pytest.raises(UserError, match=r"space is 'dozen-\w+'; study 'search' was made with 'micro-"):
        open_micro(storage, space=DOZEN)
    with pytest.raises(UserError, match=r"objectives is 'accuracy \(maximize\)'; study"):
        open_micro(storage, objectives=(Objective("accuracy"),))
    with pytest.raises(UserError, match="seed is 7; study 'search' was made with 0"):
        open_micro(storage, seed=7)
    assert open_micro(storage, name="other", budget="macs<=1G").trials() == []


def test_storage_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a database, and long enough to be looked at " * 50)
    with pytest.raises(
        UserError, match=r"file cannot be opened \(.*not a database\); it must be a writable path"
    ):
        open_micro(tmp_path / "file")
    with pytest.raises(UserError, match=r"objectives are .*; give one or more, each once"):
        open_micro(objectives=())


def test_bad_scores_are_refused() -> None:
    study = open_micro()
    trial = study.ask(RandomSearch())
    assert trial is not None
    with pytest.raises(UserError, match=r"accuracy of Arch .* is nan; a score must be a finite number"):
        study.tell(trial, {"accuracy": float("nan")})
    with pytest.raises(UserError, match="objective 'accuracy' is not given; the evaluator gives top1"):
        study.tell(trial, {"top1": 0.5})
    assert study.tell(trial, {"accuracy": 0.5})


def test_nothing_left() -> None:
    study = open_micro(space=DOZEN, budget=None)
    run(study, 12)
    with pytest.raises(NothingLeftError, match="the search has tried 12 Archs; no other was found"):
        study.ask(RandomSearch())


def looked(study: Study) -> Study:
    """A Study that knows what its storage holds."""
    study._look()
    return study


def test_a_trial_whose_lease_ran_out_is_run_again_once(caplog: pytest.LogCaptureFixture) -> None:
    storage = InMemoryStorage()
    lost, other = open_micro(storage), open_micro(storage, lease_s=0.05)
    trial = lost.ask(RandomSearch())
    assert trial is not None
    assert looked(other)._retry_dead() is None
    time.sleep(0.1)
    again = other.ask(RandomSearch())
    assert again is not None
    assert again.genes == trial.genes
    assert (again.proposal, again.number) == (trial.proposal, trial.number + 1)
    new = other.ask(RandomSearch())
    assert new is not None
    assert new.genes != trial.genes
    assert not lost.touch(trial)
    assert not lost.tell(trial, {"accuracy": 0.1})
    assert "its result is dropped" in caplog.text
    assert other.tell(again, {"accuracy": 0.2})
    assert [t.values for t in other.scored()] == [{"accuracy": 0.2}]


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_a_clock_that_jumps_ends_no_lease_and_holds_none(
    jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's host is another one, so that only its lease tells."""
    storage = InMemoryStorage()
    mine, other = open_micro(storage), open_micro(storage, lease_s=0.2)
    with monkeypatch.context() as patch:
        here = this_process(os.getpid())
        patch.setattr("vitnas.searching.study.this_process", lambda pid: {**here, "host": "elsewhere"})
        trial = mine.ask(RandomSearch())
        assert trial is not None
        assert looked(other)._retry_dead() is None
        now = time.time()
        patch.setattr(time, "time", lambda: now + jump_s)
        assert looked(other)._retry_dead() is None, "it did not end early"
        assert mine.touch(trial)
        time.sleep(0.25)
        assert looked(other)._retry_dead() is None, "it was renewed, whatever the clock says"
    time.sleep(0.25)
    again = looked(other)._retry_dead()
    assert again is not None
    assert again.genes == trial.genes


def test_touch_keeps_a_lease_and_release_gives_it_up() -> None:
    storage = InMemoryStorage()
    mine, other = open_micro(storage), open_micro(storage, lease_s=0.3)
    trial = mine.ask(RandomSearch())
    assert trial is not None
    assert looked(other)._retry_dead() is None
    time.sleep(0.2)
    assert mine.touch(trial)
    time.sleep(0.2)
    second = other.ask(RandomSearch())
    assert second is not None
    assert second.genes != trial.genes
    assert mine.release(trial)
    third = other.ask(RandomSearch())
    assert third is not None
    assert third.genes == trial.genes


def test_an_arch_that_always_kills_its_worker_is_left(caplog: pytest.LogCaptureFixture) -> None:
    storage = InMemoryStorage()
    genes = []
    for _ in range(MAX_ATTEMPTS + 1):  # each time by a new worker
        study = open_micro(storage)
        trial = study.ask(RandomSearch())
        assert trial is not None
        genes.append(trial.genes)
        study.release(trial)
    assert {*genes[:-1]} == {genes[0]}
    assert genes[-1] != genes[0]
    number = MAX_ATTEMPTS - 1
    assert next((t.state, t.reasons) for t in study.trials()) == (
        "failed",
        (f"its worker died {MAX_ATTEMPTS} times",),
    )
    assert f"trial {number} is left as failed" in caplog.text
    alone = open_micro()
    first, second = alone.ask(RandomSearch()), alone.ask(RandomSearch())
    assert first is not None
    assert second is not None
    assert genes[-1] == second.genes, "the dead are no workers beside this one, with whom numbers are shared"


def ask_and_close_nothing(study: Study) -> Trial:
    """As if killed between making a trial and closing the one that it runs again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "_close_failed", lambda *_: None)
        trial = study.ask(RandomSearch())
    assert trial is not None
    return trial


def test_a_kill_between_the_retry_and_the_closing_runs_it_once() -> None:
    """The retry exists, the dead trial still looks running: it is closed, and the retry alone is run again."""
    storage = InMemoryStorage()
    lost, other = open_micro(storage), open_micro(storage)
    trial = lost.ask(RandomSearch())
    assert trial is not None
    lost.release(trial)
    again = ask_and_close_nothing(other)
    other.release(again)
    third, fourth = other.ask(RandomSearch()), other.ask(RandomSearch())
    assert third is not None
    assert fourth is not None
    assert again.genes == trial.genes == third.genes != fourth.genes
    assert not lost.touch(trial)


def test_a_retry_that_meets_a_trial_on_its_way_out_is_not_lost() -> None:
    """A third worker made a trial of the dead one's Arch and has not yet dropped it while the retry is claimed."""
    storage = InMemoryStorage()
    lost, third, other = open_micro(storage), open_micro(storage), open_micro(storage)
    dead = lost.ask(RandomSearch())
    assert dead is not None
    lost.release(dead)
    row = lost._stored()[0]
    attrs = {**made_of(row), "token": "third", "lease": third._lease(600.0)}
    third._study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"trial": attrs}))
    assert looked(other)._retry_dead() is None
    third._storage.set_trial_user_attr(third._id(1), "dropped", "another worker was first with this Arch")
    third._close_failed(1)
    again = other.ask(RandomSearch())
    assert again is not None
    assert (again.genes, again.proposal) == (dead.genes, dead.proposal)


def test_a_dead_trial_waits_for_what_becomes_of_its_retry() -> None:
    """A worker runs it again, and will drop that, as a third one's trial of the same Arch stands in the way."""
    storage = InMemoryStorage()
    lost, slow, other = open_micro(storage), open_micro(storage), open_micro(storage)
    dead = lost.ask(RandomSearch())
    assert dead is not None
    lost.release(dead)
    attrs = {**made_of(lost._stored()[0]), "retry_of": 0, "attempt": 2, "lease": slow._lease(600.0)}
    slow._study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"trial": attrs}))
    assert looked(other)._retry_dead() is None
    slow._storage.set_trial_user_attr(slow._id(1), "dropped", "another worker was first with this Arch")
    slow._close_failed(1)
    again = other.ask(RandomSearch())
    assert again is not None
    assert (again.genes, again.proposal) == (dead.genes, dead.proposal)


def test_a_question_looks_at_no_trial_that_is_done_also_after_one_was_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else its cost grows with the study. Only a Trial that ended after all is looked for, where it stands."""
    study = open_micro()
    lost = study.ask(RandomSearch())
    assert lost is not None
    study.release(lost)  # its worker comes back and tells, while another runs the same Arch again
    run(study, 40)
    looks: list[int] = []

    class Looked(Trial):
        def __getattribute__(self, name: str) -> object:
            if name in ("number", "state", "proposal"):
                looks.append(1)
            return super().__getattribute__(name)

    read = study._ledger._read
    monkeypatch.setattr(study._ledger, "_read", lambda frozen: Looked(**vars(read(frozen))))
    study._ledger.reset()
    counts = []
    for _ in range(2):
        study.trials()
        looks.clear()
        run(study, 1)
        counts.append(len(looks))
        run(study, 60)
    assert counts[1] < counts[0] + 30, counts


def test_a_trial_that_ends_after_its_retry_counts_once() -> None:
    storage = InMemoryStorage()
    slow, fast = open_micro(storage), open_micro(storage)
    first = slow.ask(RandomSearch())
    assert first is not None
    slow.release(first)
    again = ask_and_close_nothing(fast)
    assert again.genes == first.genes
    assert fast.tell(again, score(again.arch))
    assert [trial.number for trial in fast.scored()] == [again.number]
    assert slow.tell(first, score(first.arch))
    for study in (slow, fast, open_micro(storage)):
        assert [trial.number for trial in study.scored()] == [again.number]
        assert study._ledger.num_taken() == study._ledger.num_taken(before=2) == 1


@pytest.mark.parametrize("seed", range(3))
def test_what_was_seen_bit_by_bit_is_what_is_read_at_once(seed: int) -> None:
    """Whatever ends first: a trial, or the one that runs it again."""
    storage, rng = InMemoryStorage(), random.Random(seed)
    workers = [open_micro(storage) for _ in range(3)]
    held: list[tuple[Study, Trial]] = []
    for _ in range(40):
        worker = rng.choice(workers)
        if not held or rng.random() < 0.5:
            trial = ask_and_close_nothing(worker) if rng.random() < 0.5 else worker.ask(RandomSearch())
            assert trial is not None
            held.append((worker, trial))
        else:
            worker, trial = held[place := rng.randrange(len(held))]
            if rng.random() < 0.4:
                worker.release(trial)  # and yet it goes on with it
            else:
                rng.choice(
                    [
                        lambda w=worker, t=trial: w.tell(t, score(t.arch)),
                        lambda w=worker, t=trial: w.reject(t, ["no"]),
                    ]
                )()
                del held[place]
        fresh = looked(open_micro(storage))._ledger
        kept = looked(rng.choice(workers))._ledger
        assert kept.history() == fresh.history()
        brute = [trial for trial in fresh.history() if trial.state in ("scored", "running")]
        for before in (float("inf"), rng.randrange(40)):
            assert kept.num_taken(before) == fresh.num_taken(before) == sum(t.number < before for t in brute)


def test_a_break_with_a_trial_begun_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed by who comes later, and run again."""
    monkeypatch.setattr("vitnas.searching.study.BREAK_S", 0.2)
    study = open_micro(InMemoryStorage())
    run(study, 1)
    begun = study.ask(RandomSearch())
    assert begun is not None
    study.release(begun)
    time.sleep(0.5)
    run(study, 1)
    assert len(study.scored()) == 2
    assert study.seconds() < 0.4


def test_a_worker_that_died_before_it_dropped_its_trial_leaves_none(caplog: pytest.LogCaptureFixture) -> None:
    """Running that trial again would only be dropped again, without end."""
    storage = InMemoryStorage()
    one, dead, other = open_micro(storage), open_micro(storage), open_micro(storage)
    run(one, 1)
    attrs = {**made_of(one._stored()[0]), "token": "dead", "lease": {**dead._lease(600.0), "until": 0.0}}
    dead._study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"trial": attrs}))
    asked = other.ask(RandomSearch())
    assert asked is not None
    assert asked.number == 2
    assert [(trial.number, trial.state) for trial in other.trials()] == [(0, "scored"), (2, "running")]
    assert "run again" not in caplog.text


def test_the_same_arch_asked_by_two_workers_goes_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both proposed from the same history; the second finds the first one's trial and asks again, further on: so many
    that asked together do not meet again."""
    storage = InMemoryStorage()
    one, two = open_micro(storage), open_micro(storage)
    monkeypatch.setattr(two._chance, "choice", lambda places: places[-1])
    stale = two._stored()
    first = one.ask(RandomSearch())
    assert first is not None
    real, calls = two._stored, []

    def rows() -> list[optuna.trial.FrozenTrial]:
        calls.append(1)
        return stale if len(calls) == 1 else real()

    two._stored = rows  # type: ignore[method-assign]
    second = two.ask(RandomSearch())
    assert second is not None
    assert second.genes != first.genes
    assert (second.number, second.proposal) == (2, 3)  # the last of the three places beside one other worker
    assert [trial.number for trial in one.trials()] == [0, 2]


def test_workers_that_ask_at_one_moment_seldom_meet_and_leave_no_number_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = InMemoryStorage()
    workers = [open_micro(storage, budget=None) for _ in range(8)]
    for number, worker in enumerate(workers):
        monkeypatch.setattr(worker, "_chance", random.Random(number))
    for worker in workers:
        worker.ask(RandomSearch())
    for _ in range(5):
        seen = workers[0]._stored()
        for worker in workers:  # all look before any of them has asked
            looks, real = iter([seen]), worker._stored
            monkeypatch.setattr(worker, "_stored", lambda looks=looks, real=real: next(looks, None) or real())
            trial = worker.ask(RandomSearch())
            assert trial is not None
            worker.tell(trial, score(trial.arch))
    dropped = sum("dropped" in row.user_attrs for row in workers[0]._stored())
    numbers = [trial.proposal for trial in workers[0].trials()]
    assert len(numbers) == 8 + 5 * 8
    assert dropped < 8, "none met but those that asked before anybody was at work"
    assert max(numbers) < len(numbers) + 2 * len(workers)


def test_the_last_place_goes_to_one_worker() -> None:
    storage = InMemoryStorage()
    one, two = open_micro(storage), open_micro(storage)
    run(one, 2)
    stale = two._stored()
    assert one.ask(RandomSearch(), limit=3) is not None
    real, calls = two._stored, []

    def rows() -> list[optuna.trial.FrozenTrial]:
        calls.append(1)
        return stale if len(calls) == 1 else real()

    two._stored = rows  # type: ignore[method-assign]

    class Other(RandomSearch):
        """Proposes another Arch than the first worker got, so that only the limit is in the way."""

        def propose(self, goal, history, index, rng):  # type: ignore[no-untyped-def]
            return super().propose(goal, history, index + 1, proposal_rng(5, index))

    assert two.ask(Other(), limit=3) is None
    assert one.num_running() == 1


def test_best_and_front() -> None:
    study = open_micro(budget=None)
    trials = [study.ask(RandomSearch()) for _ in range(4)]
    by_cost = sorted((t for t in trials if t is not None), key=lambda t: t.cost.macs)
    for trial, accuracy in zip(by_cost, (0.5, 0.9, 0.9, 0.8), strict=True):
        study.tell(trial, {"accuracy": accuracy})
    assert study.best().genes == by_cost[1].genes  # equal accuracy: fewer MACs
    assert [t.genes for t in study.front()] == [by_cost[1].genes, by_cost[0].genes]
    tight = f"macs<={by_cost[0].cost.macs}"
    assert study.best(tight).genes == by_cost[0].genes
    with pytest.raises(UserError, match=r"none of 4 scored Archs meets the budget 'macs<=1K'"):
        study.best("macs<=1K")


def test_summary_is_what_the_report_reads(tmp_path: Path) -> None:
    study = search(Study.open(MICRO, BUDGET), score, searcher=evolution())
    study.summary().write(tmp_path)
    summary = SearchRecord.read(tmp_path)
    assert summary == study.summary()
    assert summary.objectives == DEFAULT_OBJECTIVES
    assert (summary.budget, summary.num_scored, summary.num_rejected) == (BUDGET, 30, 0)
    assert summary.trials[0] == study.trials()[0].record()
    assert [trial.generation for trial in summary.trials] == [0] * 10 + [1] * 10 + [2] * 10
    assert summary.chosen in summary.front
    assert summary.chosen == study.best().arch.id
    assert summary.hypervolume[-1][0] == 30
    assert replace(study.best(), state="scored").arch == MICRO.decode(study.best().genes)


def test_a_trial_takes_few_statements_and_others_can_read_it(tmp_path: Path) -> None:
    """Optuna's own mapper of objects took 31; a database of many workers does them one after another."""
    statements: list[str] = []
    with open_micro(tmp_path / "study.db") as study:
        event.listen(
            study._storage.engine, "before_cursor_execute", lambda *given: statements.append(given[2])
        )  # type: ignore[attr-defined]
        run(study, 1)
        first = len(statements)
        run(study, 1)
        assert len(statements) - first <= 12, statements[first:]
        mine = study.trials()
    others = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}").get_trials()
    assert [each.number for each in others] == [0, 1]
    assert [each.values for each in others] == [
        [objective.value(trial.values, trial.cost) for objective in study.goal.objectives] for trial in mine
    ]
    assert all(each.constraints for each in others)
    assert all(each.datetime_start <= each.datetime_complete for each in others)
