"""Fixtures for all tests: one thread, a seeded generator, and the folder of golden numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

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
