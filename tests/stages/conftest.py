"""One finished tiny run for all tests of stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stage_help import Warm, words

from vitnas.cli import main


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole tiny run, made in this process. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(words(folder)) == 0
    return folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    server = Warm(tmp_path_factory.mktemp("warm") / "log.txt")
    yield server
    server.close()
