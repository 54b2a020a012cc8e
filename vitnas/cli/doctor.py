"""doctor: is this machine ready? Versions, devices and extras, and a try of all that a run needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import psutil
import torch
from rich.console import Console

from vitnas.errors import UserError, first_line
from vitnas.measure.environment import environment

EXTRAS = {
    "data": ("datasets", "hfds/ dataset strings"),
    "dashboard": ("optuna_dashboard", "vitnas dashboard"),
    "executorch": ("executorch", "export.formats=[executorch]"),
    "openvino": ("openvino", "latency<=5ms@openvino,batch=1"),
    "postgres": ("psycopg", "many workers on one search"),
    "track": ("tensorboard", "trackers=[tensorboard]"),
}
LEAST_DISK, LEAST_MEMORY = 2 << 30, 2 << 30  # bytes that a run of a few thousand images fits in


def doctor_command(words: list[str], console: Console) -> None:
    """Versions, devices and extras; says what is missing and how to get it.

    Raises:
        UserError: something that every run needs does not work.
    """
    if words:
        raise UserError(f"`vitnas doctor` takes nothing, but {words[0]!r} was given. Leave it out.")
    found = environment()
    for key, value in found.items():
        name, _, unit = key.partition("_")
        if unit == "bytes" and value is not None:
            value = f"{value / 1e9:.1f} GB"
        console.out(f"{name:<16} {'none' if value is None else value}")
    for extra, (module, use) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        state = (
            metadata.version(module.replace("_", "-")) if there else f"missing: pip install 'vitnas[{extra}]'"
        )
        console.out(f"extra {extra:<10} {state}  ({use})")
    wrong = []
    for name, check in CHECKS.items():
        try:
            said = check()
        except Exception as error:  # whatever a broken installation raises
            wrong.append(name)
            said = f"NOT RIGHT: {first_line(error)}"
        console.out(f"check {name:<10} {said}")
    if wrong:
        raise UserError(
            f"this machine is not ready ({', '.join(wrong)}); a run needs all of it. Mend what is said above."
        )


def _computes() -> str:
    """torch on every device that it sees."""
    devices = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    for device in devices:
        if float(torch.ones(2, 2, device=device).matmul(torch.ones(2, 2, device=device)).sum()) != 8:
            raise UserError(f"{device} computes wrongly. Look at its driver.")
    return f"torch computes on {', '.join(devices)}"


def _exports() -> str:
    """A file written and run."""
    import onnx
    import onnxruntime

    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "try", [value("x", 1, [1])], [value("y", 1, [1])]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": torch.tensor([-1.0]).numpy()})
    if y[0] != 0:
        raise UserError("ONNX Runtime computes wrongly. Install it again.")
    return f"ONNX Runtime runs files; it has {', '.join(onnxruntime.get_available_providers())}"


def _threads() -> str:
    there, used = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        torch.get_num_threads(),
    )
    advice = "" if there == used else "; OMP_NUM_THREADS or threads=N says another number"
    return f"{used} threads on {there} CPUs{advice}"


def _memory() -> str:
    free = psutil.virtual_memory().available
    if free < LEAST_MEMORY:
        raise UserError(f"{free / 1e9:.1f} GB of memory are free; a run takes 2. Close other programs.")
    return f"{free / 1e9:.1f} GB of memory are free"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < LEAST_DISK:
        raise UserError(
            f"{free / 1e9:.1f} GB of disk are free in {Path.cwd()}; a run takes 2. Make room, or use folder=PATH."
        )
    return f"{free / 1e9:.1f} GB of disk are free in {Path.cwd()}"


def _writes() -> str:
    """Files that are renamed, and a database that is locked, both as run folders need them."""
    with tempfile.TemporaryDirectory(prefix=".vitnas-", dir=Path.cwd()) as folder:
        file = Path(folder) / "a"
        file.write_bytes(b"")
        os.replace(file, Path(folder) / "b")
        with sqlite3.connect(Path(folder) / "study.db") as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("CREATE TABLE t (x)")
        database.close()
    return f"files and databases can be written in {Path.cwd()}"


CHECKS: Mapping[str, Callable[[], str]] = {
    "torch": _computes,
    "onnx": _exports,
    "threads": _threads,
    "memory": _memory,
    "disk": _disk,
    "writing": _writes,
}
