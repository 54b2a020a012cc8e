"""Many workers on one search, some of them killed: nothing lost, nothing doubled, and how near to ideal they come.

    python benchmarks/workers.py storage=sqlite workers=8 seconds=600
    python tests/searching/postgres_server.py python benchmarks/workers.py storage=postgres workers=64 seconds=600
    python benchmarks/workers.py ask=10000                  what a question costs while a study grows

Each worker is a process that scores an Arch by sleeping for a second; every five seconds one of them is killed, as
`kill -9` does, and another started. The ideal is one Arch per worker and second, but for what killed workers had begun.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from vitnas.arch import Arch
from vitnas.searching import SEARCHERS, Study, Trial, search
from vitnas.space import AutoFormerSpace

SPACE = AutoFormerSpace(
    name="workers",
    image_size=32,
    patch_size=4,
    num_classes=10,
    embed_dims=(32, 48, 64, 80),
    depths=(4, 6, 8),
    num_heads=(1, 2, 3, 4),
    mlp_ratios=(1.0, 2.0, 3.0, 4.0),
    head_dim=8,
    relative_position=2,
)
BUDGET = "macs<=30M"


def score(arch: Arch) -> Mapping[str, float]:
    """A number of its own for every Arch."""
    return {"accuracy": random.Random(arch.id).random()}


def work(storage: str, seconds: float, end: float) -> None:
    """Score Archs until `end`, each in `seconds`."""

    def evaluator(arch: Arch) -> Mapping[str, float]:
        time.sleep(seconds)
        return score(arch)

    def stop(study: Study, trial: Trial) -> None:
        if time.time() > end:
            raise TimeoutError

    with Study.open(SPACE, BUDGET, storage=storage) as study:
        try:
            search(study, evaluator, searcher="random", num_trials=10**6, on_trial=stop)
        except TimeoutError:
            return


def fork(storage: str, seconds: float, end: float) -> int:
    """A worker, as a copy of this process, which has imported everything."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(storage, seconds, end)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def workers(
    storage: str, count: int, length_s: float, kill_every_s: float, seconds: float, seed: int
) -> dict[str, object]:
    """The bench of workers; raises where a trial was lost or doubled."""
    rng = random.Random(seed)
    Study.open(SPACE, BUDGET, storage=storage).close()
    begun, end = time.monotonic(), time.time() + length_s
    alive = [fork(storage, seconds, end) for _ in range(count)]
    killed = 0
    while time.time() < end:
        time.sleep(min(kill_every_s, max(0.0, end - time.time())))
        if time.time() < end:
            place = rng.randrange(len(alive))
            os.kill(alive[place], signal.SIGKILL)
            os.waitpid(alive[place], 0)
            alive[place], killed = fork(storage, seconds, end), killed + 1
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in alive]
    took = time.monotonic() - begun
    assert set(codes) == {0}, codes
    with Study.open(SPACE, BUDGET, storage=storage) as study:
        left = study.num_running()  # what was begun when the time was up
        search(study, score, searcher="random", num_trials=len(study.scored()) + left)
        trials = study.trials()
        doubled = len(trials) - len({trial.genes for trial in trials})
        lost = sum(trial.state not in ("scored", "rejected") for trial in trials)
        scored = len(study.scored()) - left
    ideal = count * length_s / seconds - killed / 2  # half of an evaluation is lost with each
    assert not lost, lost
    assert not doubled, doubled
    return {
        "workers": count,
        "seconds": round(took, 1),
        "killed": killed,
        "scored": scored,
        "lost": lost,
        "doubled": doubled,
        "of_ideal": round(scored / ideal, 3),
    }


def ask(n: int, searcher: str, storage: str | None) -> list[tuple[int, float, float]]:
    """(size of the study, median ms of `ask`, median ms of `tell`) at powers of ten and at the end."""
    study, found, rows = Study.open(SPACE, BUDGET, storage=storage), SEARCHERS[searcher].sized(n), []
    asked: list[float] = []
    told: list[float] = []
    for number in range(1, n + 1):
        begun = time.perf_counter()
        trial = study.ask(found)
        asked.append(time.perf_counter() - begun)
        assert trial is not None
        begun = time.perf_counter()
        study.tell(trial, score(trial.arch))
        told.append(time.perf_counter() - begun)
        if number in (200, 1000, 2000, 5000, n):
            middle = [1e3 * sorted(times[-200:])[min(100, len(times) // 2)] for times in (asked, told)]
            rows.append((number, *(round(ms, 2) for ms in middle)))
    study.close()
    return rows


def main(words: list[str]) -> None:
    """Read `field=value` and print one line of JSON."""
    given = dict(word.split("=", 1) for word in words)
    kind = given.get("storage", "sqlite")
    with tempfile.TemporaryDirectory() as folder:
        storage = os.environ["VITNAS_POSTGRES"] if kind == "postgres" else str(Path(folder) / "study.db")
        if "ask" in given:
            where = None if kind == "memory" else storage
            rows = ask(int(given["ask"]), given.get("searcher", "random"), where)
            print(
                json.dumps(
                    {"storage": kind, "searcher": given.get("searcher", "random"), "n_ask_ms_tell_ms": rows}
                )
            )
            return
        numbers = {"workers": 8.0, "seconds": 600.0, "kill_every": 5.0, "sleep": 1.0, "seed": 0.0}
        numbers |= {name: float(text) for name, text in given.items() if name != "storage"}
        made = workers(
            storage,
            int(numbers["workers"]),
            numbers["seconds"],
            numbers["kill_every"],
            numbers["sleep"],
            int(numbers["seed"]),
        )
        print(json.dumps({"storage": kind, **made}))


if __name__ == "__main__":
    main(sys.argv[1:])
