"""A run whose supernet starts from a pretrained network: what cannot be loaded is found before a folder is claimed."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from stage_help import refused, words

from vitnas.cli import main

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
    pretrained: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    folder = tmp_path / "run"
    assert re.search(message, refused(words(folder, pretrained=pretrained), capsys))
    assert not (folder / "run.yaml").exists()


def test_a_name_and_a_file_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the same folder after a typo, which did not claim it."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pt")
    refused(words(tmp_path / "run", pretrained=f"test_vt@{tmp_path / 'weights.pt'}", **SMALL), capsys)
    given = words(tmp_path / "run", pretrained=f"test_vit@{tmp_path / 'weights.pt'}", **SMALL)
    assert main(given) == 0
    assert "started from a pretrained VisionTransformer" in capsys.readouterr().out
