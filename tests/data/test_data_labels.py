"""Labels of every kind: tables, several classes per image, maps of classes, and classes of very unequal size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from timm.data import Mixup
from torch import nn

import vitnas
from vitnas.data import Data, DataConfig, TrainBatches, open_data
from vitnas.data.images import with_channels
from vitnas.data.plan import plan
from vitnas.data.splits import carve
from vitnas.errors import UserError
from vitnas.train import Batch, Classification, Engine, Task
from vitnas.train.evaluate import cannot_tell, wilson
from vitnas.train.feed import Feed, endless


def pictures(folder: Path, count: int) -> list[str]:
    """Names of so many different images, written into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(str(folder).encode()))
    names = [f"{number:02d}.png" for number in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name)
    return names


def labelled(data: Data) -> dict[str, str]:
    """The class of every image of train and holdout."""
    return {
        images.name(i): data.class_names[int(images.targets[i])]
        for images in (data.train, data.holdout)
        for i in range(len(images))
    }


@pytest.mark.parametrize(
    ("header", "mark", "cell"),
    [("filename,label", ",", "{}.png"), ("id;breed", ";", "{}"), ("label\timage", "\t", "images/{}.png"),
     (None, ",", "./images/{}.png"), ("what,width,species", ",", "{}.png")],
)  # fmt: skip
def test_a_table_says_the_classes(tmp_path: Path, header: str | None, mark: str, cell: str) -> None:
    names = pictures(tmp_path / "images", 20)
    right = {f"images/{name}": "cat" if i % 2 else "polar bear" for i, name in enumerate(names)}
    lines = [] if header is None else [header]
    for path, kind in right.items():
        cells = [cell.format(Path(path).stem), kind]
        cells = cells[::-1] if header and header.startswith("label") else cells
        lines.append(mark.join([cells[0], "8", cells[1]] if header and "width" in header else cells))
    (tmp_path / "labels.csv").write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    more = {"target_key": "species"} if header and "width" in header else {}
    data = open_data(DataConfig(dataset=str(tmp_path), labels="labels.csv", **more))
    assert data.class_names == ("cat", "polar bear")
    assert {name: right[name] for name in labelled(data)} == labelled(data)
    assert (len(labelled(data)), data.num_test) == (16, 4)


def test_a_table_says_the_splits_or_folders_do(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("val", 4), ("test", 6)):
        pictures(tmp_path / split, count)
    rows = [
        f"{split}/{n:02d}.png,{'ab'[n % 2]}"
        for split, count in (("train", 10), ("val", 4), ("test", 6))
        for n in range(count)
    ]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["path,class", *rows]))
    wanted = {"train": (5, 5), "holdout": (2, 2), "test": (3, 3)}
    config = DataConfig(dataset=str(tmp_path), labels="labels.csv")
    assert open_data(config).fingerprint().counts == wanted
    turned = {"train": "Train", "val": "test", "test": "Validation"}  # the column comes before the folders
    table.write_text(
        "\n".join(["path,class,Subset", *(f"{row},{turned[row.partition('/')[0]]}" for row in rows)])
    )
    assert open_data(config).fingerprint().counts == {"train": (5, 5), "holdout": (3, 3), "test": (2, 2)}
    table.write_text(
        "\n".join(["path,class", *(row for row in rows if row.startswith("train")), "train/99.png,a"])
    )
    data = open_data(config)
    assert data.fingerprint().counts == {"train": (3, 3), "holdout": (1, 1), "test": (1, 1)}
    assert any("1 images that" in note and "(such as 'train/99.png')" in note for note in data.notes)
    assert any("10 images that" in note and "does not name" in note for note in data.notes)


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("file,label\n00.png,a\n00.png,b", {}, r"'00.png' in .* has the classes a, b; .*label_kind=classes"),
        ("file,label\n00.png,a\n01.png,", {}, "Row 2 of .* has no 'label'"),
        ("file,label\n77.png,a\n78.png,b", {}, "None of the 2 images that .* is below the folder"),
        ("what,label\n77.png,a\n78.png,b", {}, "No column of .* names images below the folder"),
        ("file,p,q\n00.png,x,y\n01.png,x,z", {}, "Which column of .* has the classes .*target_key"),
        ("file,label\n00.png,a,b\n01.png,a", {}, "Line 2 of .* has 3 cells"),
        ("file,label", {}, "has one row; below the names"),
        ("file,label\n00.png,a", {"target_key": "lable"}, "target_key is 'lable'.*Nearest: 'label'"),
        ("file,label\n00.png,a", {"labels": "no.csv"}, "labels is 'no.csv'; it must be true, false, or a CSV"),
        ("file,label\n00.png,a", {"dataset": "digits"}, "a table of labels is for a folder"),
        ("file,label\n00,a", {}, r"may be 00.png or more.00.png; it must mean one image"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, fields: dict[str, str], message: str) -> None:
    pictures(tmp_path, 4)
    pictures(tmp_path / "more", 1)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        open_data(DataConfig(**{"dataset": str(tmp_path), "labels": "labels.csv", **fields}))


@pytest.mark.parametrize("form", ["cells", "columns", "rows"])
def test_images_of_several_classes(tmp_path: Path, form: str) -> None:
    names = pictures(tmp_path, 30)
    has = [[n % 2 == 0, n % 3 == 0, n % 5 == 0] for n in range(30)]
    if form == "columns":
        lines = [
            "image,sky,sea,sun",
            *(",".join([n, *map(str, map(int, h))]) for n, h in zip(names, has, strict=True)),
        ]
    else:
        words = [[w for w, is_there in zip(("sky", "sea", "sun"), h, strict=True) if is_there] for h in has]
        if form == "cells":
            lines = ["image,tags", *(f"{n},{'|'.join(w)}" for n, w in zip(names, words, strict=True))]
        else:  # images without a row of their own are none of the set
            lines = ["image,tags", *(f"{n},{each}" for n, w in zip(names, words, strict=True) for each in w)]
            names, has = [n for n, h in zip(names, has, strict=True) if any(h)], [h for h in has if any(h)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    data = open_data(DataConfig(dataset=str(tmp_path), labels="labels.csv", label_kind="classes"))
    order = [("sky", "sea", "sun").index(name) for name in data.class_names]
    right = {name: [h[place] for place in order] for name, h in zip(names, has, strict=True)}
    for images in (data.train, data.holdout):
        assert images.targets.dtype == torch.bool
        assert {
            images.name(i): images.targets[i].tolist() for i in range(len(images))
        }.items() <= right.items()
    assert sum(sum(counts) for counts in data.fingerprint().counts.values()) == sum(map(sum, has))
    assert any("mean average precision" in note for note in data.notes)


class Says(nn.Module):
    """Gives logits that it was made with, in order."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits, self.at = nn.Parameter(logits), 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.at += len(images)
        return self.logits[self.at - len(images) : self.at]


def test_scores_of_several_classes_and_of_unequal_ones(generator: torch.Generator) -> None:
    logits = torch.randn(40, 3, generator=generator)
    has = torch.rand(40, 3, generator=generator) < 0.3
    images = torch.zeros(40, 1)
    score = vitnas.evaluate(Says(logits), list(zip(images.split(16), has.split(16), strict=True)))
    torch.testing.assert_close(score.accuracy, average_precision_score(has.numpy(), logits.numpy()))
    loss = nn.functional.binary_cross_entropy_with_logits(logits, has.float())
    torch.testing.assert_close(score.loss, float(loss))
    assert (score.n, score.balanced) == (40, score.accuracy)
    targets = (torch.rand(40, generator=generator) < 0.1).long()  # the third class never occurs
    score = vitnas.evaluate(Says(logits), list(zip(images.split(16), targets.split(16), strict=True)))
    said = logits.argmax(1)
    recalls = [(said[targets == c] == c).float().mean() for c in (0, 1)]
    torch.testing.assert_close(score.balanced, float(sum(recalls) / 2))
    two = logits[:, :2].argmax(1)
    score = vitnas.evaluate(Says(logits[:, :2]), [(images, targets)])
    torch.testing.assert_close(score.balanced, float(balanced_accuracy_score(targets, two)))


def test_training_on_several_classes(generator: torch.Generator) -> None:
    """The loss is binary, mixing mixes what each image has, and a network learns it."""
    has = torch.rand(64, 3, generator=generator) < 0.4
    pixels = (has.float() @ torch.eye(3)).mul(200).byte()[:, None, None].repeat(1, 8, 8, 1)
    data = Data.from_arrays(train=(pixels, has), config=DataConfig(batch_size=16, augment="none"))
    assert data.config.label_kind == "classes"
    batch = Batch((torch.zeros(2, 3, 8, 8),), torch.tensor([[1.0, 0, 0], [0, 1, 1]]), kind="classes")
    logits = torch.randn(2, 3, generator=generator)
    found = Classification(label_smoothing=0.1)({"logits": logits}, batch, {})["loss"]
    torch.testing.assert_close(found, nn.functional.binary_cross_entropy_with_logits(logits, batch.targets))
    feed = Feed(
        batches=endless([(torch.rand(6, 3, 8, 8, generator=generator), has[:6])]),
        task=Task(), mixup=Mixup(mixup_alpha=1.0, num_classes=3, label_smoothing=0.1), seed=0, engine=Engine(cpu=True),
    )  # fmt: skip
    mixed = next(feed.from_step(0))
    share = (mixed.targets[0] - has[0].float()) / (has[5].float() - has[0].float())
    assert mixed.kind == "classes"
    assert has[0].ne(has[5]).any(), "the two differ, or nothing would be seen"
    share = share[has[0] != has[5]]
    torch.testing.assert_close(share, share[:1].expand_as(share))
    assert 0 < float(share[0]) < 1
    space = vitnas.spaces.autoformer("micro", image_size=8, patch_size=4, in_chans=3, num_classes=3)
    model = vitnas.build(space.smallest(), generator=generator)
    holdout = vitnas.EvalBatches(data.holdout, batch_size=16)
    before = vitnas.evaluate(model, holdout).loss
    loader = TrainBatches(data.train, data.augment, batch_size=16, seed=0)
    vitnas.fit(
        model, Classification(), vitnas.Fixed(), loader, config=vitnas.TrainConfig(epochs=8, warmup_epochs=0)
    )
    assert vitnas.evaluate(model, holdout).loss < before


def test_rare_combinations_do_not_hinder_a_split() -> None:
    targets = [(0,), (0, 1), (0, 1, 2), (), (1,), (0,), (0,), (1,), (), (2,)]
    rest, carved = carve(targets, [str(i) for i in range(10)], 4, "salt")
    assert (len(rest), len(carved)) == (6, 4)


def test_balanced_batches(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 1), dtype=np.uint8)
    targets = [int(number % 20 == 0) for number in range(400)]
    data = Data.from_arrays(train=(pixels, targets), class_names=("usual", "rare"))
    note = next(note for note in data.notes if "unequal" in note)
    assert "'usual' has 304 of 320 train" in note
    assert "balanced accuracy" in note
    assert "data.balance=1" in note

    def rare(balance: float, epoch: int) -> float:
        batches = TrainBatches(data.train, data.augment, batch_size=32, seed=0, balance=balance)
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        return float(torch.cat([batches.load(step)[1] for step in steps]).float().mean())

    shares = [sum(rare(balance, epoch) for epoch in range(8)) / 8 for balance in (0.0, 0.5, 1.0)]
    assert shares[0] < 0.06
    assert 0.12 < shares[1] < 0.26  # sqrt(19) to 1
    assert 0.44 < shares[2] < 0.56
    assert rare(1.0, 3) == rare(1.0, 3)
    with pytest.raises(UserError, match="balance is 1 and labels is false; it goes by classes"):
        DataConfig(balance=1.0, labels=False)
    with pytest.raises(UserError, match="balance is 2"):
        DataConfig(balance=2.0)


def test_images_of_several_classes_are_drawn_by_their_rarest() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 1), dtype=np.uint8)
    has = np.zeros((400, 3), dtype=int)
    has[:, 0] = 1
    has[::20, 1] = 1  # 20 of 400, beside the usual class
    has[1::4] = 0  # and a quarter has none
    data = Data.from_arrays(train=(pixels, has))

    def rare(balance: float) -> float:
        batches = TrainBatches(data.train, data.augment, batch_size=32, seed=0, balance=balance)
        steps = range(8 * batches.steps_per_epoch)
        return float(torch.cat([batches.load(step)[1] for step in steps])[:, 1].float().mean())

    assert rare(0.0) < 0.08
    assert 0.28 < rare(1.0) < 0.38  # a third each: the rare class, the usual one, none


def test_images_give_their_own_batches() -> None:
    data = open_data(DataConfig(dataset="digits", max_images=60))
    given = [*data.holdout.batches(4)]
    assert torch.equal(torch.cat([targets for _, targets in given]), data.holdout.targets)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert vitnas.evaluate(network, data.holdout.batches()).n == len(data.holdout)


def test_a_map_of_classes(tmp_path: Path) -> None:
    for name in ("n01", "n02", "n03", "n04"):
        for split in ("train", "test"):
            pictures(tmp_path / "set" / split / name, 6)
    named, where = tmp_path / "names.csv", str(tmp_path / "set")
    named.write_text("n03,dog\nn01,cat\nn02,dog\nn04,\n\n")
    data = open_data(DataConfig(dataset=where, class_map=str(named), holdout=4))
    assert data.class_names == ("dog", "cat")
    assert data.fingerprint().counts["test"] == (12, 6)
    assert {(Path(name).parts[0], kind) for name, kind in labelled(data).items()} == {
        ("n01", "cat"), ("n02", "dog"), ("n03", "dog"),
    }  # fmt: skip
    for text, message in (
        ("n01,a\nn02,b\nn03,c", "does not say what becomes of the class 'n04'"),
        ("n01,a,b", "Line 1 of .* is 'n01,a,b'"),
        ("n01,a\nn02,a", "gives 1 classes"),
    ):
        named.write_text(text)
        with pytest.raises(UserError, match=message):
            open_data(DataConfig(dataset=where, class_map=str(named)))
    named.write_text("n03,dog\nn01,cat")
    pictures(tmp_path / "flat", 6)
    with pytest.raises(UserError, match="these images have no labels to map"):
        open_data(DataConfig(dataset=str(tmp_path / "flat"), class_map=str(named)))


def test_classes_by_folders_are_single(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pictures(tmp_path / name, 6)
    with pytest.raises(UserError, match=r"label_kind is 'classes' and each image of .* has one class"):
        open_data(DataConfig(dataset=str(tmp_path), label_kind="classes"))


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F", "unit"])
def test_every_kind_of_pixels_is_the_same_picture(mode: str) -> None:
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    of_16_bits = grey.astype(np.uint16) * 257
    own = {
        "I;16": lambda: Image.fromarray(of_16_bits),
        "I": lambda: Image.fromarray(of_16_bits.astype(np.int32)),
        "F": lambda: Image.fromarray(grey.astype(np.float32)),
        "unit": lambda: Image.fromarray(grey.astype(np.float32) / 255),
    }
    image = own[mode]() if mode in own else Image.fromarray(grey).convert(mode)
    for chans in (1, 3):
        pixels = np.asarray(with_channels(image, chans)).reshape(64, 64, -1)
        assert pixels.shape[2] == chans
        assert np.abs(pixels.astype(int) - grey[:, :, None]).max() <= 2


def test_what_was_read_is_told_in_lines(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 3), ("test", 2)):
        for name in ("cats", "dogs"):
            pictures(tmp_path / "set" / split / name, count + 2 * (name == "dogs" and split == "train"))
    (tmp_path / "set" / "train" / "cats" / "00.png").write_bytes(b"none")
    where = str(tmp_path / "set")
    assert plan(open_data(DataConfig(dataset=where))) == (
        f"images   {where}: 27, in colour, taken at 8 x 8 pixels",
        "splits   train 17, holdout 6 (the validation split), test 4 (a split)",
        "classes  2; the smallest, 'cats', has 7 train images, the largest, 'dogs', 10",
        "skipped  1 that cannot be read, such as cats/00.png",
    )
    even = Data.from_arrays(
        train=(np.zeros((40, 8, 8), np.uint8), [0, 1] * 20), config=DataConfig(dataset="", holdout=0.5)
    )
    assert plan(even)[2] == "classes  2, of 8 train images each"
    lines = plan(Data.from_arrays(train=(np.zeros((40, 8, 8), np.uint8), None)))
    assert lines == (
        "images   arrays: 40, in grey, taken at 8 x 8 pixels",
        "splits   train 29, holdout 3 (carved out of train), test 8 (carved out too)",
    )


def test_a_small_holdout_says_what_it_cannot_tell() -> None:
    said = cannot_tell(40)
    low, high = wilson(36, 40)
    assert f"on 40 images is known to {50 * (high - low):.1f} points either way" in said
    enough = int(said.split("; ")[1].split()[0])
    low, high = wilson(round(0.9 * enough), enough)
    assert high - low <= 0.04
    assert cannot_tell(enough) == ""
