"""`make audit` never takes silence for good news."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def audit() -> ModuleType:
    loader = SourceFileLoader("audit", str(Path(__file__).parents[2] / ".ci" / "audit"))
    spec = spec_from_loader("audit", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_what_is_told(audit: ModuleType) -> None:
    good = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": []}]}
    silent = {"name": "c", "skip_reason": "Dependency not found"}
    assert audit.told([good]) == ("1 packages checked, 0 advisories.", 0)
    assert audit.told([silent, silent])[1] == 3
    assert audit.told([silent])[0].startswith("NOT CHECKED")
    assert audit.told([]) == audit.told([silent])
    text, status = audit.told([good, bad, silent])
    assert status == 1
    assert text.splitlines() == [
        "b 2: PYSEC-1, mended in no version",
        "2 packages checked, 1 advisories.",
        "NOT CHECKED: c.",
    ]
