"""effort=recover and effort=search of `vitnas slim`: what is trained, and that it is never worse."""

from __future__ import annotations

import shutil
from html import unescape
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from slim_help import slim_words

from vitnas.cli import main
from vitnas.records import Result, SlimFront
from vitnas.slimming import Recovery
from vitnas.train import metrics


@pytest.mark.parametrize("effort", ["recover", pytest.param("search", marks=pytest.mark.slow)])
def test_the_chosen_network_learns_from_the_original(
    effort: str, original: Path, slimmed: Path, tmp_path: Path
) -> None:
    """And with effort=search the supernet before it. Recovery is never worse on the holdout."""
    fields = {
        "effort": effort,
        "supernet__epochs": "2",
        "retrain__train__epochs": "4",
        "retrain__train__lr": "1e-3",
    }
    if effort == "recover":  # the stages before are those of effort=fold
        shutil.copytree(slimmed, tmp_path, dirs_exist_ok=True)
        for name in ("run.yaml", "forecast.json", "slimmed.json", "report.html", "test_reads.json"):
            (tmp_path / name).unlink()
        shutil.rmtree(tmp_path / "models")
    assert main(slim_words(original, tmp_path, **fields)) == 0
    recovery, result = Recovery.read(tmp_path), Result.read(tmp_path / "models" / "chosen")
    member = next(each for each in SlimFront.read(tmp_path).members if each.folder == result.start)
    before, after = recovery.before, recovery.after
    assert before.agreement.kl == pytest.approx(member.agreement.kl)
    assert before.accuracy == member.accuracy
    assert recovery.is_better == (after.key > before.key)
    kept = after if recovery.is_better else before
    assert (result.agreement, result.holdout_accuracy) == (kept.agreement, kept.accuracy)
    assert f"{recovery}, in " in unescape((tmp_path / "report.html").read_text())
    weights = [load_file(tmp_path / f / "model.safetensors") for f in (result.start, "models/chosen")]
    assert recovery.is_better != torch.equal(*(each["blocks.0.mlp.fc1.weight"] for each in weights))
    assert recovery.steps == 20
    assert (result.epochs, bool(result.train)) == ((4, True) if recovery.is_better else (0, False))
    stages = {line.stage for line in metrics.read_lines(tmp_path)}
    assert stages == {"retrain/chosen", *(["supernet"] if effort == "search" else [])}
    if effort == "search":
        starts = [load_file(tmp_path / f"{name}.safetensors") for name in ("ordered", "supernet")]
        assert not torch.equal(*(each["blocks.0.mlp.fc1.weight"] for each in starts))
