"""Numbers in place of classes: how tables and arrays give them, how they are standardised, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitnas.data import Data, DataConfig, TrainBatches, open_data
from vitnas.data.folds import fold
from vitnas.data.plan import plan
from vitnas.errors import UserError

COUNT = 30
AGES = [3.5 + 2 * n for n in range(COUNT)]
SIZES = [1000.0 - n * n for n in range(COUNT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose mean brightness goes by their number, and a table of what was measured."""
    root = tmp_path_factory.mktemp("numbers")
    for number in range(COUNT):
        Image.new("RGB", (8, 8), (8 * number,) * 3).save(root / f"{number:02d}.png")
    rows = (f"{n:02d},{age},{size},x" for n, (age, size) in enumerate(zip(AGES, SIZES, strict=True)))
    (root / "labels.csv").write_text("\n".join(("id,age,size,note", *rows)))
    return root


def opened(folder: Path, **more: object) -> Data:
    fields: dict[str, object] = {
        "labels": "labels.csv",
        "label_kind": "numbers",
        "target_key": ("size", "age"),
    }
    return open_data(DataConfig(**{"dataset": str(folder), **fields, **more}))  # type: ignore[arg-type]


def test_numbers_of_columns_are_standardised_by_train(folder: Path, tmp_path: Path) -> None:
    data = opened(folder)
    assert (data.class_names, data.num_classes, data.config.label_kind) == (("size", "age"), 2, "numbers")
    scale = data.train.scale
    assert scale is not None
    torch.testing.assert_close(data.train.targets.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.train.targets.std(0, correction=0), torch.ones(2))
    others = (data.holdout, data.open_test(tmp_path / "reads.json"), fold(data, 1).holdout)
    for images in (data.train, *others):
        assert images.scale == scale
        told_NT = scale.restored(images.targets)
        for place, row in enumerate(told_NT.tolist()):
            number = int(Path(images.name(place)).stem)
            assert row == pytest.approx([SIZES[number], AGES[number]], rel=1e-5)
    assert sum(map(len, (data.train, *others[:2]))) == COUNT
    told = plan(data)
    assert any(line.startswith("numbers  size from ") and "; age from " in line for line in told)
    assert data.fingerprint().label_kind == "numbers"
    assert data.fingerprint().counts == {"train": (22,), "holdout": (2,), "test": (6,)}
    (batch, targets_BT) = next(TrainBatches(data.train, data.augment, batch_size=8, seed=0).from_step(0))
    assert (len(batch), targets_BT.shape, targets_BT.dtype) == (8, (8, 2), torch.float32)


def test_images_with_numbers_are_not_varied_unless_they_are_told_to(folder: Path) -> None:
    data = opened(folder)
    assert data.augment == type(data.augment)()
    assert any("are not varied in training" in note for note in data.notes)
    varied = opened(folder, augment="weak")
    assert varied.augment.hflip > 0
    assert not any("not varied" in note for note in varied.notes)


def test_splits_of_the_folder_are_kept(folder: Path, tmp_path: Path) -> None:
    for number in range(COUNT):
        split = tmp_path / ("train" if number < 20 else "val" if number < 25 else "test")
        split.mkdir(exist_ok=True)
        shutil.copy(folder / f"{number:02d}.png", split)
    shutil.copy(folder / "labels.csv", tmp_path)
    data = opened(tmp_path, target_key="age")
    assert (len(data.train), len(data.holdout), data.num_test) == (20, 5, 5)
    scale = data.holdout.scale
    assert scale is not None
    assert scale.mean == pytest.approx((np.mean(AGES[:20]),))
    assert scale.restored(data.holdout.targets)[:, 0].tolist() == pytest.approx(AGES[20:25])


GOOD = "file,age\n" + "\n".join(f"{n:02d}.png,{age}" for n, age in enumerate(AGES))


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        (GOOD.replace("13.5", "old"), {}, r"Row 6 of .* has 'old' in 'age'; every image needs a finite number"),
        (GOOD.replace("13.5", "nan"), {}, r"Row 6 of .* has 'nan' in 'age'; .* Fill it in"),
        (GOOD.replace("13.5", ""), {}, r"Row 6 of .* has '' in 'age'"),
        (GOOD.replace("13.5", "inf"), {}, r"Row 6 of .* has 'inf'"),
        ("file,age\n" + "\n".join(f"{n:02d}.png,4" for n in range(COUNT)), {},
         r"'age' is 4 for every train image .*; a number to be told must vary\. Name another column"),
        (GOOD + "\n03.png,5", {}, r"'03.png' is in two rows .*; of numbers an image has one row"),
        (GOOD, {"target_key": "agee"}, "target_key is 'agee'.*Nearest: 'age'"),
        (GOOD, {"target_key": ("age", "size")}, "target_key is 'size'"),
        ("file,a,b\n00.png,1,2\n01.png,2,3", {}, "Which columns of .* have the numbers .*target_key='.x,y.'"),
        ("file,age\nno.png,1\nnone.png,2", {}, "None of the 2 images"),
        (GOOD, {"label_kind": "class"}, r"'age' of .* has 30 numbers with fractions in 30 rows; .*label_kind=numbers"),
        (GOOD, {"label_kind": "number"}, "label_kind is 'number'.*Nearest: 'numbers'"),
        (GOOD, {"labels": True}, "label_kind is 'numbers' and the images of .* have no labels; a table says numbers"),
        (GOOD, {"balance": 0.5}, "balance is 0.5 and label_kind is 'numbers'; it goes by classes"),
        (GOOD, {"class_map": "map.csv"}, "class_map is 'map.csv' and label_kind is 'numbers'"),
        (GOOD, {"dataset": "digits", "labels": True}, "numbers are read from a table beside a folder"),
        (GOOD, {"label_kind": "class", "target_key": ("age",)}, "target_key is .'age'.; one column has the classes"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_used(
    folder: Path, tmp_path: Path, text: str, fields: dict[str, object], message: str
) -> None:
    (tmp_path / "labels.csv").write_text(text)
    given = {"dataset": str(folder), "labels": str(tmp_path / "labels.csv"), "target_key": None, **fields}
    with pytest.raises(UserError, match=message):
        opened(folder, **given)


def test_a_folder_of_classes_has_no_numbers(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    with pytest.raises(
        UserError, match=r"each image of .* has one class, by its folder; a table says numbers"
    ):
        opened(tmp_path, labels=True)


def test_arrays_have_numbers_where_that_is_said() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    config = DataConfig(label_kind="numbers")
    data = Data.from_arrays(train=(pixels, np.array(AGES)), config=config)
    assert data.train.targets.shape[1] == 1
    named = Data.from_arrays(
        train=(pixels, torch.tensor([AGES, SIZES]).T), class_names=("age", "size"), config=config
    )
    assert named.class_names == ("age", "size")
    with pytest.raises(UserError, match=r"targets have fractions; .*label_kind='numbers'"):
        Data.from_arrays(train=(pixels, np.array(AGES)))
    for bad in ([*AGES[1:], np.nan], AGES[1:], [[1.0], *[[1.0, 2.0]] * (COUNT - 1)]):
        with pytest.raises(UserError, match="each image needs the same finite numbers"):
            Data.from_arrays(train=(pixels, bad), config=config)
