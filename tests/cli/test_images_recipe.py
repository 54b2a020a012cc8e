"""The recipe `images` goes by how many images there are, how large they are, and the time given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitnas.cli.fields import make_run
from vitnas.counting import count
from vitnas.data import DataConfig
from vitnas.data.glance import Glance, glance
from vitnas.recipes.images import images, images_like
from vitnas.recipes.pretrain import pretrain
from vitnas.stages.run import FinalsConfig, save_run


def pictures(folder: Path, number: int, size: tuple[int, int]) -> None:
    folder.mkdir(parents=True)
    for n in range(number):
        Image.new("RGB", size, (n, 0, 0)).save(folder / f"{n}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        pictures(tmp_path / "set" / name, 5, (30, 20) if name == "cat" else (40, 50))
    (tmp_path / "set" / "cat" / "notes.txt").write_text("none")
    return tmp_path / "set"


def test_a_glance_counts_files_and_reads_a_few_headers(folder: Path, tmp_path: Path) -> None:
    assert glance(DataConfig(dataset=str(folder))) == Glance(10, 30)
    (folder / "dog" / "broken.png").write_bytes(b"nothing")
    assert glance(DataConfig(dataset=str(folder))) == Glance(11, 30)
    assert glance(DataConfig(dataset="digits")) == Glance(1797, 8)
    assert glance(DataConfig(dataset=str(tmp_path / "nowhere"))) is None
    assert glance(DataConfig(dataset="torch/nothing")) is None
    for split in ("train", "val", "test"):
        pictures(tmp_path / "three" / split / "cat", 1, (8, 8))
    assert glance(DataConfig(dataset=str(tmp_path / "three"))) == Glance(3, 8, has_holdout=True)


@pytest.mark.parametrize(
    ("seen", "seconds", "size", "preset", "budget", "epochs", "batch", "folds", "time"),
    [
        (Glance(300, 8), None, 8, "micro", "1M", 200, 32, 3, "10m"),
        (Glance(800, 28), None, 28, "px32", "10M", 200, 64, 3, "10m"),
        (Glance(800, 28, has_holdout=True), None, 28, "px32", "10M", 200, 64, 1, "10m"),
        (Glance(2_000, 375), None, 64, "px64", "20M", 100, 64, 1, "10m"),
        (Glance(20_000, 32), None, 32, "px32", "20M", 100, 128, 1, "30m"),
        (Glance(100_000, 500), None, 64, "px64", "40M", 50, 128, 1, "1h"),
        (Glance(100_000, 48), 14_400.0, 64, "px64", "80M", 50, 128, 1, None),
        (Glance(100_000, 500), 14_400.0, 96, "px96", "150M", 50, 128, 1, None),
    ],
)
def test_what_the_recipe_chooses(
    seen: Glance,
    seconds: float | None,
    size: int,
    preset: str,
    budget: str,
    epochs: float,
    batch: int,
    folds: int,
    time: str | None,
) -> None:
    run = images_like(seen, images(), seconds)
    assert (run.data.image_size, run.space.size, run.budget) == (size, preset, f"macs<={budget}")  # type: ignore[attr-defined]
    assert (run.supernet.epochs, run.retrain.train.epochs, run.data.batch_size) == (epochs, epochs, batch)
    assert (run.search.folds, run.time) == (folds, time)
    space, limit = run.space.build(image_size=size, in_chans=3, num_classes=2), float(budget[:-1]) * 1e6
    costs = space.cost_table().costs(space.random_matrix(2000, np.random.default_rng(0)))["macs"]
    assert ((0.5 * limit < costs) & (costs < limit)).mean() > 0.05, "the budget leaves something to find"
    assert limit < count(space.largest()).macs


def test_what_is_asked_comes_before(folder: Path, tmp_path: Path) -> None:
    run = make_run("images", {"dataset": str(folder)})
    assert (run.data.image_size, run.search.folds, run.time, run.data.batch_size) == (28, 3, "10m", 32)
    run = make_run("images", {"dataset": str(folder), "time": "3h", "image_size": "16", "batch_size": "8"})
    assert (run.data.image_size, run.time, run.data.batch_size) == (16, "3h", 8)
    assert make_run("images", {"dataset": str(folder), "searcher": "halving"}).search.folds == 1
    begun = images_like(Glance(300, 32), replace(images(), pretrained="runs/pre"), None)
    assert (begun.space, begun.data.image_size, begun.budget) == (
        replace(pretrain().space, patch_size=8),  # type: ignore[call-arg]
        64,
        images().budget,
    )
    plain_one = make_run(
        "images", {"dataset": str(folder), "pretrained": "runs/pre", "space.num_heads": "[2,3]"}
    )
    assert plain_one.space.num_heads == (2, 3), "fields of the space that a pretrained network asks for"
    (tmp_path / "mine.yaml").write_text(f"recipe: images\ndata: {{dataset: {folder}}}\nseed: 3\n")
    assert make_run(str(tmp_path / "mine.yaml"), {}) == replace(
        make_run("images", {"dataset": str(folder)}), seed=3
    )
    whole = replace(run, data=replace(run.data, image_size=64), finals=FinalsConfig(archs=4))
    save_run(whole, tmp_path / "run.yaml")
    assert make_run(str(tmp_path / "run.yaml"), {}) == whole, "a run folder's says all"


def test_few_images_and_a_latency_alone_train_no_supernet() -> None:
    clock = "latency<=1ms@onnxruntime"
    asked = replace(images(), budget=clock)
    run = make_run("images", {"dataset": "digits", "budget": clock})
    assert (run.search.searcher, run.search.num_trials, run.budget) == ("guided_halving", 14, clock)
    for other, seen in (
        (asked, Glance(20_000, 32)),
        (asked, Glance(300, 32)),  # scored in three parts in turn, which only a supernet's Archs can be
        (replace(asked, budget=f"{clock} and macs<=5M"), Glance(2_000, 32)),
        (replace(asked, finals=FinalsConfig(archs=4)), Glance(2_000, 32)),
        (replace(asked, search=replace(asked.search, searcher="random")), Glance(2_000, 32)),
        (replace(asked, retrain=replace(asked.retrain, start="inherited")), Glance(2_000, 32)),
    ):
        assert not images_like(seen, other, None).search.trains
