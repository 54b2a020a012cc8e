"""A run whose supernet starts from a pretrained network: what cannot be loaded is found before a folder is claimed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from stage_help import refused, words

from vitnas.budget import Budget, Limit, exact_quantity
from vitnas.cli import main
from vitnas.cli.fields import make_run, open_run
from vitnas.counting import count
from vitnas.exporting import save_timm
from vitnas.measure.latency import LatencyMeter
from vitnas.model import build
from vitnas.records import Family, SpaceRecord
from vitnas.searching import SearchRecord
from vitnas.space import autoformer, space_from_json
from vitnas.stages import Context

SMALL = {
    "space__head_dim": "32",
    "search__num_trials": "2",
    "retrain__rank_archs": "0",
    "retrain__baselines": "[]",
    "export__formats": "[]",
    "export__latency": "[]",
    "budget": "",
}


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("vit_tyny_patch16_224", "pretrained is 'vit_tyny_patch16_224'; .* Nearest: 'vit_tiny_patch16_224'"),
        ("weights.pth", "pretrained is 'weights.pth'; a file of weights .* Write NAME@weights.pth"),
        ("test_vit@weights.pth", "there is no file 'weights.pth'. Correct the path"),
        ("resnet10t", "pretrained 'resnet10t' cannot be loaded|cannot be written as an Arch"),
    ],
)
def test_what_cannot_start_leaves_nothing(
    pretrained: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it would be asked again and again
    folder = tmp_path / "run"
    assert re.search(message, refused(words(folder, pretrained=pretrained), capsys))
    assert not (folder / "run.yaml").exists()


@pytest.mark.slow
def test_a_name_and_a_file_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the same folder after a typo, which did not claim it."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pt")
    refused(words(tmp_path / "run", pretrained=f"test_vt@{tmp_path / 'weights.pt'}", **SMALL), capsys)
    given = words(tmp_path / "run", pretrained=f"test_vit@{tmp_path / 'weights.pt'}", **SMALL)
    assert main(given) == 0
    assert "started from a pretrained VisionTransformer" in capsys.readouterr().out


AROUND: dict[str, str | None] = {
    **SMALL,
    **dict.fromkeys(("space__embed_dims", "space__depths", "space__num_heads", "space__head_dim")),
    "space__kind": "around",
}


def test_a_space_around_a_network_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the images are looked for."""
    given = words(tmp_path / "run", **AROUND, data__dataset=str(tmp_path / "none"))
    said = "space.kind is 'around' and no network is named; .* Set pretrained=NAME .* or space.network=NAME"
    assert re.search(said, refused(given, capsys))


@pytest.mark.parametrize("form", ["{}", pytest.param("local-dir:{}", marks=pytest.mark.slow)])
def test_a_space_stands_around_the_network_that_the_run_starts_from(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a folder as runs write it; the folder of the run says so, too, when it is gone on with."""
    arch = autoformer("micro", image_size=8, patch_size=2, in_chans=1, num_classes=10).middle()
    save_timm(build(arch), tmp_path / "saved")
    folder = tmp_path / "run"
    shares = {**AROUND, "budget": "macs<=90%"}
    given = words(folder, **shares, pretrained=form.format(tmp_path / "saved"))
    assert main(given) == 0
    assert "started from a pretrained Model: 100% of the supernet's weights" in capsys.readouterr().out
    record = SpaceRecord.read(folder)
    assert record.name.startswith("around_")
    assert record.name.endswith("saved")
    space = space_from_json(record.space)
    assert space.largest().stages == arch.stages
    assert SearchRecord.read(folder).budget == f"macs<={exact_quantity(count(arch).macs * 9 // 10, 'macs')}"
    assert main(["specialize", str(folder), "budget=[macs<=95%, params<=0.9x]"]) == 0
    limits = [Budget.parse(answer.budget) for answer in Family.read(folder).answers]
    assert [budget.violation(count(arch)) > 0 and not budget.has_shares for budget in limits] == [True, True]
    (folder / "search.json").unlink()
    assert main(["search", str(folder)]) == 0
    assert main(given) == 0
    assert Context(open_run(folder), folder).space == space


def test_shares_of_a_budget_are_of_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = autoformer("micro", image_size=8, patch_size=2, in_chans=1, num_classes=10).middle()
    save_timm(build(arch), tmp_path / "saved")
    timed: list[str] = []

    def compare(meter: LatencyMeter, models: dict[str, Any]) -> dict[str, Any]:
        timed.append(str(meter.target))
        assert models["model"].arch.stages == arch.stages
        return {"model": SimpleNamespace(median_ms=8.5)}

    monkeypatch.setattr(LatencyMeter, "compare", compare)
    fields = {"space.kind": "around", "pretrained": str(tmp_path / "saved"), "device": "cpu"}
    fields |= {"budget": "macs<=50% and latency<=0.5x@torch,batch=1"}
    wanted = Budget.of(
        (Limit("macs", None, count(arch).macs // 2), Limit("latency", None, 4.25, "torch,batch=1"))
    )
    for _ in range(2):  # a run that goes on keeps the budget that it began with
        context = Context(make_run("tour", fields), tmp_path / "run")
        assert context.budget == wanted
    assert len(timed) == 1
    assert context.resolved(Budget.parse("latency<=10%@torch,batch=1,threads=1")).limits[0].high == 0.85
    assert len(timed) == 2
    assert Context(make_run("tour", fields), tmp_path / "run").budget == wanted
    assert len(timed) == 2
    said = refused(words(tmp_path / "no", budget="macs<=50%"), capsys)
    assert re.search(
        r"budget is 'macs<=50%' and space.kind is 'autoformer'; .* use space.kind=around with", said
    )
    assert not (tmp_path / "no").exists()


def test_a_network_of_the_space_goes_before_the_pretrained_one(tmp_path: Path) -> None:
    fields = {
        "space.kind": "around",
        "pretrained": f"test_vit@{tmp_path / 'weights.pt'}",
        "data.image_size": "32",
    }
    (tmp_path / "weights.pt").touch()
    assert Context(make_run("tour", fields), tmp_path / "a").space.name == "around_test_vit"
    other = Context(make_run("tour", {**fields, "space.network": "test_vit2"}), tmp_path / "b")
    assert other.space.name == "around_test_vit2"
