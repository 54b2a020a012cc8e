"""What features are worth: neighbours, a linear classifier, directions; and the protocol around them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitnas.cli import main
from vitnas.data import Data, DataConfig, Readings, open_data
from vitnas.errors import UserError
from vitnas.exporting import save_timm
from vitnas.model.timm_keys import from_timm
from vitnas.probing import (
    Probed,
    effective_rank,
    features,
    images_seen,
    knn_accuracy,
    knn_votes,
    linear_probe,
    probe,
    protocol,
)


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return VisionTransformer(**{**sizes, "in_chans": 1, "num_classes": 10, **options}).eval()


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data(DataConfig(dataset="digits", holdout=0.2, max_images=200, augment="none"))


def test_votes_by_hand() -> None:
    """Two neighbours of three; the cosine does not know lengths."""
    bank = torch.tensor([[5.0, 0.0], [0.0, 0.1], [-1.0, 0.0]])
    votes = knn_votes(
        bank, torch.tensor([0, 1, 1]), torch.tensor([[3.0, 0.0]]), k=2, temperature=0.5, num_classes=3
    )
    torch.testing.assert_close(
        votes / votes.sum(), torch.tensor([[1.0, math.exp(-2), 0.0]]) / (1 + math.exp(-2))
    )


def test_votes_at_a_low_temperature_are_those_of_the_nearest() -> None:
    bank, classes = torch.eye(4), torch.tensor([0, 1, 2, 2])
    asked = torch.tensor([[0.2, 0.9, 0.1, 0.1], [0.1, 0.2, 0.3, 0.9]])
    assert knn_accuracy(bank, classes, asked, torch.tensor([1, 2]), k=100, temperature=1e-4) == 1


def test_rank_in_closed_form(generator: torch.Generator) -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(9, 5)) == pytest.approx(1)
    assert effective_rank(torch.zeros(9, 5)) == 1
    ends = torch.diag(torch.tensor([3.0, 1.0]))  # shares 3/4 and 1/4
    assert effective_rank(ends) == pytest.approx(4 / 3**0.75)
    assert 30 < effective_rank(torch.randn(500, 32, generator=generator)) < 32


def mislabelled(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two classes far apart in one of 40 numbers, the rest noise at another scale; one class in five is wrong."""
    classes = torch.arange(n) % 2
    values = torch.randn(n, 40, generator=generator) * 100 + 7
    values[:, 0] = values[:, 0] / 100 + 4 * classes
    return values, torch.where(torch.arange(n) % 5 == 0, 1 - classes, classes)


def subtle(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two numbers that nearly say the same; their difference is the class."""
    classes = torch.arange(n) % 2
    both = torch.randn(n, generator=generator)
    return torch.stack([both + 0.1 * classes, both], 1), classes


@pytest.mark.parametrize(("make", "best"), [(mislabelled, 1e-2), (subtle, 1e4)])
def test_linear_probe_chooses_by_held_out_images(make: Any, best: float, generator: torch.Generator) -> None:
    """Wrong labels want a strong penalty, a small difference wants a weak one."""
    train, held = make(60, generator), make(2000, generator)
    found, accuracy = linear_probe(*train, *held, (1e-2, 1e4))
    assert found == best
    other = {1e-2: 1e4, 1e4: 1e-2}[best]
    assert accuracy > linear_probe(*train, *held, (other,))[1] + 0.02
    assert (found, accuracy) == linear_probe(*train, *held, (1e4, 1e-2))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_features_are_what_the_classifier_gets(pool: str, generator: torch.Generator) -> None:
    network = vit(global_pool=pool)
    images = torch.randn(5, 1, 8, 8, generator=generator)
    batches = [(images[:3], torch.arange(3)), (images[3:], torch.arange(3, 5))]
    found = features(network.train(), batches)
    assert network.training
    network.eval()
    pooled = network.forward_head(network.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found.values_ND, pooled.detach())
    assert found.targets.tolist() == [0, 1, 2, 3, 4]
    last = features(from_timm(vit()), batches, blocks=2).values_ND
    assert last.shape == (5, 32)
    torch.testing.assert_close(last[:, 16:], features(vit(), batches).values_ND)


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="blocks is 9; the network has 3 that can be told apart"):
        features(vit(), [(torch.zeros(1, 1, 8, 8), torch.zeros(1))], blocks=9)


def test_the_test_split_is_read_once_and_last(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "test_reads.json"
    chosen: list[bool] = []
    for name in ("linear_probe", "_choose_neighbours"):
        choose = getattr(protocol, name)
        monkeypatch.setattr(
            protocol, name, lambda *given, choose=choose: chosen.append(log.exists()) or choose(*given)
        )
    found = probe(vit(), digits, log=log)
    assert chosen == [False, False]
    assert [reading.purpose for reading in Readings.load(log).readings] == ["probe"]
    assert (found.num_train, found.num_held_out, found.num_test) == (160, 40, 200)
    assert found.knn.ci95[0] < found.knn.accuracy < found.knn.ci95[1]
    assert found.linear.accuracy > 0.3  # random features of digits say something
    assert found == replace(probe(vit(), digits, log=log), test_readings=1)


def test_final_fit_knows_the_held_out_part(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Noted(protocol.Linear):
        def __init__(self, values: Tensor, *given: Any) -> None:
            sizes.append(len(values))
            super().__init__(values, *given)

    monkeypatch.setattr(protocol, "Linear", Noted)
    probe(vit(), digits, log=tmp_path / "log.json")
    assert sizes == [200]


def test_images_are_as_the_network_takes_them() -> None:
    network = vit(in_chans=3)
    network.pretrained_cfg = {
        "input_size": (3, 224, 224), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.95,
        "interpolation": "bilinear", "first_conv": "patch_embed.proj",
    }  # fmt: skip
    seen = images_seen(DataConfig(dataset="digits"), network)
    assert (seen.image_size, seen.in_chans, seen.mean, seen.std) == (8, 3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert (seen.crop_pct, seen.interpolation) == (0.95, "bilinear")
    with pytest.raises(UserError, match=r"data\.image_size is 16; MODEL takes images of 8 pixels"):
        images_seen(DataConfig(image_size=16), network)
    with pytest.raises(UserError, match="MODEL takes images of 3 channels"):
        images_seen(DataConfig(in_chans=1), network)


def test_command_probes_a_saved_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_timm(from_timm(vit()), "saved")
    words = ["probe", "saved", "data.dataset=digits", "data.max_images=200"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["width"] == 16
    assert main([*words, "blocks=2"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "32 numbers per image of 8 pixels" in told
    assert "On 200 test images, read 2 times by now" in told
    assert Probed.read(Path("runs/probe_saved")).features == "the last 2 blocks"


def test_command_refuses_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_timm(from_timm(vit()), "saved")
    for words, sentence in (
        (["saved"], "`vitnas probe` takes a network and data.dataset=IMAGES"),
        (["saved", "dataset=digits", "data.dataset=x"], "data.dataset is given twice, as 'digits' and 'x'"),
        (
            ["saved", "data.dataset=digits", "data.labels=false"],
            "a probe needs labels, and these images have none.",
        ),
        (["nowhere", "data.dataset=digits"], "MODEL is 'nowhere'; it must be a folder"),
    ):
        assert main(["probe", *words]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()
