"""Fixtures for all tests: one thread, a seeded generator, the folder of golden numbers, and finished tiny runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

pytest.register_assert_rewrite("vitnas.testing")

if TYPE_CHECKING:
    from stage_help import Warm

REPO = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """What is imported and collected by now stays: the garbage collector, which every training calls, need not look
    at these millions of objects each time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder that holds `golden/`, from VITNAS_SHARED or beside the repository.

    Without such a folder the test skips, loudly; with one that lacks what the test needs it fails, as a check that
    silently no longer runs is none.
    """
    folder = Path(os.environ.get("VITNAS_SHARED", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"NOT CHECKED against the authors' numbers: {folder} is missing; set VITNAS_SHARED.")
    if not (folder / "golden").is_dir():
        pytest.fail(f"{folder} is there but has no golden/; the authors' numbers cannot be met.")
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def finish(folder: Path, **changes: str) -> Path:
    """Do a whole tiny run. What that needs is imported here, so that tests without one start at once."""
    from stage_help import words

    from vitnas.cli import main

    assert main(words(folder, **changes)) == 0
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole tiny run, made in this process. Copy it before changing anything."""
    return finish(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a run whose sampler learns. Copy it before changing anything."""
    from stage_help import FOCUS

    return finish(tmp_path_factory.mktemp("learned") / "run", **FOCUS)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small trained network."""
    from slim_help import save, trained

    return save(trained(), tmp_path_factory.mktemp("original") / "net")


@pytest.fixture(scope="session")
def slimmed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run that slimmed it. Copy it before changing anything."""
    from slim_help import slim_words

    from vitnas.cli import main

    folder = tmp_path_factory.mktemp("slimmed") / "run"
    assert main(slim_words(original, folder)) == 0
    return folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    from stage_help import Warm

    server = Warm(tmp_path_factory.mktemp("warm") / "log.txt")
    yield server
    server.close()
