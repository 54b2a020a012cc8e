"""`hfds/` on local parquet folders, without a network; `wds/` where webdataset is installed."""

from __future__ import annotations

import io
import json
import socket
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitnas.data import Data, DataConfig, open_data
from vitnas.errors import UserError

datasets = pytest.importorskip("datasets", reason="the data extra is not installed")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a local dataset must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def jpeg(level: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((10, 10, 3), level, np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def write_parquet(folder: Path, split: str, labels: list[Any], kind: Any, image: str, label: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({image: datasets.Image(), label: kind})
    rows = {image: [{"bytes": jpeg(i), "path": None} for i in range(len(labels))], label: labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))


def test_columns_and_classes_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    kind = datasets.ClassLabel(names=["cat", "dog"])
    write_parquet(folder, "train", [0, 1] * 10, kind, "img", "fine_label")
    write_parquet(folder, "test", [0, 1] * 3, kind, "img", "fine_label")
    shown = datasets.utils.are_progress_bars_disabled()
    data = open_data(DataConfig(dataset=f"hfds/{folder}", root=str(tmp_path / "cache"), holdout=4))
    assert datasets.utils.are_progress_bars_disabled() == shown
    assert data.class_names == ("cat", "dog")
    assert (len(data.train), len(data.holdout), data.image_size) == (16, 4, 10)
    assert len(data.open_test(tmp_path / "log.json")) == 6
    levels = torch.stack([torch.from_numpy(data.train.read(i)).float().mean() for i in range(16)])
    parity = levels.round().long() % 2  # image i is grey level i and has the label i % 2
    torch.testing.assert_close(parity, data.train.targets)


def test_plain_labels_and_no_test_split(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_parquet(folder, "train", ["no", "yes"] * 10, datasets.Value("string"), "image", "label")
    data = open_data(DataConfig(dataset=f"hfds/{folder}", root=str(tmp_path / "cache"), holdout=4))
    assert data.class_names == ("no", "yes")
    assert data.fingerprint().counts == {"train": (6, 6), "holdout": (2, 2), "test": (2, 2)}
    assert "has no test split" in data.notes[0]


def test_bad_columns_and_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_parquet(folder, "train", [0, 1] * 10, datasets.Value("int64"), "image", "label")
    write_parquet(folder, "test", [-1] * 4, datasets.Value("int64"), "image", "label")

    def refused(message: str, **fields: Any) -> None:
        with pytest.raises(UserError, match=message):
            open_data(DataConfig(dataset=f"hfds/{folder}", root=str(tmp_path / "cache"), **fields))

    refused(r"input_key is 'picture'; .* has the columns image, label", input_key="picture")
    refused(r"target_key is 'labels'; .* Nearest: 'label'", target_key="labels")
    refused(r"train_split is 'trian'; .* has train, test.* Nearest: 'train'", train_split="trian")
    refused(r"test_split is 'tset'; .* Nearest: 'test'", test_split="tset")
    refused(r"Split 'test' of .* has images without a label")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"bare cannot be opened \(.*it must be a folder of data files"):
        open_data(DataConfig(dataset=f"hfds/{tmp_path / 'bare'}"))


def test_corrupt_rows_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    images = [{"bytes": jpeg(i) if i != 7 else jpeg(i)[:100], "path": None} for i in range(20)]
    images[9] = None  # type: ignore[call-overload]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 10}, features=features)
    rows.to_parquet(str(folder / "train.parquet"))
    rows.to_parquet(str(folder / "test.parquet"))
    data = open_data(DataConfig(dataset=f"hfds/{folder}", root=str(tmp_path / "cache"), holdout=4))
    assert data.corrupt == [f"hfds/{folder}/train/{row}" for row in (7, 9)]
    assert len(data.train) == 14


def test_a_class_per_image(tmp_path: Path) -> None:
    kind = datasets.Sequence(datasets.Value("int64"))
    write_parquet(tmp_path / "set", "train", [[0, 1]] * 10, kind, "image", "label")
    config = DataConfig(dataset=f"hfds/{tmp_path / 'set'}", root=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"The column 'label' of .* holds lists; one class per image"):
        open_data(config)


def test_a_set_of_several_configurations(tmp_path: Path) -> None:
    folder, kind = tmp_path / "set", datasets.Value("int64")
    for name, count in (("small", 10), ("large", 20)):
        for split in ("train", "validation", "test"):
            write_parquet(folder / name, split, [0, 1] * count, kind, "image", "label")
    parts = [f"- config_name: {name}\n  data_dir: {name}\n" for name in ("small", "large")]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(parts)}---\n")

    def opened(**fields: Any) -> Data:
        return open_data(
            DataConfig(dataset=f"hfds/{folder}", root=str(tmp_path / "cache"), augment="none", **fields)
        )

    data = opened(config_name="large")
    assert data.fingerprint().counts == dict.fromkeys(("train", "holdout", "test"), (20, 20))
    assert opened(config_name="small", holdout=4).fingerprint().counts["holdout"] == (2, 2)
    with pytest.raises(UserError, match=r"has the configurations small, large; .* Add config_name=small\."):
        opened()
    with pytest.raises(UserError, match=r"config_name is 'lrage'; .* Nearest: 'large'"):
        opened(config_name="lrage")


def test_shared_cifar10(shared: Path) -> None:
    folder = shared / "data" / "cifar10-jpeg"
    assert folder.is_dir(), f"{shared} is there but has no data/cifar10-jpeg"
    data = open_data(DataConfig(dataset=f"hfds/{folder.resolve()}", max_images=500, holdout=50))
    assert (data.num_classes, data.image_size, data.in_chans) == (10, 32, 3)
    assert data.fingerprint().counts == {"train": (45,) * 10, "holdout": (5,) * 10, "test": (50,) * 10}
    assert data.class_names[:3] == ("airplane", "automobile", "bird")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves tars open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_web_dataset(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the data extra is not installed")
    shards: dict[str, dict[str, Any]] = {}
    for split, count in (("train", 20), ("validation", 6)):
        name = f"set-{split}-0.tar"
        with tarfile.open(tmp_path / name, "w") as tar:
            for i in range(count):
                content = b"junk" if (split, i) == ("train", 4) else jpeg(i)
                for kind, data_bytes in (("jpg", content), ("cls", str(i % 2).encode())):
                    info = tarfile.TarInfo(f"{i:04d}.{kind}")
                    info.size = len(data_bytes)
                    tar.addfile(info, io.BytesIO(data_bytes))
        shards[split] = {
            "name": split, "num_samples": count, "filenames": [name], "shard_lengths": [count]
        }  # fmt: skip
    (tmp_path / "info.json").write_text(json.dumps({"splits": shards}))
    data = open_data(DataConfig(dataset="wds/", root=str(tmp_path), holdout=4))
    assert (len(data.train), len(data.holdout), data.image_size) == (15, 4, 10)
    assert len(data.open_test(tmp_path / "log.json")) == 6
    assert len(data.corrupt) == 1
    with pytest.raises(UserError, match=r"train_split is 'trian', and .*Name a split of info\.json"):
        open_data(DataConfig(dataset="wds/", root=str(tmp_path), train_split="trian"))
