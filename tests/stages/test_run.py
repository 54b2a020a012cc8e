"""A whole run: its files, the discipline of its splits, what it exports, and that a second time does nothing."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from stage_help import refused, words

from vitnas.cli import main
from vitnas.cli.fields import open_run
from vitnas.counting import count
from vitnas.data import DataConfig, EvalBatches, Readings, open_data
from vitnas.model.named import ArchFile
from vitnas.predicting.examine import Evaluation
from vitnas.records import ExportRecord, LatencyRecord, Manifest, Result, Results
from vitnas.searching import SearchRecord
from vitnas.stages import Context
from vitnas.stages.results import timed_on
from vitnas.stages.run import Run, SearchConfig
from vitnas.train import metrics

FILES = """run.yaml manifest.json space.json feasibility.json metrics.jsonl supernet.safetensors study.db search.json
    ranking.json checkpoints/supernet.safetensors correlation.json test_reads.json test_scores.json results.json
    report.html export/model.onnx export/export.json export/latency.json""".split()
ROLES = ("chosen", "hand_scaled", "random_search")


def test_every_file_of_the_run_folder_is_there(finished: Path) -> None:
    wanted = [*FILES]
    for role in ROLES:
        wanted += [
            f"models/{role}/{name}"
            for name in ("config.json", "model.safetensors", "arch.json", "result.json")
        ]
    for arch_id in SearchRecord.read(finished).front:
        wanted += [f"front/{arch_id}/{name}" for name in ("config.json", "model.safetensors", "arch.json")]
    assert not [name for name in wanted if not (finished / name).is_file()]
    assert not [path for path in finished.rglob(".*")], "no file that was written aside stays"
    assert not [path for path in finished.rglob("*") if path.suffix in (".pkl", ".pt", ".pth", ".bin")]


def test_the_test_split_is_read_once_and_by_nothing_else(finished: Path) -> None:
    (reading,) = Readings.read(finished).readings
    assert reading.num_images == 240
    assert reading.purpose.startswith("final table")
    for name in ("search.json", "correlation.json"):
        assert "test" not in (finished / name).read_text()
    found = Manifest.read(finished).data.counts
    assert sum(found["train"]) + sum(found["holdout"]) == 240
    for role in ROLES:
        assert Result.read(finished / "models" / role).n_holdout == sum(found["holdout"])


def test_the_table_says_how_sure_it_is(finished: Path) -> None:
    results = Results.read(finished)
    assert [row.role for row in results.rows] == list(ROLES)
    assert results.chosen == SearchRecord.read(finished).chosen
    for row in results.rows:
        low, high = row.ci95
        assert row.test_accuracy is not None
        assert 0 <= low <= row.test_accuracy <= high <= 1
        assert row.n_test == 240
        assert set(row.latency_ms) == {"onnxruntime"}
        assert row.latency_ms["onnxruntime"].median_ms > 0
        assert row.macs <= 200_000


def test_the_search_stays_within_the_budget(finished: Path) -> None:
    search = SearchRecord.read(finished)
    assert search.num_scored == 6
    assert all(trial.costs.macs <= 200_000 for trial in search.trials if trial.state == "scored")
    for arch_id in search.front:
        assert ArchFile.read(finished / "front" / arch_id).arch.id == arch_id


def test_metrics_have_every_step_once(finished: Path) -> None:
    lines = list(metrics.read_lines(finished))
    steps = [(line.stage, line.step) for line in lines if isinstance(line, metrics.Step)]
    assert len(steps) == len(set(steps))
    assert {stage for stage, _ in steps} >= {"supernet", *(f"retrain/{role}" for role in ROLES)}
    assert any(isinstance(line, metrics.Monitored) for line in lines)


@pytest.mark.parametrize("role", ROLES)
def test_exported_parameters_are_those_reported(finished: Path, role: str) -> None:
    model = timm.create_model(f"local-dir:{finished / 'models' / role}", pretrained=True)
    result = Result.read(finished / "models" / role)
    arch = ArchFile.read(finished / "models" / role).arch
    params = sum(p.numel() for p in model.parameters())
    assert params == result.params == count(arch).params
    assert count(arch).macs == result.macs
    if role == "chosen":
        exported = ExportRecord.read(finished / "export").files
        assert exported["timm"].exported_params == exported["onnx"].params == params
        assert exported["timm"].max_abs_diff == 0
        assert exported["timm"].n_images > 30


def test_where_the_chosen_model_is_wrong_is_told(finished: Path) -> None:
    found, result = Evaluation.read(finished), Result.read(finished / "models" / "chosen")
    assert result.test_accuracy == found.score.accuracy
    assert sum(each.right for each in found.classes) == round(found.score.accuracy * found.score.n)
    assert sum(each.n for each in found.classes) == result.n_test == found.score.n
    page = (finished / "report.html").read_text()
    assert "Where it is wrong" in page
    assert page.count('<figure class="mistake">') == len(found.mistakes) > 0
    assert "This is export/predict.py." in page


def test_the_onnx_file_computes_what_the_model_computes(finished: Path) -> None:
    model = timm.create_model(f"local-dir:{finished / 'models' / 'chosen'}", pretrained=True).eval()
    images = open_data(open_run(finished).data).holdout
    pixels = np.stack([images.read(place) for place in range(7)])  # type: ignore[type-var]
    session = onnxruntime.InferenceSession(
        str(finished / "export" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    got = session.run(None, {"images": pixels})[0]
    with torch.no_grad():
        want = model(next(iter(EvalBatches(images, batch_size=7)))[0]).softmax(1).numpy()
    np.testing.assert_allclose(got, want, atol=1e-5)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}


def test_the_same_command_again_does_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, start = stamps(finished), time.process_time()
    assert main(words(finished)) == 0
    for stage in ("train", "search", "retrain", "export", "bench", "evaluate"):
        assert main([stage, str(finished)]) == 0
    assert stamps(finished) == before
    assert time.process_time() - start < 10
    assert capsys.readouterr().out.count("Same budget, three ways") >= 2, "the table is shown again"


def test_another_command_on_the_folder_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stamps(finished)
    error = refused(words(finished, seed="1", budget="macs<=100K"), capsys)
    assert "seed: 0 then, 1 now" in error
    assert "budget: 'macs<=200K' then, 'macs<=100K' now" in error
    assert stamps(finished) == before


def test_other_images_than_the_run_began_with_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    manifest = Manifest.read(folder)
    replace(manifest, data=replace(manifest.data, sha256="0" * 64)).write(folder)
    (folder / "search.json").unlink()
    assert "has other images than when" in refused(["search", str(folder)], capsys)
    assert not (folder / "search.json").exists()


def test_specialize_and_report(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    trials = [trial for trial in SearchRecord.read(folder).trials if trial.state == "scored"]
    least = min(trial.costs.params for trial in trials)
    assert main(["specialize", str(folder), f"budget=params<={least}"]) == 0
    said = capsys.readouterr().out
    cheap = next(trial for trial in trials if trial.costs.params == least)
    assert cheap.arch_id in said
    model = timm.create_model(f"local-dir:{folder / 'front' / cheap.arch_id}", pretrained=True)
    assert sum(p.numel() for p in model.parameters()) == least
    assert "none of 6 scored Archs meets the budget" in refused(
        ["specialize", str(folder), "budget=params<=1"], capsys
    )
    assert (
        "limits latency on torch,batch=1, which the search did not measure (it measured: none). Limit"
        in refused(["specialize", str(folder), "budget=latency<=9ms@torch,batch=1"], capsys)
    )
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size > 10_000


def test_retrain_makes_what_was_deleted_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = stamps(folder)
    shutil.rmtree(folder / "models" / "hand_scaled")
    (folder / "checkpoints" / "retrain-hand_scaled.safetensors").unlink()
    assert main(["retrain", str(folder)]) == 0
    after = stamps(folder)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert all("hand_scaled" in name or name == "metrics.jsonl" for name in changed), changed
    weights = Path("models") / "hand_scaled" / "model.safetensors"
    assert (folder / weights).read_bytes() == (finished / weights).read_bytes()


def test_stages_before_their_time_say_what_to_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished / "run.yaml", tmp_path)
    for stage, said in (
        ("search", "`vitnas train`"),
        ("retrain", "search.json does not exist"),
        ("export", "models/chosen"),
        ("evaluate", "`vitnas retrain`"),
        ("dashboard", "`vitnas search"),
    ):
        assert said in refused([stage, str(tmp_path)], capsys)
    assert not (tmp_path / "test_reads.json").exists()


def test_what_is_trained_is_timed_on_what_was_asked_for() -> None:
    """However a target is written, it is timed once."""
    run = Run(budget="latency<=1ms@onnxruntime,batch=1,threads=1 and latency<=9ms@torch,batch=8")
    assert timed_on(run) == ("onnxruntime,batch=1,threads=1", "torch,batch=8", "torch,batch=1")
    assert timed_on(Run()) == Run().export.latency
    by_time = SearchConfig(objectives=("accuracy", "latency@torch,threads=2"))
    assert timed_on(Run(search=by_time))[0] == "torch,threads=2"


@pytest.mark.slow
def test_a_latency_budget_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    argv = words(
        folder,
        budget="macs<=200K and latency<=1000ms@onnxruntime,batch=1",
        search__num_trials="3",
        retrain__baselines="[]",
        retrain__rank_archs="0",
        export__formats="[]",
        export__latency="[]",
    )
    assert main(argv) == 0
    assert "1000ms" in capsys.readouterr().out
    trials = SearchRecord.read(folder).trials
    assert all(trial.costs.latency_ms for trial in trials if trial.state == "scored")
    (row,) = LatencyRecord.read(folder / "export").rows
    assert row.target == "onnxruntime,batch=1", "what is trained is timed on it, too"
    assert (
        "macs<=200K and latency<=1000ms@onnxruntime,batch=1: met"
        in (folder / "models" / "chosen" / "README.md").read_text()
    )
    impossible = words(tmp_path / "no", budget="latency<=1us@onnxruntime,batch=1")
    assert "cannot be met" in refused(impossible, capsys)


def test_images_of_a_run_are_normalised_as_its_pretrained_model_wants(tmp_path: Path) -> None:
    data = DataConfig(dataset="digits", in_chans=3, image_size=16)
    run = Run(recipe="images", data=data, pretrained="vit_tiny_patch16_224")
    images = Context(run, tmp_path / "run").images
    assert (images.data.mean, images.data.std) == ((0.5,) * 3, (0.5,) * 3)
    assert images.resized(32).data.mean == (0.5,) * 3
    assert images.about["data_config"]["mean"] == (0.5,) * 3
    other = replace(run, data=replace(data, mean=(0.1,) * 3))
    assert Context(other, tmp_path / "other").images.data.mean == (0.1,) * 3
