"""What cannot be slimmed is said in one sentence before any work, and leaves no run behind."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from slim_help import ARCH, save, slim_words
from stage_help import refused

import vitnas
from vitnas.errors import UserError
from vitnas.exporting import save_timm
from vitnas.model import build
from vitnas.model.scale import Scale
from vitnas.model.timm_cfg import take_images


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing is learned: what is refused is refused before."""
    return save(build(ARCH).eval(), tmp_path_factory.mktemp("net") / "net")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "macs<=10K"}, r"macs<=10K cannot be met; around_net ranges from [\d.]+K to [\d.]+K\."),
        ({"budget": "macs<=1%"}, r"macs<=[\d.]+K? cannot be met; around_net ranges from"),
        ({"budget": None}, r"no budget is given; .* Add budget='macs<=50%'"),
        ({"images": "3"}, r"images is 3; activations of up to 64 hidden units .* at least 8 images of 17 tokens"),
        ({"data__max_images": "8", "data__labels": "false"}, r"the train split has 7; .* Give at least 8 train images"),
        ({"data__image_size": "12"}, r"data.image_size is 12; MODEL takes images of 8 pixels.*add resample=true"),
        ({"data__in_chans": "3"}, r"data.in_chans is 3; MODEL takes images of 1 channels"),
        ({"effort": "train"}, r"slim.effort is 'train'; it must be one of fold, recover, search"),
        ({"time": "30"}, r"slim.time is '30'; it is a number and s, m or h"),
        ({"axes": "[heads,depth]"}, r"slim.axes is '\[heads,depth\]'; it must be a list of .*blocks"),
        ({"importance": "weights"}, r"slim.importance is 'weights'"),
        ({"front": "3"}, r"slim.front is 3; a front has at least 5"),
        ({"effort": None, "time": "0.1s"}, r"time is 0.1s; the least effort, fold, takes about .* here\. Give more"),
        ({"teacher": "deit_tiny_patch16_224"}, r"teacher.network is 'deit_tiny.*'; what is slimmed learns from"),
        ({"efort": "fold"}, r"there is no field 'efort'\. Nearest: 'effort'"),
        ({"slim__efort": "fold"}, r"there is no field 'slim.efort'\. Nearest: 'slim.effort'"),
    ],
)  # fmt: skip
def test_a_wrong_field(
    changes: dict[str, str | None],
    message: str,
    net: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refused(slim_words(net, tmp_path / "run", **changes), capsys)
    assert re.search(message, said), said
    assert not (tmp_path / "run" / "run.yaml").exists()


def folder_of(classes: int, folder: Path) -> Path:
    """Images in class folders."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(12 * classes, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / f"class{number % classes}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def test_another_number_of_classes(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = str(folder_of(3, tmp_path / "images"))
    given = slim_words(net, tmp_path / "run", data__dataset=images, data__max_images=None)
    said = refused(given, capsys)
    assert re.search(r"the images have 3 classes and MODEL 10; .* Add data.labels=false", said), said


def test_networks_that_cannot_be_slimmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    weights = timm.create_model("resnet10t", num_classes=4).state_dict()
    save_file(weights, tmp_path / "resnet.safetensors")
    said = refused(slim_words(f"resnet10t@{tmp_path / 'resnet.safetensors'}", tmp_path / "run"), capsys)
    assert re.search(r"this ResNet cannot be written as an Arch: .*patch", said), said
    named = refused(slim_words("resnet10t", tmp_path / "run"), capsys)
    assert named == said  # no weights were asked for
    broken = build(ARCH).state_dict()
    broken["blocks.1.attn.qkv.weight"][0, 0] = float("nan")
    save(build(ARCH).eval(), tmp_path / "broken")
    save_file(broken, tmp_path / "broken" / "model.safetensors")
    said = refused(slim_words(tmp_path / "broken", tmp_path / "run"), capsys)
    assert re.search(r"MODEL .* weights that are NaN or infinite \(blocks.1.attn.qkv.weight\)", said), said
    stage = replace(ARCH.stages[0], blocks=(*ARCH.blocks[:2], replace(ARCH.blocks[2], keep=8)))
    fewer = replace(ARCH, stages=(stage,), selector="attention")
    save(build(fewer).eval(), tmp_path / "fewer")
    said = refused(slim_words(tmp_path / "fewer", tmp_path / "run"), capsys)
    assert re.search(r"keeps fewer patches already, chosen by 'attention'", said), said
    assert not (tmp_path / "run" / "run.yaml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tokens", "resnet10t", "dataset=digits"), r"this ResNet cannot be written as an Arch"),
        (("swap", "resnet10t", "mixer=nystrom"), r"ResNet has no attention that is known here"),
        (("show-tokens", "deit_tiny_patch16_224", "IMAGES"), r"keeps all patches; there is nothing to show"),
    ],
)
def test_what_no_command_can_use_is_refused_before_its_weights_are_fetched(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = timm.create_model

    def create(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        assert not pretrained, "weights were asked for"
        return made(name, **options)

    monkeypatch.setattr("timm.create_model", create)
    images = str(folder_of(1, tmp_path))
    assert re.search(message, refused([images if word == "IMAGES" else word for word in words], capsys))


def test_images_of_another_size_in_a_library(net: Path) -> None:
    images = np.zeros((60, 12, 12), dtype=np.uint8)
    with pytest.raises(UserError, match=r"data.image_size is 12; MODEL takes images of 8 pixels"):
        vitnas.slim(str(net), images, budget="macs<=50%")


def test_a_network_that_tells_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build(replace(ARCH, num_classes=1)).eval()
    take_images(model, {}, ("age",), scale=Scale((30.0,), (9.0,)))
    save_timm(model, tmp_path / "net", class_names=("age",))
    said = refused(slim_words(tmp_path / "net", tmp_path / "run"), capsys)
    assert "MODEL tells numbers of images" in said
