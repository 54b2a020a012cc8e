"""Folders as people have them: what is a class, what is a split, and what is left out with a word."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitnas.data import Data, DataConfig, folders, open_data
from vitnas.data.folders import named_splits
from vitnas.errors import UserError


def write(folder: Path, count: int = 6, *, seed: int | None = None) -> None:
    """Noise that no other folder has, unless it is given the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(folder).encode()) if seed is None else seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def names(data: Data, log: Path) -> dict[str, set[str]]:
    splits = {"train": data.train, "holdout": data.holdout, "test": data.open_test(log)}
    return {split: {images.name(i) for i in range(len(images))} for split, images in splits.items()}


def test_the_folder_at_the_top_is_the_class(tmp_path: Path) -> None:
    for place in ("indoor", "outdoor", "outdoor/at night"):
        write(tmp_path / "train" / "cats" / place)
        write(tmp_path / "train" / "dogs" / place)
    write(tmp_path / "train" / "dogs")
    data = open_data(DataConfig(dataset=str(tmp_path)))
    assert data.class_names == ("cats", "dogs")
    assert any("36 images (cats/indoor/0.png, " in n and "class_folders=leaf" in n for n in data.notes)
    leaf = open_data(DataConfig(dataset=str(tmp_path), class_folders="leaf"))
    assert leaf.class_names == ("at night", "dogs", "indoor", "outdoor")
    assert not any("class_folders" in note for note in leaf.notes)


def test_splits_inside_of_classes(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        for split, count in (("train", 6), ("val", 2), ("test", 3)):
            write(tmp_path / "set" / name / split, count)
    where = str(tmp_path / "set")
    with pytest.raises(UserError, match=r"holds the split folders test, train, val; .*class_folders=outside"):
        open_data(DataConfig(dataset=where))
    data = open_data(DataConfig(dataset=where, class_folders="outside"))
    assert data.class_names == ("cats", "dogs")
    assert data.fingerprint().counts == {"train": (6, 6), "holdout": (2, 2), "test": (3, 3)}
    found = names(data, tmp_path / "log.json")
    assert {Path(name).parts[1] for name in found["holdout"]} == {"val"}
    write(tmp_path / "plain" / "cats")
    with pytest.raises(UserError, match=r"class_folders is 'outside', but .* hold no folder 'train'"):
        open_data(DataConfig(dataset=str(tmp_path / "plain"), class_folders="outside"))


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("Training", "Testing"), ("seg_train/seg_train", "seg_test/seg_test"),
     ("train-images", "val-images"), ("TRAIN", "VAL")],
)  # fmt: skip
def test_splits_of_other_names(tmp_path: Path, train: str, test: str) -> None:
    for name in ("cats", "dogs"):
        write(tmp_path / train / name)
        write(tmp_path / test / name, 2)
    write(tmp_path / "seg_pred")
    data = open_data(DataConfig(dataset=str(tmp_path)))
    assert data.class_names == ("cats", "dogs")
    assert data.fingerprint().counts["test"] == (2, 2)


def test_classes_that_sound_like_splits() -> None:
    assert named_splits(["test tube", "train", "plane"])["train"] == "train"
    assert "test" not in named_splits(["test tube", "train", "plane"])
    assert {*named_splits(["Train set", "Plane", "Test tube"])} == {"Train set", "Plane", "Test tube"}


def test_a_validation_split_beside_test_is_the_holdout(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("val", 4), ("test", 3)):
        for name in ("a", "b"):
            write(tmp_path / split / name, count)
    where = str(tmp_path)
    data = open_data(DataConfig(dataset=where))
    assert data.fingerprint().counts == {"train": (10, 10), "holdout": (4, 4), "test": (3, 3)}
    assert (data.holdout.split, data.notes) == ("holdout", ())
    assert data.resized(16).fingerprint().counts == data.fingerprint().counts
    for asked in (0.1, 2):
        carved = open_data(DataConfig(dataset=where, holdout=asked))
        assert carved.fingerprint().counts["train"] == (9, 9)
        assert [f"'val' of {where} is left out, as holdout={asked}" in note for note in carved.notes] == [
            True
        ]
    named = open_data(DataConfig(dataset=where, test_split="val", holdout="test"))
    assert named.fingerprint().counts == {"train": (10, 10), "holdout": (3, 3), "test": (4, 4)}
    with pytest.raises(UserError, match=r"holdout is 'vla'; .* has val\..*Nearest: 'val'"):
        open_data(DataConfig(dataset=where, holdout="vla"))
    with pytest.raises(
        UserError, match="holdout is 'val', the name of a split, but digits has no other split"
    ):
        open_data(DataConfig(holdout="val"))


def test_an_unreadable_image_of_the_validation_split_is_named(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            write(tmp_path / split / name)
    (tmp_path / "val" / "a" / "0.png").write_bytes(b"none")
    data = open_data(DataConfig(dataset=str(tmp_path)))
    assert (len(data.holdout), data.corrupt) == (11, ["a/0.png"])


def test_a_class_that_another_split_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / "train" / name)
    for name in ("a", "c"):
        write(tmp_path / "val" / name)
    (tmp_path / "val" / "b").mkdir()
    data = open_data(DataConfig(dataset=str(tmp_path)))
    assert data.class_names == ("a", "b", "c")
    assert any("test split of" in note and "has no image of b;" in note for note in data.notes)
    assert data.fingerprint().counts["test"] == (6, 0, 6)
    assert caplog.text.count("has no image of b;") == 1
    assert data.resized(16).notes == data.notes
    assert caplog.text.count("has no image of b;") == 1, "what was said is not said again"


def test_rare_classes(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path / "few" / f"c{number:02d}", 3)
    counts = open_data(DataConfig(dataset=str(tmp_path / "few"))).fingerprint().counts
    assert {*counts["train"]} == {*counts["holdout"]} == {*counts["test"]} == {1}
    for number in range(5):
        write(tmp_path / "one" / f"c{number}", 10)
    write(tmp_path / "one" / "snow leopard", 1)
    with pytest.raises(UserError, match="the smallest class, 'snow leopard', has 1"):
        open_data(DataConfig(dataset=str(tmp_path / "one")))


def test_images_that_are_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, seed in (("train", 1), ("test", 2)):
        write(tmp_path / split / "a", seed=seed)
        write(tmp_path / split / "b", seed=10 * seed)
    assert open_data(DataConfig(dataset=str(tmp_path))).notes == ()
    image = (tmp_path / "train" / "a" / "0.png").read_bytes()
    (tmp_path / "test" / "a" / "again.png").write_bytes(image)
    (tmp_path / "train" / "b" / "again.png").write_bytes(image)
    twice = open_data(DataConfig(dataset=str(tmp_path))).notes
    assert [note.partition(",")[0] for note in twice] == [
        "1 images are in more than one of train",
        "1 images are in more than one class",
    ]
    (tmp_path / "test" / "a" / "again.png").unlink()
    (tmp_path / "train" / "b" / "again.png").unlink()
    write(tmp_path / "one" / "a")
    write(tmp_path / "one" / "b", seed=5)
    shutil.copy(tmp_path / "one" / "a" / "0.png", tmp_path / "one" / "a" / "copy.png")
    once = open_data(DataConfig(dataset=str(tmp_path / "one"))).notes[-1]
    assert once.startswith("1 images are there more than once, by their bytes (such as ")
    (tmp_path / "test" / "a" / "again.png").write_bytes(image)
    monkeypatch.setattr(
        folders, "COMPARED_BYTES", len(image)
    )  # what so large folders would cost is not spent
    assert open_data(DataConfig(dataset=str(tmp_path))).notes == ()


def test_a_split_that_holds_nothing_but_a_file_of_its_name(tmp_path: Path) -> None:
    write(tmp_path / "test" / "cats")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "train").touch()
    with pytest.raises(UserError, match=r"train has no images"):
        open_data(DataConfig(dataset=str(tmp_path)))


def test_links_are_not_followed_into_what_is_there_already(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            write(tmp_path / "set" / split / name)
    train, elsewhere = tmp_path / "set" / "train", tmp_path / "elsewhere"
    write(elsewhere, 4)
    (train / "a" / "again").symlink_to("../..")  # train and test once more, without end
    (train / "b" / "also").symlink_to("../a")
    (train / "c").symlink_to(elsewhere)
    data = open_data(DataConfig(dataset=str(tmp_path / "set")))
    assert data.class_names == ("a", "b")
    assert len(data.train) + len(data.holdout) == 12
    assert any("3 links to folders below" in n and "follow_links=true" in n for n in data.notes)
    followed = open_data(DataConfig(dataset=str(tmp_path / "set"), follow_links=True))
    assert followed.class_names == ("a", "b", "c")
    assert len(followed.train) + len(followed.holdout) == 16
    kept = train / ".kept"
    write(kept, 3)
    (train / "d").symlink_to(".kept")
    assert open_data(DataConfig(dataset=str(tmp_path / "set"))).class_names == ("a", "b", "d")


def test_what_is_no_image_does_not_hang(tmp_path: Path) -> None:
    for name in ("a", "b", "__MACOSX"):
        write(tmp_path / name)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    write(tmp_path, 2)
    data = open_data(DataConfig(dataset=str(tmp_path)))
    assert data.class_names == ("a", "b")
    assert any("1 pipes or devices below" in note for note in data.notes)
    assert any("2 images (0.png, 1.png) of" in note and "are left out" in note for note in data.notes)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / name)
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"/b cannot be read \(Permission denied\)"):
        open_data(DataConfig(dataset=str(tmp_path)))


def test_photographs_are_turned_as_they_were_held(tmp_path: Path) -> None:
    tall = np.zeros((12, 8, 3), dtype=np.uint8)
    tall[:6] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(6):
            exif = Image.Exif()
            exif[0x112] = 6  # the camera lay on its side
            Image.fromarray(np.rot90(tall)).save(tmp_path / name / f"{number}.png", exif=exif)
    data = open_data(DataConfig(dataset=str(tmp_path)))
    assert data.image_size == (12, 8)
    pixels_NCHW = data.train.pixels(torch.arange(len(data.train)))
    assert pixels_NCHW is not None
    assert (pixels_NCHW[:, :, :6] == 255).all()
    assert (pixels_NCHW[:, :, 6:] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    solid = np.full((8, 8, 4), (200, 0, 0, 255), dtype=np.uint8)
    solid[2:6] = 0  # black below, were it seen
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(6):
            image = Image.fromarray(solid)
            if mode == "P":
                image = image.convert("RGB").quantize(4)
                image.info["transparency"] = image.getpixel((3, 3))
            image.convert(mode).save(tmp_path / name / f"{number}.png")
    pixels_NCHW = open_data(DataConfig(dataset=str(tmp_path))).train.pixels(torch.arange(4))
    assert pixels_NCHW is not None
    assert (pixels_NCHW[:, :, 2:6] == 255).all()
    assert (pixels_NCHW[:, 0, :2] < 210).all()


def test_a_folder_packed_in_itself(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 2)):
        for name in ("a", "b"):
            write(tmp_path / "archive" / "archive" / split / name, count)
            write(tmp_path / "outer" / "images" / split / name, count)
    (tmp_path / "archive" / "__MACOSX").mkdir()
    for where in ("archive", "outer"):
        data = open_data(DataConfig(dataset=str(tmp_path / where), holdout=2))
        assert data.fingerprint().counts == {"train": (5, 5), "holdout": (1, 1), "test": (2, 2)}
    write(tmp_path / "zip" / "zip" / "cats")
    write(tmp_path / "zip" / "zip" / "dogs")
    assert open_data(DataConfig(dataset=str(tmp_path / "zip"))).class_names == ("cats", "dogs")


def test_a_named_validation_split_is_the_holdout_where_test_must_be_carved(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("val", 3)):
        for name in ("a", "b"):
            write(tmp_path / split / name, count)
    data = open_data(DataConfig(dataset=str(tmp_path), holdout="val"))
    assert data.fingerprint().counts == {"train": (8, 8), "holdout": (3, 3), "test": (2, 2)}
    assert any("has no test split: 4 of its 20 images" in note for note in data.notes)
    assert open_data(DataConfig(dataset=str(tmp_path))).fingerprint().counts["test"] == (3, 3)
