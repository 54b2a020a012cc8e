"""Reads one JSON command a line; forks a process for each, so that it starts in no time and can be killed."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

import sklearn.datasets

import vitnas.stages
from vitnas.cli import commands, main

PRELOADED = (commands, vitnas.stages, sklearn.datasets)  # what a run imports at some time


def child(job: dict[str, Any]) -> None:
    for name, value in job["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 1
    try:
        status = main(job["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


gc.freeze()  # a collection in a fork would copy the pages of all of it
print("ready", flush=True)
for line in sys.stdin:
    process = os.fork()
    if process == 0:
        child(json.loads(line))
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
