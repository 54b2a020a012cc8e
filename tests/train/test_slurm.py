"""docs/slurm.sh with an `srun` made up: two tasks make one world, and at the end of the time the job goes on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stage_help import FIELDS, has_step

from vitnas.records import Manifest
from vitnas.train.checkpoint import load_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "slurm.sh"

# As srun does: every task gets the step's variables, and signals go to all of them.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
unset RANK WORLD_SIZE
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_ID=0 SLURM_STEP_NODELIST=127.0.0.1
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids[task]=$!; done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
status=0
for pid in "${pids[@]}"; do
  while wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null; do :; done
  [ $code = 0 ] || status=$code
done
exit $status
"""


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.mark.slow
def test_a_job_goes_on_when_its_time_is_up(tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    program(bin_, "srun", SRUN)
    program(bin_, "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path / "requeued"}\n')
    program(bin_, "vitnas", f'#!/bin/sh\nexec {sys.executable} -m vitnas "$@"\n')
    folder = tmp_path / "run"
    fields = {
        **FIELDS,
        "supernet.epochs": "400",
        "supernet.checkpoint_minutes": "1000",
        "supernet.monitor_every": "0",
    }
    fields |= {
        "retrain.baselines": "[]",
        "retrain.rank_archs": "0",
        "export.formats": "[]",
        "export.latency": "[]",
    }
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RANK", "WORLD"))
    }
    job = {
        **clean,
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "FOLDER": str(folder),
        # The variables of a batch script: it is no task itself.
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "OMP_NUM_THREADS": "1",
    }
    words = [f"{name}={value}" for name, value in fields.items()]
    script = subprocess.Popen(
        ["bash", str(SCRIPT), *words], env=job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    ready, end = has_step(folder, "supernet", 20), time.monotonic() + 120
    while not ready() and time.monotonic() < end and script.poll() is None:
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    said, _ = script.communicate(timeout=100)
    assert script.returncode == 0, said
    assert "Traceback" not in said
    assert "goes on later" in said
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert Manifest.read(folder).processes == 2
    _, meta = load_checkpoint(folder / "checkpoints" / "supernet.safetensors")
    assert meta["step"] >= 20
