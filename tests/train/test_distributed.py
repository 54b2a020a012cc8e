"""Several processes: different Archs in one step, one set of weights, one search, one voice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vitnas.data import Augment, Readings, TrainBatches, synthetic
from vitnas.records import Manifest, Results
from vitnas.searching import SearchRecord
from vitnas.train import Classification, Engine, metrics
from vitnas.train.checkpoint import load_checkpoint
from vitnas.train.engine import adopt_slurm, first_host
from vitnas.train.feed import Feed

HERE = Path(__file__).parent


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment() -> dict[str, str]:
    clean = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return {**clean, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw; `folder` is where they worked."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(HERE / "two_ranks.py"), str(folder), free_port()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment())
    assert done.returncode == 0, done.stderr
    return [{**json.loads((folder / f"rank{rank}.json").read_text()), "folder": folder} for rank in range(2)]


def test_the_engine_knows_its_place(seen: list[dict[str, Any]]) -> None:
    assert [found["rank"] for found in seen] == [0, 1]
    assert [found["is_main"] for found in seen] == [True, False]
    assert {found["world"] for found in seen} == {2}
    assert {found["device"].partition(":")[0] for found in seen} == {"cpu"}
    assert {found["sum"] for found in seen} == {3.0}


def test_gradients_are_the_mean_and_unused_parameters_count_as_zero(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        gradients = found["gradients"]
        assert gradients["difference"] < 1e-6
        assert gradients["third_block_unused"], "what nobody used keeps no gradient"
        assert gradients["none_after"] > 0
    before = [found["gradients"]["none_before"] for found in seen]
    assert before[0] != before[1], "the ranks trained different Archs"
    assert max(before) > seen[0]["gradients"]["none_after"], (
        "the smaller Arch's rank got the other's gradients"
    )


def test_ranks_end_with_the_same_weights(seen: list[dict[str, Any]]) -> None:
    first, second = (found["training"] for found in seen)
    assert first["steps"] == second["steps"] == 4
    assert first["sum"] == second["sum"]
    assert first["moved"] == second["moved"]
    assert any(name.startswith("blocks.1.") for name in first["moved"])
    assert not any(name.startswith("blocks.2.") for name in first["moved"]), (
        "AdamW leaves alone what nobody used"
    )
    assert first["first_batch"] != second["first_batch"], "ranks see different images"
    assert first["drawn"] != second["drawn"], "ranks draw different Archs"


def test_ranks_train_one_lift(seen: list[dict[str, Any]]) -> None:
    """From the first process's teacher, with the gradients of both, whose images and Archs differ."""
    first, second = (found["lifts"] for found in seen)
    assert len(first) == 4
    assert first == second
    assert first[0] != first[-1]


def test_ranks_keep_answers_in_one_file(seen: list[dict[str, Any]]) -> None:
    """Each its own, which change nothing."""
    without, written, read = seen[0]["answers"]
    assert (without[0], written[0], read[0]) == (0, 0, 3)
    assert without[1:] == written[1:] == read[1:]
    assert seen[0]["answers"] == seen[1]["answers"]
    (path,) = (seen[0]["folder"] / "answers").iterdir()
    assert path.name.startswith("logits-")


def test_ranks_have_one_centre_of_all_their_images(seen: list[dict[str, Any]]) -> None:
    first, second = (found["self_taught"] for found in seen)
    assert first["centre"] == second["centre"]
    assert first["alone"] != second["alone"]
    means = [(a + b) / 2 for a, b in zip(first["alone"], second["alone"], strict=True)]
    assert first["centre"] == pytest.approx(means, rel=1e-4)


def test_a_step_takes_three_reductions(seen: list[dict[str, Any]]) -> None:
    """Has any failed, who used which tensor, and the gradients, which fit one bucket."""
    assert [found["reductions"] for found in seen] == [3, 3]


def test_metrics_have_each_step_once(seen: list[dict[str, Any]]) -> None:
    assert [line.step for line in metrics.read_lines(seen[0]["folder"])] == [1, 2, 3, 4]
    assert (seen[0]["folder"] / "checkpoints" / "two.safetensors").exists()


def test_ranks_share_one_search(seen: list[dict[str, Any]]) -> None:
    first, second = (found["searching"] for found in seen)
    assert first["scored"] == second["scored"]
    assert len(first["scored"]) == 12
    assert sorted(first["mine"] + second["mine"]) == sorted(first["scored"]), "no Arch is scored twice"
    assert first["mine"]
    assert second["mine"]


def test_one_process_writes_and_the_other_waits(seen: list[dict[str, Any]]) -> None:
    assert [found["once"]["made"] for found in seen] == [1, 0]
    assert all(found["once"]["there"] for found in seen)
    assert {found["once"]["tells"] for found in seen} == {"Silent"}


def test_the_first_process_tells_the_others(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        assert found["told"] == {
            "value": ["from", 0],
            "error": "no such budget, says rank 0",
            "weight": 4.0,
        }, "the second rank began with weights of 2"


FAULTS = {
    **{
        f"{where} {rank}": ("UserError", f"the {where} of rank {rank} failed at step 2")
        for where in ("loader", "hook", "monitor")
        for rank in (0, 1)
    },
    "loss": ("NonFiniteLossError", "the loss of Arch "),
    "checkpoint": ("UserError", "train.safetensors cannot be written ("),
    "metrics": ("UserError", "metrics.jsonl cannot be "),
    "other folder": (
        "UserError",
        "continues at step 3, process 1 at step 0; all must see the same run folder",
    ),
    "from_first": ("OSError", "the disk is on fire"),
    "once": ("OSError", "the disk is on fire"),
    "stage": ("ZeroDivisionError", "a mistake of ours"),
    "search": ("UserError", "the third Arch of rank 1 cannot be scored"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_one_process_meets_ends_all_with_the_same_sentence(
    seen: list[dict[str, Any]], fault: str
) -> None:
    (kind, text, seconds), other = (found["faults"][fault] for found in seen)
    assert kind == FAULTS[fault][0]
    assert FAULTS[fault][1] in text
    assert other[:2] == [kind, text]
    assert max(seconds, other[2]) < 30


@pytest.mark.slow
def test_a_whole_run_by_torchrun(tmp_path: Path) -> None:
    fields = """data.max_images=160 data.batch_size=16 space.embed_dims=[16,24] space.depths=[1,2] space.num_heads=[1,2]
        space.head_dim=8 budget=macs<=200K supernet.epochs=2 supernet.warmup_epochs=0 supernet.log_every=1
        supernet.monitor_every=1 search.num_trials=6 retrain.train.epochs=1 retrain.train.warmup_epochs=0
        retrain.rank_archs=2 retrain.rank_epochs=1 export.formats=[] export.latency=[] threads=1""".split()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
    ]
    command += ["-m", "vitnas.cli", "run", "tour", f"folder={tmp_path / 'run'}", *fields]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment())
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert [row.role for row in Results.read(folder).rows] == ["chosen", "hand_scaled", "random_search"]
    assert len(Readings.read(folder).readings) == 1
    assert Manifest.read(folder).processes == 2
    assert SearchRecord.read(folder).num_scored == 6
    lines = metrics.read_lines(folder)
    steps = [(line.stage, line.step) for line in lines if isinstance(line, metrics.Step)]
    assert len(steps) == len(set(steps))
    for said in ("tour into", "Feasibility", "accuracy smallest", "Same budget, three ways", "report.html"):
        assert (
            done.stdout.count(said) <= 2 if said == "accuracy smallest" else done.stdout.count(said) == 1
        ), said
    bad = [*command[: command.index("tour") + 1], f"folder={tmp_path / 'run'}", "seed=9", *fields]
    done = subprocess.run(bad, capture_output=True, text=True, timeout=100, env=environment())
    assert done.returncode != 0
    assert "vitnas: " in done.stderr
    assert "holds another run (seed: 0 then, 9 now)" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_a_killed_rank_ends_the_others_with_a_sentence(dying: int, tmp_path: Path) -> None:
    """Also where no launcher sees to it, and where the first is killed, whom all others ask."""
    world = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(HERE / "killed_rank.py"), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command,
            env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    checkpoint, end = tmp_path / "checkpoints" / "train.safetensors", time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.05)
    killed = time.time()
    ranks[dying].send_signal(signal.SIGKILL)
    said, _ = ranks[1 - dying].communicate(timeout=60)
    ranks[dying].communicate()
    last = said.strip().splitlines()[-1]
    assert "Traceback" not in said
    assert "another process of this run cannot be reached (" in last
    assert float(last.split()[0]) - killed < 30
    assert checkpoint.exists()
    # One process goes on where two were.
    _, meta = load_checkpoint(checkpoint)
    third = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    before, end = checkpoint.read_bytes(), time.monotonic() + 60
    while checkpoint.read_bytes() == before and time.monotonic() < end:
        time.sleep(0.05)
    third.kill()
    said, _ = third.communicate()
    assert "train: 2 processes began, 1 go on at epoch" in said
    told = [line.epoch for line in metrics.read_lines(tmp_path) if isinstance(line, metrics.Step)]
    assert told == sorted(set(told)), "no part of an epoch is told of twice"
    assert told[-1] > meta["done"][0]


@pytest.mark.slow
def test_weights_are_equal_bit_for_bit_in_whatever_order_processes_come(tmp_path: Path) -> None:
    """Which starts first, and which is late at which step."""
    found: list[str] = []
    for number, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 2, 0)]):
        world = {**environment(), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        command = [sys.executable, str(HERE / "killed_rank.py"), str(tmp_path / str(number)), "8"]
        ranks = []
        for rank in order:
            own = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True))
            time.sleep(0.5)
        found += [rank.communicate(timeout=200)[0].strip().splitlines()[-1] for rank in ranks]
    assert len(found[0]) == 64
    assert len(found) == 9
    assert len(set(found)) == 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 3), (3, 4)])
@pytest.mark.parametrize("steps", [0, 1, 5, 17])
def test_another_number_of_processes_sees_the_rest_of_the_epoch(before: int, after: int, steps: int) -> None:
    """None of its images twice, and all that a whole batch can be made of."""
    data = synthetic(num_classes=4, image_size=8, n=200, seed=0)

    def feeds(world: int) -> list[Feed]:
        engines = [SimpleNamespace(world=world, rank=rank) for rank in range(world)]
        return [
            Feed(
                batches=TrainBatches(data.train, Augment(), batch_size=6, seed=0, rank=e.rank, world=world),
                task=Classification(),
                mixup=None,
                seed=0,
                engine=cast(Engine, e),
            )
            for e in engines
        ]

    first, second = feeds(before), feeds(after)
    epoch, images = first[0].done(steps)
    number = second[0].number_behind(epoch, images)
    seen = {feed.place(n) for feed in first for n in range(steps)}
    per_epoch = second[0].batches.steps_per_epoch
    rest = [feed.place(n) for feed in second for n in range(number, (epoch + 1) * per_epoch)]
    assert not seen & set(rest)
    parts = len(data.train) // 6
    left = parts - images // 6
    assert len(rest) > left - 2 * after


SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0",
         "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[007-009,12]-ib,other",
         "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}  # fmt: skip
TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of one of eight tasks; what is set in a test is taken back."""
    environ = {
        key: value for key, value in os.environ.items() if not key.startswith("SLURM") and key not in TORCH
    }
    monkeypatch.setattr(os, "environ", {**environ, **SLURM})
    return monkeypatch


def test_slurm_tells_rank_and_first_host(slurm: pytest.MonkeyPatch) -> None:
    adopt_slurm()
    assert [os.environ[name] for name in TORCH] == ["5", "1", "8", "gpu007-ib", "23456"], (
        "the first of the step's hosts, not the one that called srun"
    )


def test_what_torchrun_set_stays(slurm: pytest.MonkeyPatch) -> None:
    os.environ["RANK"] = "2"
    adopt_slurm()
    assert os.environ["RANK"] == "2"
    assert "WORLD_SIZE" not in os.environ


def test_a_given_address_is_kept(slurm: pytest.MonkeyPatch) -> None:
    os.environ |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29999"}
    adopt_slurm()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node1", "29999")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[003-005,9],m", "n003"), ("rack[1-2]node[7,9]", "rack1node7"), ("a,b[1-2]", "a")],
)
def test_the_first_of_a_list_of_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_second_step_of_a_job_has_another_port(slurm: pytest.MonkeyPatch) -> None:
    os.environ["SLURM_STEP_ID"] = "3"
    adopt_slurm()
    assert os.environ["MASTER_PORT"] == str(23456 + 3 * 37)


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": None},
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_STEP_ID": None, "SLURM_PROCID": "0"},
        {"SLURM_STEP_ID": str(0xFFFFFFFB), "SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NUM_TASKS": "4"},
    ],
    ids=[
        "one task",
        "a login shell",
        "a batch script",
        "a batch script's own number",
        "an interactive shell",
    ],
)
def test_what_is_no_task_of_srun_is_no_group(
    slurm: pytest.MonkeyPatch, change: dict[str, str | None]
) -> None:
    """A job's script and an interactive shell have some of the variables, too, and wait for nobody."""
    for name, value in change.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    adopt_slurm()
    assert not set(TORCH) & set(os.environ)
