"""benchmarks/evidence_search.py at toy size, from one end to the other, and what it promises of costs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vitnas.runs import read_jsonl
from vitnas.stages.finals import epochs_in_all

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "benchmarks" / "evidence_search.py"


def words(folder: Path, *arms: str) -> list[str]:
    return [
        sys.executable, str(SCRIPT), "--dataset", "digits", "--out", str(folder), "--size", "tiny", "--seeds", "0",
        "--arms", *arms,
    ]  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence_search", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evidence_search", module)  # dataclasses look there for their names
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_goes_through_and_makes_nothing_twice(tmp_path: Path) -> None:
    told = [
        subprocess.run(words(tmp_path, *arms), capture_output=True, text=True, check=True, cwd=REPO).stdout
        for arms in (["unified", "halving"], ["unified", "halving", "rank", "vitas"])
    ]
    rows = list(read_jsonl(tmp_path / "evidence_search.jsonl"))
    models = {(row["arm"], row["role"]): row for row in rows if row["what"] == "model"}
    assert [(row["arm"], row["role"]) for row in rows if row["what"] == "model"] == list(models)
    roles = {"chosen", "hand_scaled", "random_search"}
    assert set(models) == {
        *(("unified", role) for role in roles), ("halving", "chosen"), ("vitas", "chosen")
    }  # fmt: skip
    assert all(2.7e6 <= row["macs"] <= 3e6 for row in models.values())
    # One epoch of 128 images (whole batches), three passes each.
    assert all(
        row["train_tmacs"] == pytest.approx(384 * row["macs"] / 1e12, abs=1e-6) for row in models.values()
    )
    (rank,) = (row for row in rows if row["what"] == "rank")
    trained = [row for row in rows if row["what"] == "trained"]
    assert rank["n"] == len(trained) == 3
    assert rank["trained"] == [row["accuracy"] for row in trained]
    assert all(text.count("\nhand_scaled ") == 1 for text in told)
    assert "unified - halving" in told[1]


@pytest.mark.slow
def test_all_searches_cost_the_same(script: ModuleType, tmp_path: Path) -> None:
    options = script.parsed(words(tmp_path, "unified")[2:])
    for size in (script.SMALL, script.LARGE, script.LATENCY):
        evidence = script.Evidence(options, size)
        per_epoch = script.STEP * size.train_images
        for arm in ("unified", "halving", "mixers", "vit_resnas", "autoformer", "vitas"):
            run = evidence.run(arm, 0)
            entrants = run.entrants
            images = per_epoch * epochs_in_all(run.finals, run.retrain.train, entrants)
            images += run.search.num_trials * size.holdout * (2 if run.search.trains else 1)
            macs = images * size.cost(arm)
            if not run.search.trains:
                space = run.space.build(image_size=32, in_chans=3, num_classes=10)
                macs += per_epoch * run.supernet.epochs * script.mean_macs(run.sampler, space, size.near)
            # Halving adds whole Archs.
            assert macs == pytest.approx(size.total * per_epoch * size.macs, rel=0.05), arm
