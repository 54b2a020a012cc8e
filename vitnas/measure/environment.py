"""The machine and the libraries that a number was measured with."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vitnas.version import VERSION

PACKAGES = ("vitnas", "torch", "timm", "onnx", "onnxruntime", "openvino", "executorch", "optuna")

# What decides how fast a Model runs. Memory and the thread count of the moment change from run to run of one machine.
_IDENTITY = ("cpu", "cores", "gpu", "driver", "cuda", "os", "torch", "onnxruntime")


def environment() -> dict[str, Any]:
    """Versions, CPU, memory and GPU of this process's machine, as JSON values.

    Returns:
        `vitnas`, `torch`, `timm`, `onnx`, `onnxruntime`, `optuna`, `python`: version text, None if not installed;
        `os`, `cpu`: names; `cores`: cores this process may use; `threads`: torch's threads; `memory_bytes`: of the
        machine; `gpu`, `driver`, `cuda`: text, None without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    return {
        **{name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "gpu": torch.cuda.get_device_name(0) if has_gpu else None,
        "driver": _driver() if has_gpu else None,
        "cuda": torch.version.cuda if has_gpu else None,
    }


def fingerprint(environment: Mapping[str, Any]) -> str:
    """Ten letters that stay the same as long as latencies of this environment can be compared.

    They are made from CPU, cores, GPU, driver, CUDA, OS and the versions of torch and onnxruntime; not from
    memory, threads (a Latency states its own) or the other packages.
    """
    identity = {name: environment.get(name) for name in _IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def git_commit(folder: Path | str) -> str | None:
    """The commit that `folder` has checked out, `-dirty` added if tracked files differ; None without git."""
    commit = _run(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if not commit:
        return None
    changes = _run(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}-dirty" if changes else commit


def _version(package: str) -> str | None:
    if package == "vitnas":  # also right when the package runs from a checkout that is not installed
        return VERSION
    if package == "torch":
        return str(torch.__version__)  # the metadata leaves out the build (+cpu)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    name = _run(["sysctl", "-n", "machdep.cpu.brand_string"]) if platform.system() == "Darwin" else None
    return name or platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _driver() -> str | None:
    lines = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return lines.splitlines()[0].strip() if lines else None


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
