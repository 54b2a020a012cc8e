"""Many workers on one search, some of them killed: nothing lost, nothing doubled, and how near to ideal they come.

    python benchmarks/workers.py storage=sqlite workers=8 seconds=600
    python tests/searching/postgres_server.py python benchmarks/workers.py storage=postgres workers=64 seconds=600
    python benchmarks/workers.py ask=10000                  what a question costs while a study grows

Each worker is a process that scores an Arch by sleeping for a second; every five seconds one of them is killed, as
`kill -9` does, and another started. The ideal is one Arch per worker and second, but for what killed workers had begun.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import random
import signal
import struct
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


class Clock:
    """The moment at which all workers end, which is known when the first of them are ready: shared with every fork."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def set(self, end: float) -> None:
        """Let the workers begin."""
        self._memory[:] = struct.pack("d", end)

    def end(self) -> float:
        """0 until they may begin."""
        return float(struct.unpack("d", self._memory[:])[0])


def work(storage: str, seconds: float, clock: Clock, ready: int) -> None:
    """Score Archs until the end, each in `seconds`."""

    def evaluator(arch: Arch) -> Mapping[str, float]:
        time.sleep(seconds)
        return score(arch)

    def stop(study: Study, trial: Trial) -> None:
        if time.time() > clock.end():
            raise TimeoutError

    with Study.open(SPACE, BUDGET, storage=storage) as study:
        os.write(ready, b".")
        while not clock.end():
            time.sleep(0.05)
        try:
            search(study, evaluator, searcher="random", num_trials=10**6, on_trial=stop)
        except TimeoutError:
            return


def fork(storage: str, seconds: float, clock: Clock, ready: int) -> int:
    """A worker, as a copy of this process, which has imported everything."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(storage, seconds, clock, ready)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def server_s() -> float:
    """Seconds of a processor that the PostgreSQL server of the environment has used; 0 where there is none."""
    if "VITNAS_POSTGRES_DATA" not in os.environ:
        return 0.0
    first = (Path(os.environ["VITNAS_POSTGRES_DATA"]) / "postmaster.pid").read_text().split()[0]
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, fields = path.parent.name, path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if first in (pid, fields[1]):  # the server's first process has those of its children that have ended
            ticks += sum(map(int, fields[11:15] if pid == first else fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def workers(
    storage: str, count: int, length_s: float, kill_every_s: float, seconds: float, seed: int
) -> dict[str, object]:
    """The bench of workers; raises where a trial was lost or doubled."""
    rng, clock, (readable, ready) = random.Random(seed), Clock(), os.pipe()
    Study.open(SPACE, BUDGET, storage=storage).close()
    gc.collect()
    gc.freeze()  # else each collection in a fork copies the pages of all that was imported, as no other worker has to
    alive = [fork(storage, seconds, clock, ready) for _ in range(count)]
    opened = 0
    while opened < count:
        opened += len(os.read(readable, count))
    server, begun, end = server_s(), time.monotonic(), time.time() + length_s
    clock.set(end)
    killed = 0
    while time.time() < end:
        time.sleep(min(kill_every_s, max(0.0, end - time.time())))
        if time.time() < end:
            place = rng.randrange(len(alive))
            os.kill(alive[place], signal.SIGKILL)
            os.waitpid(alive[place], 0)
            alive[place], killed = fork(storage, seconds, clock, ready), killed + 1
    codes, cpu_s = [], 0.0
    for pid in alive:
        _, status, used = os.wait4(pid, 0)
        codes.append(os.waitstatus_to_exitcode(status))
        cpu_s += used.ru_utime + used.ru_stime
    took, server = time.monotonic() - begun, server_s() - server
    gc.unfreeze()  # what is never freed, extensions written with nanobind tell as leaks
    assert set(codes) == {0}, codes
    with Study.open(SPACE, BUDGET, storage=storage) as study:
        dropped = sum("dropped" in each.user_attrs for each in study._stored())
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
        "met_another": dropped,
        "lost": lost,
        "doubled": doubled,
        "worker_ms_per_trial": round(1e3 * cpu_s / scored, 1),
        "server_ms_per_trial": round(1e3 * server / scored, 1),
        "of_ideal": round(scored / ideal, 3),
    }


def ask(n: int, searcher: str, storage: str | None) -> list[tuple[int, float, float, float]]:
    """(size of the study, ms of this process for an `ask`, for a `tell`, ms of a server for both), of its processor.

    Means over the 200 Trials before: other work on the machine makes a clock slow, not these.
    """
    study, found, rows = Study.open(SPACE, BUDGET, storage=storage), SEARCHERS[searcher].sized(n), []
    asked = told = 0.0
    server = server_s()
    for number in range(1, n + 1):
        begun = time.process_time()
        trial = study.ask(found)
        asked += time.process_time() - begun
        assert trial is not None
        begun = time.process_time()
        study.tell(trial, score(trial.arch))
        told += time.process_time() - begun
        if number % 200 == 0 or number == n:
            now = server_s()
            if number in (200, 1000, 2000, 5000, n):
                rows.append((number, *(round(5 * each, 2) for each in (asked, told, now - server))))
            asked, told, server = 0.0, 0.0, now
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
                    {
                        "storage": kind,
                        "searcher": given.get("searcher", "random"),
                        "n_ask_ms_tell_ms_server_ms": rows,
                    }
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
