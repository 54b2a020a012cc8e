"""`vitnas pretrain`: images without labels in, a network that others go on from out."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from pretrain_help import FIELDS, pretrain_words
from stage_help import Warm, has_step, refused
from torch import nn

import vitnas
from vitnas.cli import main
from vitnas.data import Readings
from vitnas.data.synthetic import synthetic
from vitnas.errors import UserError
from vitnas.exporting import load_timm
from vitnas.model import Model
from vitnas.probing import Pretrained, PretrainForecast, Probed
from vitnas.recipes.pretrain import pretrain as recipe
from vitnas.reporting import report
from vitnas.space import AutoFormerConfig
from vitnas.stages.pretrain.context import patch_for
from vitnas.stages.run import Run
from vitnas.supernet import Supernet
from vitnas.train import Engine, metrics
from vitnas.train.collapse import CollapseError
from vitnas.train.metrics import read_lines


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining of a Model on the digits."""
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    assert main(pretrain_words(folder)) == 0
    return folder


def test_what_it_leaves(done: Path) -> None:
    made, plan = Pretrained.read(done), PretrainForecast.read(done)
    assert (made.steps, made.epochs, made.images) == (13, 1, 108)
    assert plan.batch_size == 8  # an epoch of 108 images has at least 8 steps
    assert made.first is not None
    assert made.last.knn is not None
    assert (made.first.n, made.last.n) == (12, 12)
    assert [reading.purpose for reading in Readings.read(done).readings] == ["probe"]
    assert Probed.read(done).num_test == 120
    looks = [line.step for line in read_lines(done) if isinstance(line, metrics.Hooked) and "n" in line.said]
    assert looks == [0, 6, 12]


def test_its_page(done: Path) -> None:
    page = re.sub(r"\s+", " ", report(done).read_text())
    for text in (
        "pretrained on 108 images for 1.00 epochs",
        "nearest neighbours, held-out",
    ):
        assert text in page


def test_a_page_made_on_the_way_does_not_end_a_run(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    for name in (Probed.FILE, "report.html"):
        (folder / name).unlink()
    assert "results: missing" in report(folder).read_text()
    assert main(["evaluate", str(folder)]) == 0
    assert Probed.exists(folder)
    page = (folder / "report.html").read_text()
    assert "linear classifier, test" in page
    assert "results: missing" not in page


def test_timm_takes_it(done: Path) -> None:
    network = timm.create_model(f"local-dir:{done / 'models' / 'chosen'}", pretrained=True)
    own = load_timm(done / "models" / "chosen")
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(network.eval()(images), own.eval()(images), rtol=0, atol=0)
    assert network.num_classes == 0


@pytest.mark.slow
def test_a_run_takes_it(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every weight but the classifier's, of a space of the same Archs."""
    space = [f"{name}={value}" for name, value in FIELDS.items() if name.startswith("space.")]
    rest = "data.max_images=120 supernet.epochs=0.1 supernet.monitor_every=0 budget= threads=1 device=cpu".split()
    folder = tmp_path / "run"
    first = [
        "run",
        "tour",
        f"folder={folder}",
        f"pretrained={done}",
        *space,
        "space.kind=autoformer",
        "space.patch_size=2",
        *rest,
    ]
    assert main([*first, "search.num_trials=2", "retrain.train.epochs=0.1", "retrain.baselines=[]",
                 "retrain.rank_archs=0", "export.formats=[]", "export.latency=[]"]) == 0  # fmt: skip
    told = re.search(
        r"started from a pretrained Model: (\d+)% of the supernet's weights", capsys.readouterr().out
    )
    assert told is not None
    assert int(told[1]) > 90


def test_refused_in_one_sentence(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for number in range(20):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(few / f"{number}.png")
    one = tmp_path / "one"
    one.mkdir()
    Image.new("RGB", (16, 16)).save(one / "a.png")
    folder = tmp_path / "run"
    for argv, sentence in (
        (pretrain_words(folder, str(few)), "images; pretraining tells images apart and needs at least 32."),
        (pretrain_words(folder, str(one)), "1 of 1 images cannot be set apart"),
        (
            pretrain_words(folder, epochs=None, pretrain__time="1s"),
            "time is 1s; the least that is worth it, 100 steps, takes",
        ),
        (
            pretrain_words(folder, pretrain__time="soon"),
            "pretrain.time is 'soon'; it is a number and s, m or h.",
        ),
        (
            pretrain_words(folder, pretrain__model="vit_tine"),
            "model is 'vit_tine'; it must be a folder of a saved model",
        ),
        (pretrain_words(folder, local_crops_size="1"), "local_crops_size"),
        (
            pretrain_words(folder, supernet__epoch="3"),
            "there is no field 'supernet.epoch'. Nearest: 'supernet.epochs'.",
        ),
        (pretrain_words(done, epochs="3"), "holds another run (pretrain.epochs: 1.0 then, 3.0 now)"),
        (["specialize", str(done), "budget=macs<=1M"], "is a pretraining, which knows no budgets"),
        (["search", str(done)], "has no stage 'search'; it has train, export, evaluate."),
    ):
        assert sentence in refused(argv, capsys), argv
    assert not folder.exists()


def test_patches_follow_the_image() -> None:
    assert [patch_for(side) for side in (8, 28, 32, 64, 96, 224, (48, 64))] == [2, 4, 4, 8, 12, 32, 4]


def hot() -> Run:
    """A small network, and a teacher that is less sure than it."""
    run = recipe()
    assert run.pretrain is not None
    esvit = replace(run.pretrain.esvit, teacher_temp=0.5, warmup_teacher_temp=0.5, out_dim=64)
    space = AutoFormerConfig(
        embed_dims=(16,), depths=(1,), num_heads=(2,), mlp_ratios=(2.0,), head_dim=8, patch_size=4
    )
    return replace(run, space=space, pretrain=replace(run.pretrain, esvit=esvit, looks=0))


@pytest.mark.slow
def test_a_killed_pretraining_ends_with_the_same_bits(done: Path, warm: Warm, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    warm.kill_when(pretrain_words(folder), has_step(folder, "pretrain", 9))
    warm.run(pretrain_words(folder))
    for name in ("models/chosen/model.safetensors",):
        assert (folder / name).read_bytes() == (done / name).read_bytes()
    said = [
        [line.said for line in read_lines(each) if isinstance(line, metrics.Hooked)]
        for each in (done, folder)
    ]
    assert said[0] == said[1]


@pytest.mark.slow
def test_a_slimming_takes_it(done: Path, tmp_path: Path) -> None:
    fields = "budget=macs<=70% effort=fold images=32 data.max_images=120 search.num_trials=10 export.formats=[]".split()
    folder = tmp_path / "slim"
    given = ["data.dataset=digits", *fields, "export.latency=[]", "threads=1", "device=cpu"]
    assert main(["slim", str(done), f"folder={folder}", *given]) == 0
    assert isinstance(load_timm(folder / "models" / "chosen"), Model)


@pytest.mark.slow
def test_a_supernet_learns(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(pretrain_words(folder, pretrain__model="supernet", sampler__kind="sandwich")) == 0
    made = load_timm(folder / "models" / "chosen")
    assert isinstance(made, Model)
    assert made.arch.depth == 2
    assert (folder / "supernet.safetensors").exists()
    archs = {
        line.losses.get("view") is not None for line in read_lines(folder) if isinstance(line, metrics.Step)
    }
    assert archs == {True}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("test_vit", "32"), ("test_resnet", "64")])
def test_a_network_of_timm_learns(name: str, side: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    given = {"pretrain__model": name, "data__image_size": side, "epochs": "0.3"}
    assert (
        main(
            pretrain_words(
                folder, **{**given, **{f"space__{key[6:]}": None for key in FIELDS if key[:6] == "space."}}
            )
        )
        == 0
    )
    network = timm.create_model(f"local-dir:{folder / 'models' / 'chosen'}", pretrained=True)
    assert isinstance(network, nn.Module)
    assert not isinstance(network, Model | Supernet)


@pytest.mark.slow
def test_images_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stray text, a broken image and one folder with a single image do not stop it."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(images / f"{number}.png")
    Image.fromarray(pixels).save(images / "sub" / "lone.png")
    (images / "notes.txt").write_text("no image")
    (images / "broken.png").write_bytes(b"no image")
    folder = tmp_path / "run"
    assert main(pretrain_words(folder, str(images))) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "the images have no labels: nearest neighbours are left out" in told
    assert Pretrained.read(folder).last.knn is None
    assert not Probed.exists(folder)


@pytest.mark.slow
def test_a_collapse_stops_the_run_with_advice(tmp_path: Path) -> None:
    data = synthetic(num_classes=4, image_size=16, n=128)
    with pytest.raises(CollapseError, match=r"teacher_temp is 0\.5 and student_temp 0\.1; the teacher must"):
        vitnas.pretrain(data, epochs=150, folder=tmp_path, run=hot())


def test_python_flushes_trackers_when_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[Engine] = []
    monkeypatch.setattr(Engine, "finish", lambda self: finished.append(self))
    with pytest.raises(UserError, match=r"needs at least 32"):
        vitnas.pretrain(synthetic(n=24), folder=tmp_path)
    assert len(finished) == 1


def test_python_refuses_as_the_command_does(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pretrain\.time is 'soon'"):
        vitnas.pretrain(synthetic(n=64), time="soon", folder=tmp_path)
