"""Fixtures for all tests: one thread, a seeded generator, the folder of golden numbers, and finished tiny runs."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from filelock import FileLock

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


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is never freed, extensions written with nanobind tell as leaks


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


def whole(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` makes once for all processes of this session, the same for each of them."""
    base = factory.getbasetemp()
    first = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"first_{name}"
    with FileLock(f"{first}.lock"):
        if not (first / "whole").exists():
            make(first / "half" / "run")
            (first / "half").rename(first / "whole")
    return first / "whole" / "run"


def made(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A copy of such a folder."""
    return Path(shutil.copytree(whole(factory, name, make), factory.mktemp(name) / "run"))


def finish(folder: Path, **changes: str) -> None:
    """Do a whole tiny run. What that needs is imported here, so that tests without one start at once."""
    from stage_help import words

    from vitnas.cli import main

    assert main(words(folder, **changes)) == 0


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole tiny run. Copy it before changing anything."""
    return made(tmp_path_factory, "finished", finish)


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a run whose sampler learns. Copy it before changing anything."""
    from stage_help import FOCUS

    return made(tmp_path_factory, "learned", lambda folder: finish(folder, **FOCUS))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small trained network, which runs name. Copy it before changing anything."""
    from slim_help import save, trained

    return whole(tmp_path_factory, "original", lambda folder: save(trained(), folder))


@pytest.fixture(scope="session")
def slimmed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run that slimmed it. Copy it before changing anything."""
    from slim_help import slim_words

    from vitnas.cli import main

    def make(folder: Path) -> None:
        assert main(slim_words(original, folder)) == 0

    return made(tmp_path_factory, "slimmed", make)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    from stage_help import Warm

    server = Warm(tmp_path_factory.mktemp("warm") / "log.txt")
    yield server
    server.close()
