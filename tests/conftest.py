"""Fixtures for all tests: one thread, a seeded generator, the folder of golden numbers, and finished tiny runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stage_help import FOCUS, Warm, words

from vitnas.cli import main

pytest.register_assert_rewrite("vitnas.testing")

REPO = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder that holds `golden/`, from VITNAS_SHARED or beside the repository. Skips when there is none."""
    folder = Path(os.environ.get("VITNAS_SHARED", REPO.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(
            f"NOT CHECKED against the authors' numbers: {folder / 'golden'} is missing; set VITNAS_SHARED."
        )
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole tiny run, made in this process. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(words(folder)) == 0
    return folder


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a run whose sampler learns. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    assert main(words(folder, **FOCUS)) == 0
    return folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    server = Warm(tmp_path_factory.mktemp("warm") / "log.txt")
    yield server
    server.close()
