"""A search on PostgreSQL: what holds on SQLite holds there, and a server that restarts costs nobody anything.

`make postgres-test` starts a private server; elsewhere these skip.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import search_help
from postgres_server import restart
from search_help import BUDGET, MICRO, evolution, score, told
from stage_help import Warm, words
from test_workers import in_fork, status

from vitnas.searching import SearchRecord, Study, search
from vitnas.searching.database import Database
from vitnas.searching.ledger import lease_of
from vitnas.searching.passwords import shown
from vitnas.searching.storage import _with_password

URL = os.environ.get("VITNAS_POSTGRES", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not URL, reason="NOT CHECKED on PostgreSQL: use `make postgres-test`"),
]


def test_it_gives_what_memory_gives() -> None:
    whole = search(Study.open(MICRO, BUDGET), score, searcher=evolution(), num_trials=30)
    with search(
        Study.open(MICRO, BUDGET, storage=URL, name="same"), score, searcher=evolution(), num_trials=30
    ) as study:
        assert told(study) == told(whole)
        assert study.summary().front == whole.summary().front


def worker(name: str, num_trials: int, die_after: int, pause_s: float) -> int:
    return in_fork(lambda: search_help.main(URL, num_trials, die_after, pause_s, name))


def check(name: str, num_trials: int) -> None:
    """Nothing is lost and nothing doubled."""
    with Study.open(MICRO, BUDGET, storage=URL, name=name) as study:
        trials = study.trials()
        assert len(study.scored()) == num_trials
        assert len({trial.genes for trial in trials}) == len(trials)
        assert study.num_running() == 0


def test_workers_share_a_study_and_a_dead_ones_trial_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pids = [worker("shared", 40, die, 0.005) for die in (3, -1, -1)]
    assert [status(pid) for pid in pids] == [-signal.SIGKILL, 0, 0]
    check("shared", 40)


def test_workers_survive_a_restart_of_the_server() -> None:
    Study.open(MICRO, BUDGET, storage=URL, name="restarted").close()
    command = [sys.executable, search_help.__file__, URL, "80", "-1", "0.2", "restarted"]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for wanted in (10, 40):
        with Study.open(MICRO, BUDGET, storage=URL, name="restarted") as study:
            while len(study.scored()) < wanted:
                time.sleep(0.1)
        restart()
    said = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], said
    check("restarted", 80)
    for text in said:
        assert 1 <= text.count("is away") <= 2, text
        assert text.count("is away") == text.count("is back")
        assert len(text.splitlines()) == 2 * text.count("is away"), "nothing else is said"
        assert "se@cr/et" not in text


def test_a_whole_search_writes_no_password(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fields = """data.max_images=160 data.batch_size=16 space.embed_dims=[16,24] space.depths=[1,2] space.num_heads=[1,2]
        space.head_dim=8 budget=macs<=200K supernet.epochs=1 supernet.warmup_epochs=0 search.num_trials=4
        retrain.train.epochs=1 retrain.train.warmup_epochs=0 retrain.rank_archs=0 retrain.baselines=[]
        export.formats=[] export.latency=[] device=cpu threads=1""".split()
    command = [
        sys.executable,
        "-m",
        "vitnas",
        "run",
        "tour",
        f"folder={folder}",
        f"search.storage={URL}",
        *fields,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    secret = os.environ["VITNAS_STORAGE_PASSWORD"].encode()
    for path in folder.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), path
    assert secret.decode() not in done.stdout + done.stderr
    assert shown(URL).encode() in (folder / "run.yaml").read_bytes()


def test_two_hosts_share_nothing_but_the_database(tmp_path: Path) -> None:
    """Each has a folder of its own with what the documentation names, and a name and processes of its own."""
    apart = ["unshare", "--uts", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("NOT CHECKED with two hosts: this user may not make one.")
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    warm = Warm(tmp_path / "log.txt")
    fields = {"search__storage": URL, "search__num_trials": "60", "seed": "41"}
    fields["data__max_images"] = "1797"  # so that a search takes longer than one host is behind the other
    warm.kill_when(words(one, **fields), (one / "supernet.safetensors").exists)
    warm.close()
    two.mkdir(parents=True)
    # Two files would do; the rest is what preparing writes, so that both hosts begin at one time.
    for path in (*one.glob("*.json"), one / "run.yaml", one / "supernet.safetensors"):
        shutil.copy(path, two)
    hosts = [
        subprocess.Popen(
            [*apart, "sh", "-c", f"hostname {name} && exec {sys.executable} -m vitnas search {folder}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, folder in (("one", one), ("two", two))
    ]
    said = [host.communicate(timeout=250)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    records = [SearchRecord.read(folder) for folder in (one, two)]
    assert records[0].trials == records[1].trials
    assert (records[0].chosen, records[0].front) == (records[1].chosen, records[1].front)
    assert records[0].num_scored == 60
    assert len({trial.genes for trial in records[0].trials}) == len(records[0].trials)
    storage = Database(_with_password(URL))
    found = [
        storage.changed(each._study_id, -1, [])
        for each in storage.get_all_studies()
        if each.study_name[:7] == "search-"
    ]
    storage.remove_session()
    storage.engine.dispose()
    stored = max(found, key=len)  # other tests' have fewer trials
    assert {lease_of(each)["host"].partition("/")[0] for each in stored} == {"one", "two"}
    assert (two / "chosen.json").read_bytes() == (one / "chosen.json").read_bytes()
