"""`vitnas tokens`: a saved model learns which patches it can do without, and is exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from vitnas.arch import Arch, Block, Stage
from vitnas.cli import main
from vitnas.data import Augment, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.exporting import load_timm, save_timm
from vitnas.model import Model, build
from vitnas.model.selections import with_selections
from vitnas.sample import Fixed
from vitnas.slimming import slim_patches
from vitnas.testing import randomize_
from vitnas.train import Classification, TrainConfig, evaluate, fit
from vitnas.train.fewer_tokens import dynamicvit_config, fewer_tokens, learn_from_whole

ARCH = Arch(
    image_size=8,
    patch_size=2,
    in_chans=1,
    num_classes=10,
    stages=(Stage(embed_dim=24, blocks=(Block(num_heads=2, head_dim=12, mlp_hidden=48),) * 4),),
)
DIGITS = DataConfig(dataset="digits", holdout=0.2, batch_size=64)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_timm(build(ARCH).eval(), tmp_path / "model")
    words = [
        str(tmp_path / "model"),
        "dataset=digits",
        "keep=0.7",
        "epochs=0.3",
        f"folder={tmp_path / 'out'}",
    ]
    assert main(["tokens", *words]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "keeps 11/7/5 of 16 patches (predictor)" in told
    assert "held-out images" in told
    record = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert record["onnx"]["passed"]
    assert record["macs"]["after"] < record["macs"]["before"]
    assert record["accuracy"]["n"] == record["agreement"]["n"] > 0
    made = load_timm(tmp_path / "out" / "model")
    assert isinstance(made, Model)
    assert [block.keep for block in made.arch.blocks] == [None, 11, 7, 5]


@pytest.mark.parametrize(("selector", "classes"), [("patch_slimming", 10), ("merge", 0)])
def test_any_selection_learns_from_the_whole_network(selector: str, classes: int) -> None:
    """Without labels, by logits or, of a network without classes, by pooled features."""
    whole = build(replace(ARCH, num_classes=classes)).eval()
    randomize_(whole, torch.Generator().manual_seed(0))
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    if selector == "patch_slimming":
        fewer = slim_patches(whole, [images], tolerance=0.3, step=4).model
    else:
        fewer = with_selections(whole, {1: 8, 2: 3}, selector=selector)
    assert fewer.arch.selector == selector
    before = off(fewer, whole, images)
    config = TrainConfig(epochs=10, lr=1e-3, warmup_epochs=0, monitor_every=0)
    loader = [(images, torch.zeros(16, dtype=torch.long))]
    made = learn_from_whole(fewer, whole, loader, config=config, labels=False).network
    assert off(made, whole, images) < 0.6 * before


def off(network: Any, whole: Model, images: torch.Tensor) -> float:
    """How far the probabilities, or features, are from those of the whole network."""
    with torch.no_grad():
        given = (network.eval()(images), whole(images))
    mine, wanted = (x.softmax(-1) if whole.num_classes else x for x in given)
    return float((mine - wanted).square().mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "epochs"),
    [
        (["selector=patch_slimming", "budget=macs<=60%", "step=1", "tuning=1", "images=32"], 0.3),
        (["selector=dynamic_patch_slimming", "tolerance=0.5", "step=2", "images=16"], 0),
        (["selector=patch_slimming", "tolerance=0.5", "step=2", "images=16"], 0),
        (["selector=merge", "keep=0.7"], 0),
        (["selector=pool", "keep=0.25", "places=[2]"], 0.3),
        (["selector=evit", "keep=0.7"], 0.3),
        *(([f"selector={word}", "keep=0.7"], 0) for word in ("attention", "fixed")),
    ],
)
def test_the_command_with_other_selectors(
    words: list[str], epochs: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_timm(build(ARCH).eval(), tmp_path / "model")
    words = [*words, f"epochs={epochs}", "dataset=digits", f"folder={tmp_path / 'out'}"]
    assert main(["tokens", str(tmp_path / "model"), *words]) == 0
    record = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert record["onnx"]["passed"]
    assert (tmp_path / "out" / "metrics.jsonl").exists() == (epochs > 0)
    made, macs = load_timm(tmp_path / "out" / "model"), record["macs"]
    assert isinstance(made, Model)
    assert made.arch.selector == record["selector"] == words[0].removeprefix("selector=")
    assert macs["after"] < (0.6 if "budget=macs<=60%" in words else 1) * macs["before"]
    if "images=16" in words:
        assert record["images"] == 16
        assert max(record["errors"]) <= record["tolerance"] == 0.5
        assert record["patches"] == sorted(record["patches"], reverse=True)


@pytest.mark.slow
def test_images_without_labels(tmp_path: Path) -> None:
    """A network of features on a folder of images: it learns from itself alone."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(12, 8, 8), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    save_timm(build(Arch.from_json({**ARCH.to_json(), "num_classes": 0})).eval(), tmp_path / "model")
    words = [f"dataset={tmp_path / 'images'}", "keep=[0.5,0.25]", "places=[1,2]", "epochs=1", "batch_size=4"]
    assert main(["tokens", str(tmp_path / "model"), *words, f"folder={tmp_path / 'out'}"]) == 0
    record = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert "accuracy" not in record
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = next(line["losses"] for line in reversed(lines) if "losses" in line)
    assert {"loss", "ratio", "tokens"} <= set(losses)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "takes a trained network and dataset=IMAGES"),
        (["keep=0.2"], "keep is 0.2, which leaves 0 of 16 patches at block 2"),
        (["keep=1.5"], "a share lies between 0 and 1"),
        (["keep=0.7,0.5", "places=1,2,3"], "keep has 2 shares and there are 3 places"),
        (["places=[3,9]"], "places has 9; the network has blocks 0 to 3"),
        (["places=[3,1]"], "numbers of blocks that rise"),
        (["augment=none2"], "augment is 'none2'"),
        (["weight=1"], "Nearest: 'weights'"),
        (["selector=patchslimming", "tolerance=0.1"], "Nearest: 'patch_slimming'"),
        (["selector=patch_slimming"], "budget is None and tolerance None; one of them says how far"),
        (["selector=patch_slimming", "budget=macs<=55%", "tolerance=0.1"], "one of them says how far"),
        (["selector=patch_slimming", "budget=macs<=55%", "keep=0.7"], "finds by itself where and how many"),
        (["selector=patch_slimming", "budget=latency<=1ms"], "Use macs, for example macs<=55%"),
        (["selector=patch_slimming", "tolerance=-1"], "an error is at least 0"),
        (["selector=merge", "tuning=3"], "tuning is given beside selector=merge, which keeps the share"),
        (["budget=macs<=55%"], "budget is given beside selector=predictor, which keeps the share"),
        (["selector=pool", "keep=0.7"], "keep"),
        (["selector=merge", "weights=[2,1,1]"], "Leave weights out"),
        (["weights=[-1,0,0]"], "a loss counts 0 or more"),
        (["epochs=0"], "0 with a selector that need not be trained"),
    ],
)
def test_bad_words_are_refused(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_timm(build(ARCH).eval(), tmp_path / "model")
    more = ["dataset=digits", *words] if words else []
    assert main(["tokens", str(tmp_path / "model"), *more, f"folder={tmp_path / 'out'}"]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_it_learns_what_to_keep() -> None:
    """A timm ViT on digits: without training more than half is lost, with a short one a tenth at most; the original
    stays as it was. So few steps need a larger weight of the share and a faster backbone than the paper's."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2,
        "global_pool": "avg",
    }
    network: Any = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, **sizes)
    network.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.3,), "std": (0.37,), "num_classes": 10}
    data, augment = open_data(DIGITS), Augment(rotate=10.0, zoom=(0.9, 1.1))
    batches = TrainBatches(data.train, augment, batch_size=64, seed=0)
    fit(network, Classification(), Fixed(), batches, config=TrainConfig(epochs=40, lr=4e-3, monitor_every=0))
    weights = {name: p.clone() for name, p in network.named_parameters()}
    holdout = EvalBatches(data.holdout, batch_size=512)
    untrained = with_selections(network.eval(), 0.7, generator=torch.Generator().manual_seed(0))
    config, shares = dynamicvit_config(20, 4e-3, slow_lr_scale=0.3), (20.0, 0.5, 0.5)
    fewer = fewer_tokens(network, batches, 0.7, config=config, weights=shares, augment=augment).network
    scores = {net: evaluate(net.eval(), holdout).accuracy for net in (network, untrained, fewer)}
    assert scores[network] > 0.88
    assert scores[fewer] > scores[network] - 0.1
    assert scores[untrained] < scores[fewer] - 0.3
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=0, atol=0)
