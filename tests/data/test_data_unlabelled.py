"""Images without labels: how they are opened and batched, what is refused, and images that are given as tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vitnas.cli import main
from vitnas.data import (
    Augment,
    Data,
    DataConfig,
    EvalBatches,
    TrainBatches,
    as_data,
    has_labels,
    open_data,
    synthetic,
)
from vitnas.errors import UserError
from vitnas.sample import Fixed
from vitnas.train import Batch, Classification, Teacher, TrainConfig, evaluate, fit
from vitnas.train.losses import Soft, TokenMixup


def write_images(folder: Path, count: int, size: tuple[int, int] = (12, 12)) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{number}.png")


def names(data: Data, log: Path) -> list[set[str]]:
    splits = (data.train, data.holdout, data.open_test(log))
    return [{images.name(i) for i in range(len(images))} for images in splits]


def test_a_folder_of_images_has_no_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "photos"
    write_images(root, 20)
    for junk in ("__MACOSX/._0.png", ".trash/1.png", "._2.png", "notes.txt", ".DS_Store", "sub/empty.txt"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_bytes(b"no image")
    (root / "5.png").write_bytes(b"cut short")
    data = open_data(DataConfig(dataset=str(root), holdout=0.25))
    assert (data.num_classes, data.class_names) == (0, ())
    assert data.corrupt == ["5.png"]
    train, holdout, test = names(data, tmp_path / "log.json")
    assert [len(train), len(holdout), len(test)] == [11, 4, 4]
    assert train | holdout | test == {f"{i}.png" for i in range(20)} - {"5.png"}
    assert "20 images (20%, by file name) are set apart as test" in caplog.text
    found = data.fingerprint()
    assert found.counts == {"train": (11,), "holdout": (4,), "test": (4,)}
    again = open_data(DataConfig(dataset=str(root), holdout=0.25))
    assert again.fingerprint() == found
    assert [again.holdout.name(i) for i in range(4)] == [data.holdout.name(i) for i in range(4)]


def test_labels_of_any_dataset_can_be_left_out(tmp_path: Path) -> None:
    write_images(tmp_path / "nested/train/2024/may", 6)
    write_images(tmp_path / "nested/train/2025", 6)
    write_images(tmp_path / "nested/test/new", 3)
    data = open_data(DataConfig(dataset=str(tmp_path / "nested"), holdout=4, labels=False))
    assert data.num_classes == 0
    assert [len(some) for some in names(data, tmp_path / "log.json")] == [8, 4, 3]
    assert "2024/may/0.png" in names(data, tmp_path / "log.json")[0] | names(data, tmp_path / "log.json")[1]
    digits, plain = open_data(DataConfig()), open_data(DataConfig(labels=False))
    assert (plain.num_classes, plain.in_chans, plain.image_size) == (0, 1, 8)
    assert plain.fingerprint().sha256 != digits.fingerprint().sha256
    assert len(plain.train) + len(plain.holdout) == len(digits.train) + len(digits.holdout)


def test_hugging_face_sets_need_no_column_of_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the data extra is not installed")
    write_images(tmp_path / "images", 12)
    rows = {"photo": [{"bytes": path.read_bytes(), "path": None} for path in (tmp_path / "images").iterdir()]}
    folder = tmp_path / "set"
    folder.mkdir()
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"photo": datasets.Image()}))
    table.to_parquet(str(folder / "train.parquet"))
    config = {"dataset": f"hfds/{folder}", "root": str(tmp_path / "cache"), "holdout": 3}
    data = open_data(DataConfig(**config, labels=False))  # type: ignore[arg-type]
    assert (data.num_classes, len(data.holdout), data.image_size) == (0, 3, 12)
    assert next(iter(EvalBatches(data.holdout, batch_size=8)))[0].shape == (3, 3, 12, 12)
    with pytest.raises(
        UserError, match=r"target_key is 'label'; .* photo\. Choose one of them, or use data\."
    ):
        open_data(DataConfig(**config))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "augment",
    [Augment(shift=0.1, hflip=0.5), Augment(scale=(0.3, 1.0), re_prob=0.5), Augment(auto_augment="rand-m9")],
    ids=["batch", "crops", "colours"],
)
@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "on access"])
def test_batches_have_a_row_of_no_labels_per_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: Augment, in_memory: bool
) -> None:
    if not in_memory:
        monkeypatch.setattr("vitnas.data.images.RAM_BYTES", 0)
    write_images(tmp_path, 12, size=(14, 12))
    (tmp_path / "5.png").write_bytes(b"cut short")
    data = open_data(DataConfig(dataset=str(tmp_path), holdout=2, augment=augment, image_size=8))
    stream = TrainBatches(data.train, data.augment, batch_size=4, seed=0).from_step(1)
    images_BCHW, targets_B0 = next(stream)
    assert (images_BCHW.shape, targets_B0.shape, targets_B0.dtype) == ((4, 3, 8, 8), (4, 0), torch.int64)
    batches = EvalBatches(data.train, batch_size=4)
    first, second = list(batches), list(batches)  # read, then from the cache
    for (images, targets), (again, _) in zip(first, second, strict=True):
        assert targets.shape == (len(images), 0)
        assert not has_labels(targets)
        torch.testing.assert_close(images, again, rtol=0, atol=0)
    part = Batch((images_BCHW,), targets_B0).part(slice(1, 3))
    assert (len(part), part.targets.shape) == (2, (2, 0))


def test_splits_that_differ_in_having_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 8)
    for name in ("cat", "dog"):
        write_images(tmp_path / "test" / name, 3)
    with pytest.raises(
        UserError, match=r"The test images of .* have labels and its train images have none; both"
    ):
        open_data(DataConfig(dataset=str(tmp_path), holdout=2))
    assert open_data(DataConfig(dataset=str(tmp_path), holdout=2, labels=False)).num_classes == 0
    write_images(tmp_path / "one" / "train" / "train", 8)
    with pytest.raises(UserError, match=r"has one class only, 'train'; .*or use data\.labels=false"):
        open_data(DataConfig(dataset=str(tmp_path / "one")))
    write_images(tmp_path / "few", 8)
    with pytest.raises(UserError, match=r"holdout is 6: 6 of 6 images cannot be set apart; there must"):
        open_data(DataConfig(dataset=str(tmp_path / "few"), holdout=6))
    (tmp_path / "none" / ".hidden").mkdir(parents=True)
    write_images(tmp_path / "none" / ".hidden", 2)
    with pytest.raises(UserError, match=r"none has no images \(\.png"):
        open_data(DataConfig(dataset=str(tmp_path / "none")))


class Mean(nn.Module):
    """Logits of the image's mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BY: Tensor = self.head(images_BCHW.mean((2, 3)))
        return logits_BY


def unlabelled() -> Data:
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    return Data.from_arrays(train=(images, None), config=DataConfig(holdout=4, augment="none"))


def test_what_needs_labels_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = unlabelled()
    batches, config = TrainBatches(data.train, Augment(), batch_size=4, seed=0), TrainConfig(epochs=1)
    rule = r"needs labels, and these images have none\. Put the images of each class into a folder"
    with pytest.raises(UserError, match=f"accuracy {rule}"):
        evaluate(Mean(), EvalBatches(data.holdout, batch_size=4))
    for smoothing in (0.0, 0.1):
        with pytest.raises(UserError, match=f"this task {rule}"):
            fit(Mean(), Classification(label_smoothing=smoothing), Fixed(), batches, config=config)
    with pytest.raises(UserError, match=f"token mixup {rule}"):
        fit(Mean(), TokenMixup(num_classes=4, grid=(2, 2)), Fixed(), batches, config=config)
    write_images(tmp_path / "photos", 20)
    assert main(["run", "images", f"data.dataset={tmp_path / 'photos'}", f"folder={tmp_path / 'run'}"]) == 2
    assert "`vitnas run` needs labels, and these images have none." in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.yaml").exists()


@pytest.mark.parametrize("mixed", [{"mixup": 0.8}, {"cutmix": 1.0, "label_smoothing": 0.1}], ids=str)
def test_a_teacher_teaches_without_labels(mixed: dict[str, float]) -> None:
    """Mixing mixes the images, which is all there is to mix."""
    data, teacher, seen = unlabelled(), Mean(), list[Batch]()

    class Watched(Soft):
        def mix(self, batch: Batch) -> Batch:
            seen.append(batch)
            return batch

    batches = TrainBatches(data.train, Augment(), batch_size=4, seed=0)
    fit(
        student := Mean(),
        Watched(),
        Fixed(),
        batches,
        config=TrainConfig(epochs=2, monitor_every=0),
        teacher=Teacher(teacher),
        augment=Augment(**mixed),  # type: ignore[arg-type]
        num_classes=data.num_classes,
    )
    assert all(bool(p.isfinite().all()) for p in student.parameters())
    plain = [next(batches.from_step(step))[0] for step in range(len(seen))]
    assert all(batch.targets.shape == (4, 0) for batch in seen)
    assert any(not torch.equal(batch.images_BCHW, images) for batch, images in zip(seen, plain, strict=True))


def test_images_as_tensors() -> None:
    labelled = synthetic()
    assert as_data(labelled) is labelled
    config = DataConfig(holdout=4, augment="none")
    images_NHWC = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    first = as_data(images_NHWC, config)
    assert (first.num_classes, first.image_size, len(first.train), len(first.holdout)) == (0, 8, 28, 4)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    bytes_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    network_NCHW = (bytes_NCHW / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 40, 16):
            yield network_NCHW[start : start + 16], torch.arange(start, min(start + 16, 40)) % 2

    for given in (bytes_NCHW, network_NCHW, network_NCHW.split(16), list(network_NCHW), pairs()):
        data = as_data(given, config, constants=(mean, std))
        assert (data.mean, data.std) == (mean, std)
        assert data.num_classes == (2 if isinstance(given, Iterator) else 0)
        images_BCHW, _ = next(iter(EvalBatches(data.holdout, batch_size=4)))
        torch.testing.assert_close(images_BCHW, network_NCHW[_places(data)], atol=1e-5, rtol=0)


def _places(data: Data) -> list[int]:
    """Rows of the given images that the holdout has; names end in them."""
    return [int(data.holdout.name(i).rpartition("/")[2]) for i in range(len(data.holdout))]


def test_images_that_are_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    for given, message in (
        ([], r"images cannot be read \(none came\); they must be Data, a folder"),
        (3, r"images cannot be read \('int' object is not iterable\)"),
        (
            [torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)],
            r"images cannot be read \(Sizes of tensors must match",
        ),
        (
            torch.zeros(4, 8, 8),
            r"the images have shape \(4, 8, 8\); float images must be \(N, C, H, W\) with 3 ch",
        ),
        (torch.full((40, 3, 8, 8), 200.0), r"the images go from .* float images must be normalised by these"),
        (torch.full((40, 3, 8, 8), float("nan")), r"the images go from nan to nan"),
        ("digitz", r"dataset is 'digitz'; .* Nearest: 'digits'"),
    ):
        with pytest.raises(UserError, match=message):
            as_data(given)  # type: ignore[arg-type]
    monkeypatch.setattr("vitnas.data.given.RAM_BYTES", 3 * 1024)
    endless = iter(lambda: torch.zeros(3, 8, 8, dtype=torch.uint8), None)
    with pytest.raises(UserError, match=r"images go on beyond 0 GiB; an iterable is kept in memory"):
        as_data(endless)
