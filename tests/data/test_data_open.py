"""open_data: the digits, folders in every layout, corrupt files, torchvision files, arrays, and the logged test."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitnas.data import (
    AUGMENTS,
    Data,
    DataConfig,
    EvalBatches,
    Fingerprint,
    Readings,
    TrainBatches,
    open_data,
    require_not_test,
    synthetic,
)
from vitnas.data.splits import carve
from vitnas.errors import MissingExtra, UserError
from vitnas.exporting import save_timm
from vitnas.runs import from_json, to_json


def write_images(folder: Path, per_class: dict[str, int], size: tuple[int, int] = (12, 12)) -> None:
    """Noise as JPEG, `count` files per class folder, all different."""
    rng = np.random.default_rng(list(str(folder.name).encode()))
    for name, count in per_class.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_digits_are_split_the_same_for_every_seed(tmp_path: Path) -> None:
    data = open_data(DataConfig())
    assert (data.num_classes, data.in_chans, data.image_size) == (10, 1, 8)
    assert (len(data.train), len(data.holdout)) == (1293, 144)
    assert data.augment == AUGMENTS["digits"]
    test = data.open_test(tmp_path / "test.json")
    other = open_data(DataConfig(seed=1))
    again = other.open_test(tmp_path / "test.json")
    assert len(test) == 360
    torch.testing.assert_close(
        again.pixels(torch.arange(360)), test.pixels(torch.arange(360)), rtol=0, atol=0
    )
    assert torch.bincount(test.targets).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    # A changed split would change what every published figure means.
    pixels = test.pixels(torch.arange(360))
    assert pixels is not None
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16] == "4d28609bd224c8cb"
    assert not torch.equal(data.holdout.places, other.holdout.places)


def test_holdout_is_stratified_and_apart_from_train() -> None:
    data = open_data(DataConfig(holdout=100))
    assert len(data.holdout) == 100
    assert not set(data.train.places.tolist()) & set(data.holdout.places.tolist())
    assert set(torch.bincount(data.holdout.targets).tolist()) == {10}


def test_carve_moves_few_images_when_some_are_added() -> None:
    names = [f"image{i}" for i in range(200)]
    targets = [i % 4 for i in range(200)]
    _, before = carve(targets, names, 40, "salt")
    _, after = carve([*targets, 0, 1], [*names, "new0", "new1"], 40, "salt")
    assert len(set(before) & set(after)) >= 38


def test_every_look_at_test_is_logged(tmp_path: Path) -> None:
    log = tmp_path / "test_reads.json"
    data = synthetic()
    data.open_test(log, purpose="final table")
    data.open_test(log, purpose="a second look")
    readings = Readings.load(log).readings
    assert [reading.purpose for reading in readings] == ["final table", "a second look"]
    assert [reading.num_images for reading in readings] == [64, 64]
    log.write_text("[]")
    with pytest.raises(UserError, match=r"test_reads\.json cannot be read .* Restore it: it says how often"):
        data.open_test(log)


def test_search_may_not_have_test(tmp_path: Path) -> None:
    data = synthetic()
    require_not_test(data.holdout, "The search")
    with pytest.raises(UserError, match=r"The search was given the test split; test is read once"):
        require_not_test(data.open_test(tmp_path / "log.json"), "The search")
    with pytest.raises(UserError, match="Sampler was given the test split"):
        require_not_test(data.open_test(tmp_path / "log.json").subset([0, 1]), "Sampler")


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_folder_with_splits(tmp_path: Path, test_name: str) -> None:
    write_images(tmp_path / "train", {"cat": 8, "dog": 8, "ant10": 8, "ant9": 8})
    write_images(tmp_path / test_name, {"cat": 2, "dog": 2, "ant10": 2, "ant9": 2})
    data = open_data(DataConfig(dataset=str(tmp_path), holdout=0.25))
    assert data.class_names == ("ant9", "ant10", "cat", "dog")
    assert (data.image_size, data.in_chans) == (12, 3)
    assert (len(data.train), len(data.holdout)) == (24, 8)
    assert len(data.open_test(tmp_path / "log.json")) == 8
    assert bool(data.notes) == (test_name != "test")


def test_flat_folder_is_split_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, {"cat": 20, "dog": 10})
    Image.new("RGB", (5, 5)).save(tmp_path / "beside.png")  # no class; must not become one
    with caplog.at_level(logging.WARNING):
        data = open_data(DataConfig(dataset=str(tmp_path), holdout=4))
    assert "has no test split: 6 of its 30 images (20%, by file name) are set apart" in caplog.text
    assert data.class_names == ("cat", "dog")
    test = data.open_test(tmp_path / "log.json")
    names = [{images.name(i) for i in range(len(images))} for images in (data.train, data.holdout, test)]
    assert [len(some) for some in names] == [20, 4, 6]
    assert len(set.union(*names)) == 30
    assert torch.bincount(test.targets).tolist() == [4, 2]
    caplog.clear()
    larger = data.resized(24)
    assert larger.image_size == 24
    assert larger.notes == data.notes
    assert [larger.holdout.name(i) for i in range(4)] == [data.holdout.name(i) for i in range(4)]
    assert not caplog.text, "what was said when they were opened is not said again"


def test_train_folder_without_test_is_split(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": 10, "dog": 10})
    data = open_data(DataConfig(dataset=str(tmp_path), holdout=4))
    assert data.fingerprint().counts == {"train": (6, 6), "holdout": (2, 2), "test": (2, 2)}


def test_root_gives_the_folder_too(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 10, "dog": 10})
    for name in ("", "torch/image_folder"):
        assert len(open_data(DataConfig(dataset=name, root=str(tmp_path), holdout=4)).train) == 12


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("digitz", r"dataset is 'digitz'; it must be an existing folder .* Nearest: 'digits'"),
        ("torch/cifar11", r"dataset is 'torch/cifar11'; torch/ knows cifar10, .* Nearest: 'cifar10'"),
        ("torch/cifar10", r"torch/cifar10 has no root; .* Add root=<folder>"),
        ("hfds//no/such/folder", r"dataset is 'hfds//no/such/folder'; /no/such/folder is not a folder"),
    ],
)
def test_unknown_dataset(dataset: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_data(DataConfig(dataset=dataset))


def test_bad_folders(tmp_path: Path) -> None:
    def refused(folder: Path, message: str, **fields: object) -> None:
        with pytest.raises(UserError, match=message):
            open_data(DataConfig(dataset=str(folder), **fields))  # type: ignore[arg-type]

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty has no images \(\.png .*it must hold one folder of images per class")
    write_images(tmp_path / "one", {"cat": 5})
    refused(tmp_path / "one", r"has one class only, 'cat'; at least 2 are needed")
    write_images(tmp_path / "odd" / "train", {"cat": 4, "dog": 4, "elk": 4})
    write_images(tmp_path / "odd" / "test", {"cat": 2, "dogs": 2, "elk": 2})
    refused(tmp_path / "odd", r"differ between its splits \(only in train: dog; only in test: dogs\)")
    write_images(tmp_path / "no_train" / "test", {"cat": 2, "dog": 2})
    refused(tmp_path / "no_train", r"has the folder 'test' but no 'train'; both are needed")
    refused(tmp_path / "odd", r"test_split is 'tests'; .* Nearest: 'test'", test_split="tests")
    refused(tmp_path / "odd" / "test" / "cat" / "0.jpg", "a file; it must be a folder of class folders")


def test_too_few_images_for_a_holdout(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": 6, "dog": 6})
    write_images(tmp_path / "test", {"cat": 2, "dog": 2})
    with pytest.raises(
        UserError, match=r"holdout is 1: 1 of 12 images cannot be set apart; each of the 2 classes"
    ):
        open_data(DataConfig(dataset=str(tmp_path), holdout=1))
    with pytest.raises(UserError, match=r"max_images is 1: .*Give more images"):
        open_data(DataConfig(dataset=str(tmp_path), max_images=1))


@pytest.mark.parametrize("ram", ["decoded at once", "read on access"])
def test_corrupt_images_are_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, ram: str
) -> None:
    write_images(tmp_path / "train", {"cat": 12, "dog": 12})
    write_images(tmp_path / "test", {"cat": 2, "dog": 2})
    cut_short(tmp_path / "train" / "cat" / "3.jpg")
    (tmp_path / "train" / "dog" / "5.jpg").write_bytes(b"not a picture")
    cut_short(tmp_path / "test" / "dog" / "1.jpg")
    if ram == "read on access":
        monkeypatch.setattr("vitnas.data.images.RAM_BYTES", 0)
    data = open_data(DataConfig(dataset=str(tmp_path), holdout=4))
    seen = sum(
        len(targets)
        for images in (data.train, data.holdout)
        for _, targets in EvalBatches(images, batch_size=5)
    )
    assert seen == 22
    assert sorted(data.corrupt) == ["cat/3.jpg", "dog/5.jpg"]
    assert "cannot be read and are skipped" in caplog.text
    test = data.open_test(tmp_path / "log.json")
    assert sum(len(targets) for _, targets in EvalBatches(test, batch_size=5)) == 3
    assert sorted(data.corrupt) == ["cat/3.jpg", "dog/1.jpg", "dog/5.jpg"]


def test_corrupt_images_can_be_fatal(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 12, "dog": 12})
    cut_short(tmp_path / "cat" / "3.jpg")
    with pytest.raises(UserError, match=r"cat/3\.jpg cannot be read .*on_corrupt is 'raise'"):
        open_data(DataConfig(dataset=str(tmp_path), on_corrupt="raise", holdout=4))


def test_nothing_readable(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 6, "dog": 6})
    for path in tmp_path.glob("*/*.jpg"):
        path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"None of the .* images tried in .* can be read \(the first is cat/"):
        open_data(DataConfig(dataset=str(tmp_path)))


def test_photographs_get_timms_evaluation_transform(tmp_path: Path) -> None:
    from timm.data import create_transform

    write_images(tmp_path / "train", {"cat": 3, "dog": 3}, size=(90, 70))
    write_images(tmp_path / "test", {"cat": 2, "dog": 2}, size=(70, 90))
    for augment in ("none", "strong"):  # strong keeps whole images in memory, none cropped ones
        data = open_data(DataConfig(dataset=str(tmp_path), image_size=48, holdout=2, augment=augment))
        transform = create_transform((3, 48, 48), interpolation="bicubic", crop_pct=0.875)
        images_BCHW, _ = next(iter(EvalBatches(data.holdout, batch_size=2)))
        for position in range(2):
            path = tmp_path / "train" / data.holdout.name(position)
            want = transform(Image.open(path).convert("RGB"))
            torch.testing.assert_close(images_BCHW[position], want, rtol=0, atol=1e-6)
    assert open_data(DataConfig(dataset=str(tmp_path), holdout=2)).image_size == 224


@pytest.mark.parametrize("augment", ["none", "strong"])
@pytest.mark.parametrize("size", [(32, 64), (48, 20)], ids=str)
def test_height_and_width_apart(tmp_path: Path, augment: str, size: tuple[int, int]) -> None:
    """Evaluation is timm's own for such a size, also from images that were kept whole for random crops."""
    from timm.data import create_transform

    write_images(tmp_path / "train", {"cat": 3, "dog": 3}, size=(150, 80))
    write_images(tmp_path / "test", {"cat": 2, "dog": 2}, size=(80, 150))
    config = DataConfig(dataset=str(tmp_path), image_size=size, holdout=2, augment=augment)
    data = open_data(config)
    assert data.image_size == size
    transform = create_transform((3, *size), interpolation="bicubic", crop_pct=0.875)
    images_BCHW, _ = next(iter(EvalBatches(data.holdout, batch_size=2)))
    for position in range(2):
        path = tmp_path / "train" / data.holdout.name(position)
        want = transform(Image.open(path).convert("RGB"))
        torch.testing.assert_close(images_BCHW[position], want, rtol=0, atol=1e-6)
    assert data.open_test(tmp_path / "log.json").read(0) is not None
    images_BCHW, _ = next(TrainBatches(data.train, data.augment, batch_size=2, seed=0).from_step(0))
    assert images_BCHW.shape == (2, 3, *size)


def test_small_images_keep_their_shape(tmp_path: Path) -> None:
    write_images(tmp_path / "strips", {"a": 5, "b": 5}, size=(64, 32))
    data = open_data(DataConfig(dataset=str(tmp_path / "strips"), holdout=2))
    assert (data.image_size, data.in_chans) == ((32, 64), 3)
    assert not any("cut" in note for note in data.notes)
    write_images(tmp_path / "mixed", {"a": 5}, size=(28, 20))
    write_images(tmp_path / "mixed", {"b": 5}, size=(22, 35))
    assert open_data(DataConfig(dataset=str(tmp_path / "mixed"), holdout=2)).image_size == 20


def test_sides_that_are_cut_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "strips", {"a": 5, "b": 5}, size=(64, 32))
    data = open_data(DataConfig(dataset=str(tmp_path / "strips"), holdout=2, image_size=32))
    said = (
        f"The images of {tmp_path / 'strips'} are about 32 x 64 pixels (height, width) and become 32 x 32: 50% of "
        "each is cut off. image_size takes two numbers, height and width."
    )
    assert said in data.notes
    assert said in caplog.text
    write_images(tmp_path / "photographs", {"a": 5, "b": 5}, size=(80, 60))
    photographs = open_data(DataConfig(dataset=str(tmp_path / "photographs"), holdout=2))
    assert not any("cut off" in note for note in photographs.notes)


@pytest.mark.parametrize("opened_for", ["none", "strong"])
def test_random_crops_are_taken_from_whole_images(tmp_path: Path, opened_for: str) -> None:
    """Also when the images were opened for another Augment and only cropped copies are in memory."""
    write_images(tmp_path, {"cat": 6, "dog": 6}, size=(90, 60))
    data = open_data(DataConfig(dataset=str(tmp_path), image_size=32, holdout=2, augment=opened_for))
    whole, cropped = data.train.read(0, whole=True), data.train.read(0)
    assert whole is not None
    assert cropped is not None
    assert whole.shape == (36, 54, 3)  # shortest side 32 / 0.875
    assert data.train.store.fit(cropped).shape == (3, 32, 32)


def test_grey_and_sixteen_bit_images(tmp_path: Path) -> None:
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for number in range(6):
            pixels = np.full((10, 10), level * 257, np.uint16)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    data = open_data(DataConfig(dataset=str(tmp_path), holdout=2))
    assert data.in_chans == 1
    assert {int(data.train.read(i)[0, 0, 0]) for i in range(len(data.train))} == {40, 200}  # type: ignore[index]
    assert open_data(DataConfig(dataset=str(tmp_path), holdout=2, in_chans=3)).in_chans == 3
    with pytest.raises(UserError, match=r"mean has 3 values; the images have 1 channels"):
        open_data(DataConfig(dataset=str(tmp_path), holdout=2, mean=(0.5, 0.5, 0.5)))


def test_torchvision_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"torch/mnist cannot be opened in .*add download=true"):
        open_data(DataConfig(dataset="torch/mnist", root=str(tmp_path)))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images = struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 2049, count) + bytes(i % 10 for i in range(count))
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    data = open_data(DataConfig(dataset="torch/mnist", root=str(tmp_path), holdout=10))
    assert (data.num_classes, data.in_chans, data.image_size) == (10, 1, 28)
    assert (len(data.train), len(data.holdout), len(data.open_test(tmp_path / "log.json"))) == (30, 10, 20)


def test_max_images_caps_each_split(tmp_path: Path) -> None:
    data = open_data(DataConfig(max_images=100, holdout=20))
    assert (len(data.train), len(data.holdout), len(data.open_test(tmp_path / "l.json"))) == (80, 20, 100)


def test_fingerprint_changes_with_pixels_labels_and_seed() -> None:
    same = synthetic().fingerprint()
    assert from_json(Fingerprint, json.loads(json.dumps(to_json(same)))) == same
    assert same == synthetic().fingerprint()
    assert same.counts == {"train": (48,) * 4, "holdout": (16,) * 4, "test": (16,) * 4}
    assert synthetic(seed=1).fingerprint().sha256 != same.sha256


def test_arrays_of_every_layout() -> None:
    rng = np.random.default_rng(0)
    nhwc = rng.integers(0, 256, (40, 9, 9, 3), dtype=np.uint8)
    targets = np.arange(40) % 2
    for images in (nhwc, nhwc.transpose(0, 3, 1, 2), torch.from_numpy(nhwc)):
        data = Data.from_arrays(train=(images, targets), test=(images[:4], targets[:4]))
        assert (data.image_size, data.in_chans, data.class_names) == (9, 3, ("0", "1"))
        place = int(data.train.places[0])
        np.testing.assert_array_equal(data.train.read(0), nhwc[place])
    grey = Data.from_arrays(train=(nhwc[..., 0], targets), test=(nhwc[:4, ..., 0], targets[:4]))
    assert grey.in_chans == 1
    config = DataConfig(image_size=16)
    assert Data.from_arrays(train=(nhwc, targets), test=(nhwc, targets), config=config).image_size == 16


def test_arrays_that_do_not_fit() -> None:
    images, targets = np.zeros((10, 8, 8, 3), np.uint8), [0, 1] * 5

    def refused(
        message: str, images: np.ndarray = images, targets: list[int] = targets, **more: object
    ) -> None:
        with pytest.raises(UserError, match=message):
            Data.from_arrays(train=(images, targets), test=(images, targets), **more)  # type: ignore[arg-type]

    refused(r"train images are float64 with 4 axes; they must be uint8", images=images / 2)
    refused(
        r"train images have shape \(10, 8, 5, 8\); 1 or 3 channels", images=np.zeros((10, 8, 8, 5), np.uint8)
    )
    refused(r"There are 3 targets for 10 images", targets=[0, 1, 0])
    refused(r"class_names has 1 names; the targets go up to 1", class_names=["a"])
    refused(r"has one class only", targets=[0] * 10)


def test_a_pretrained_model_says_how_images_are_normalised(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"cat": 5, "dog": 5})
    config = DataConfig(dataset=str(tmp_path / "images"), holdout=2)
    name = "vit_tiny_patch16_224"
    assert open_data(config).mean == (0.485, 0.456, 0.406)
    assert (open_data(config, pretrained=name).mean, open_data(config, pretrained=name).std) == (
        (0.5,) * 3,
    ) * 2
    said = open_data(replace(config, mean=(0.1, 0.2, 0.3)), pretrained=name)
    assert (said.mean, said.std) == ((0.1, 0.2, 0.3), (0.5,) * 3)
    model = timm.create_model(name, img_size=32, patch_size=8, depth=1, num_classes=2)
    save_timm(model, tmp_path / "saved", data_config={"mean": (0.2, 0.3, 0.4), "std": (0.1, 0.2, 0.3)})
    for folder in (f"local-dir:{tmp_path / 'saved'}", str(tmp_path / "saved")):
        kept = open_data(config, pretrained=folder)
        assert (kept.mean, kept.std) == ((0.2, 0.3, 0.4), (0.1, 0.2, 0.3))
    weights = tmp_path / "saved" / "model.safetensors"
    assert open_data(config, pretrained=f"{name}@{weights}").mean == (0.5,) * 3
    with pytest.raises(UserError, match=r"there is no file 'nowhere\.pth'"):
        open_data(config, pretrained=f"{name}@nowhere.pth")
    assert open_data(replace(config, in_chans=1), pretrained=name).mean != (0.5,)  # grey images are measured
    with pytest.raises(UserError, match=r"pretrained is 'vit_tinny_patch16_224'; .* Nearest: 'vit_tiny"):
        open_data(config, pretrained="vit_tinny_patch16_224")
    wrong = f"local-dir:{tmp_path / 'nowhere'}"
    with pytest.raises(UserError, match=rf"pretrained is '{wrong}', but there is no folder"):
        open_data(config, pretrained=wrong)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for dataset in ("hfds/some/name", "wds/shards"):
        with pytest.raises(MissingExtra, match=rf"'{dataset}' needs an optional part; .*vitnas\[data\]"):
            open_data(DataConfig(dataset=dataset))
