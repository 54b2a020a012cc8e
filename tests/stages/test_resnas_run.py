"""A whole ViT-ResNAS run on the digits, its fine-tuning at another resolution, and what such runs refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from stage_help import refused, words

from vitnas.budget import Budget
from vitnas.cli import main
from vitnas.cli.fields import make_run
from vitnas.errors import UserError
from vitnas.model.named import ArchFile
from vitnas.recipes import RECIPES
from vitnas.records import Result, Results
from vitnas.sample import Given, Spread
from vitnas.searching import feasibility
from vitnas.stages.context import make_space
from vitnas.train import metrics

RESNAS = {
    "space__kind": "vit_resnas",
    "space__embed_dims": "[8,12]",
    "space__depths": "[2,2]",
    "sampler__kind": "spread",
    "sampler__num_archs": "2",
    "sampler__warmup_epochs": "1",
    "sampler__rewire": "true",
    "task__kind": "token_mixup",
    "supernet__ema": "null",
    "data__augment__mixup": "0",
    "budget": "macs<=400K",
    "retrain__rank_archs": "0",
    "retrain__baselines": "[hand_scaled]",
    "export__formats": "[]",
    "export__latency": "[]",
    "search__num_trials": "4",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnas") / "run"
    assert main(words(folder, **RESNAS)) == 0
    return folder


def test_the_whole_run(finished: Path) -> None:
    assert [row.role for row in Results.read(finished).rows] == ["chosen", "hand_scaled"]
    arch = ArchFile.read(finished / "models" / "chosen").arch
    assert len(arch.stages) == 2
    assert arch.patch_head
    model = timm.create_model(f"local-dir:{finished / 'models' / 'chosen'}", pretrained=True)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    lines = [line for line in metrics.read_lines(finished) if line.stage == "supernet"]
    assert any("patch" in line.losses for line in lines if isinstance(line, metrics.Step))
    hooked = [(line.event, line.epoch) for line in lines if isinstance(line, metrics.Hooked)]
    assert sorted(hooked) == [("rewiring", 0), ("rewiring", 1), ("spread", 1)]
    baseline = ArchFile.read(finished / "models" / "hand_scaled").arch
    assert (len(baseline.stages), baseline.stem, baseline.patch_head) == (1, "linear", True)


def test_fine_tuning_at_a_higher_resolution(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", str(finished), "image_size=12", "epochs=1", "lr=1e-4", "drop_path=0.2"]
    assert main(command) == 0
    assert "chosen at 12 pixels" in capsys.readouterr().out
    folder = finished / "models" / "chosen-12px"
    result, arch = Result.read(folder), ArchFile.read(folder).arch
    assert (arch.image_size, arch.grids) == (12, ((6, 6), (3, 3)))
    assert result.macs > Result.read(finished / "models" / "chosen").macs
    assert 0 <= (result.holdout_accuracy_before or -1) <= 1
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model(torch.zeros(1, 1, 12, 12)).shape == (1, 10)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert (folder / "model.safetensors").stat().st_mtime_ns == before, "a second time does nothing"
    assert any(line.stage == "finetune/chosen-12px" for line in metrics.read_lines(finished))
    assert main(["report", str(finished)]) == 0


def test_fine_tuning_refuses_what_cannot_be(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(["finetune", str(finished), "image_size=10"], capsys)
    assert (
        "image_size is 10; it must be a multiple of patch_size 2 times 2 (1 reductions), 4. Nearest: 8 and 12"
        in text
    )
    assert "takes a run folder and image_size=PIXELS" in refused(["finetune", str(finished)], capsys)
    assert "has no trained model 'best'" in refused(
        ["finetune", str(finished), "image_size=12", "role=best"], capsys
    )
    assert "there is no field 'retrain.train.epoch'" in refused(
        ["finetune", str(finished), "image_size=12", "epoch=3"], capsys
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sampler.kind": "spread", "sampler.num_archs": "3"},
            r"data\.batch_size is 64; sampler\.num_archs 3 must divide it\. Nearest: 63, 66",
        ),
        (
            {"sampler.warmup_epochs": "3"},
            r"sampler\.warmup_epochs belongs to sampler\.kind spread, but sampler\.kind is 'uniform'",
        ),
        (
            {"sampler.kind": "spread", "sampler.rewire": "true"},
            r"rewire is on and sampler\.warmup_epochs is 0",
        ),
        (
            {
                "sampler.kind": "spread",
                "sampler.rewire": "true",
                "sampler.warmup_epochs": "3",
                "supernet.ema": "0.9",
            },
            r"rewire is on and supernet\.ema too; .* Set supernet\.ema to null",
        ),
        (
            {"sampler.kind": "sandwich", "task.kind": "token_mixup"},
            r"sampler\.distill is on and task\.kind is 'token_mixup'",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_runs_that_cannot_be_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_run("tour", fields)


def test_images_are_not_mixed_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(words(tmp_path / "run", **{**RESNAS, "data__augment__mixup": "0.2"}), capsys)
    assert (
        "data.augment mixes images (mixup 0.2, cutmix 0.0) and task.kind token_mixup does so itself" in text
    )


def test_a_space_without_patch_heads_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(words(tmp_path / "run", task__kind="token_mixup"), capsys)
    assert "space.kind 'autoformer' has not. Use vit_resnas" in text


def test_teachers_that_cannot_be_loaded_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {**RESNAS, "task__kind": "classification", "teacher": "no_such_model"}
    text = refused(words(tmp_path / "run", **fields), capsys)
    assert "teacher is 'no_such_model'; it must be a folder of a saved model or a name" in text


@pytest.mark.parametrize("name", ["vit_resnas", "vit_resnas_cifar"])
def test_the_recipes_fit_their_spaces(name: str) -> None:
    run = RECIPES[name]()
    images = {"image_size": 32 if name.endswith("cifar") else 224, "in_chans": 3, "num_classes": 10}
    space = make_space(run.space, type("Fake", (), images)(), run.task)
    table = feasibility(space, Budget.parse(run.budget), n=4000)
    assert table.rows[-1].share_feasible > 0.01
    sampler = run.sampler.build(space, Given())
    assert isinstance(sampler, Spread)
    assert space.largest().patch_head
