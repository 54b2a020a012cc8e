"""A whole run on images with numbers: what it scores, what it says and what its files tell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stage_help import words

from vitnas.cli import main
from vitnas.exporting.card import CARD
from vitnas.predicting import Predictor
from vitnas.predicting.examine import Evaluation
from vitnas.records import Finals, FinalScores, Result, Results
from vitnas.searching import SearchRecord


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures as bright as a table says, in two halves."""
    root = tmp_path_factory.mktemp("measured")
    rng, rows = np.random.default_rng(0), ["file,age,income"]
    for number in range(200):
        shares = rng.uniform(0, 1, 2)
        pixels = rng.integers(0, 40, (8, 8, 3))
        pixels[:4], pixels[4:] = pixels[:4] + int(200 * shares[0]), pixels[4:] + int(200 * shares[1])
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
        rows.append(f"{number}.png,{20 + 50 * shares[0]:.2f},{4000 * shares[1] - 1000:.1f}")
    (root / "labels.csv").write_text("\n".join(rows))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("searcher", ["evolution", "halving"])
def test_a_run_on_numbers_says_what_they_are_worth(
    searcher: str, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    data = {
        "dataset": str(measured),
        "labels": "labels.csv",
        "label_kind": "numbers",
        "target_key": "[age,income]",
    }
    fields = {f"data__{name}": text for name, text in data.items()} | {
        "data__augment": "none",
        "search__searcher": searcher,
        "supernet__epochs": "40",
        "retrain__train__epochs": "60",
        "finals__archs": "0" if searcher == "halving" else "2",
        "finals__epochs": "4",
        "export__formats": "[onnx,torch_export,onnx_float]",
    }
    assert main(words(folder, **fields)) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "numbers  age from 2" in said
    assert "best R²" in said or searcher == "halving"
    assert "accura" not in said.lower(), said
    results, scores, found = Results.read(folder), FinalScores.read(folder), Evaluation.read(folder)
    chosen = results.rows[0]
    assert chosen.test_accuracy is not None
    assert chosen.test_error is not None
    assert chosen.test_accuracy > 0.5
    assert chosen.ci95[0] < chosen.test_accuracy < chosen.ci95[1]
    assert chosen.test_mae == found.score.mae == scores.scores["chosen"].mae
    assert 40 < chosen.test_mae[1] / chosen.test_mae[0] < 160, "in units of theirs"
    assert np.mean(scores.explained["chosen"]) == pytest.approx(chosen.test_accuracy, abs=1e-4)
    assert {each.measure for each in results.verdict} == {"R^2"}
    first, other = (np.mean(scores.explained[role]) for role in ("chosen", results.verdict[0].role))
    assert results.verdict[0].difference == pytest.approx(first - other, abs=1e-5)
    search = SearchRecord.read(folder)
    assert all("error" in trial.values for trial in search.trials if trial.state == "scored")
    assert "R² " in Finals.read(folder).says
    page = re.sub(r"<script.*?</script>", "", (folder / "report.html").read_text(), flags=re.DOTALL)
    for word in ("accura", "top-1 agreement", "Taken for"):
        assert word not in re.sub(r"<[^>]*>", " ", page), word
    assert "Test R²" in page
    assert "Its largest mistakes" in page
    whole = (folder / "report.html").read_text()
    found_data = re.search(r"type=.application/json.[^>]*>(.*?)</script>", whole, re.DOTALL)
    assert found_data is not None
    drawn = json.loads(found_data[1])
    assert "ccuracy" not in json.dumps(drawn)
    for card in (folder / "models" / "chosen" / CARD, folder / "export" / CARD):
        text = card.read_text()
        assert "| R² | R² 0." in text
        assert "| Mean absolute error | " in text
        assert "r_squared" in text
        assert "ccuracy" not in text
    asked = [measured / "0.png", measured / "1.png"]
    told = [Predictor(file).probabilities(asked) for file in (folder / "export" / "model.onnx", folder)]
    np.testing.assert_allclose(*told, rtol=1e-2, atol=0.5)
    assert main(["evaluate", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "R² on 40 test images" in said
    assert f" {chosen.test_accuracy:.3f} " in said
    assert max(map(len, said.splitlines()[:9])) <= 80
    result = Result.read(folder / "models" / "chosen")
    assert result.holdout_error is not None
    assert main(["specialize", str(folder), "budget=macs<=150K"]) in (0, 2)
    assert "accura" not in capsys.readouterr().out
