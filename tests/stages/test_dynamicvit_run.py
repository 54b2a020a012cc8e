"""A run that learns how many patches to keep, from its own network as teacher, at two rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stage_help import Clock, refused

from vitnas.arch import Arch, Block, Stage
from vitnas.cli import main
from vitnas.cli.fields import make_run
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.exporting import load_timm, save_timm
from vitnas.model import Model, build

ARCH = Arch(
    image_size=8,
    patch_size=2,
    in_chans=1,
    num_classes=10,
    stages=(Stage(embed_dim=16, blocks=(Block(num_heads=2, head_dim=8, mlp_hidden=32),) * 4),),
)
FIELDS = [
    "data.max_images=240",
    "data.batch_size=32",
    "supernet.epochs=4",
    "supernet.warmup_epochs=0",
    "supernet.slow_frozen_epochs=1",
    "supernet.log_every=1",
    "search.num_trials=3",
    "search.objectives=[accuracy,macs]",
    "retrain.train.epochs=1",
    "retrain.train.log_every=1",
    "export.formats=[onnx]",
    "export.latency=[]",
    "device=cpu",
]


@pytest.mark.slow
def test_the_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitnas.stages.searching.quick_meter", lambda target: Clock(-1.0))
    save_timm(build(ARCH, generator=torch.Generator().manual_seed(0)).eval(), tmp_path / "model")
    words = [f"pretrained={tmp_path / 'model'}", f"folder={tmp_path / 'run'}", *FIELDS]
    assert main(["run", "dynamicvit_tour", *words]) == 0
    made = load_timm(tmp_path / "run" / "models" / "chosen")
    assert isinstance(made, Model)
    assert made.arch.selector == "predictor"
    assert count(made.arch).macs <= 0.7 * count(ARCH).macs
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for stage in ("supernet", "retrain/chosen"):
        steps = [line for line in lines if "losses" in line and line["stage"] == stage]
        assert {"labels", "ce", "soft", "tokens"} <= set(steps[0]["losses"])
        assert any("ratio" in line["losses"] for line in steps)
    assert main(["finetune", str(tmp_path / "run"), "image_size=12", "epochs=1"]) == 0
    larger = load_timm(tmp_path / "run" / "models" / "chosen-12px")
    assert isinstance(larger, Model)
    assert larger.arch.num_final_tokens > made.arch.num_final_tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task.kind": "dynamicvit"}, r"task\.kind is 'dynamicvit' and space\.keep is not given"),
        ({"teacher": "pretrained"}, r"teacher\.network is 'pretrained' and there is none"),
        (
            {"task.kind": "dynamicvit", "space.keep": "[1.0,0.5]", "task.per": "pixel"},
            r"task\.per is 'pixel'",
        ),
    ],
)
def test_what_cannot_be_learned(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_run("tour", fields)


def test_names_that_no_parameter_has_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "tour", f"folder={tmp_path / 'run'}", "supernet.slow_names=selections"]
    assert "no parameter's name has 'selections' in it" in refused(words, capsys)
    assert not (tmp_path / "run").exists()
