"""The ways to start the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vitnas import __version__


@pytest.mark.parametrize("module", ["vitnas", pytest.param("vitnas.cli", marks=pytest.mark.slow)])
def test_python_starts_it(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
