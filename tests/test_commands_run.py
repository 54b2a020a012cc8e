"""Every command that README.md and docs/ tell a reader to type is done, with images and networks of toy size.

The first command of a kind is done to its end. Further ones of `run`, `slim` and `pretrain` are done as far as
`dry=true` goes: data, fields, space and budget are as they stand there, steps are timed, nothing else is trained.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from pretrain_help import FIELDS as PRETRAIN
from slim_help import FIELDS as SLIM
from stage_help import FIELDS as RUN
from test_readme import typed

from vitnas.arch import Arch, Block, Stage
from vitnas.cli import main
from vitnas.exporting import save_timm
from vitnas.model import build

pytestmark = pytest.mark.slow

SIDE, CLASSES, EACH = 16, ("cat", "dog", "ship"), 30
OF_DIGITS = {"data.max_images", "data.dataset", "budget"}  # of the toy fields, what the texts say themselves
SMALL = {"device": "cpu", "threads": "1"}
QUICK = {
    "bench mixers": {"tokens": "16", "seconds": "0.01", "dim": "16", "heads": "2"},
    "bench tokens": {
        "tokens": "16",
        "seconds": "0.01",
        "dim": "16",
        "heads": "2",
        "depth": "3",
        "runtimes": "torch",
    },
    "tokens": {"epochs": "1"},
}
# What a network can be that the toy pretraining made.
ITS_SPACE = {name: text for name, text in PRETRAIN.items() if name.startswith("space.")}
ITS_SPACE |= {"space.patch_size": "4", "data.image_size": "16", "budget": "macs<=10M"}
# Where a text names a network of timm's, or no particular one.
STAND_IN = {
    "deit_small_patch16_224": "net",
    "MODEL": "net",
    "path/to/folder": "net",
    "budget=macs<=50%": "budget=macs<=80%",  # half of a toy is less than its smallest
    "IMAGES": "path/to/images",
    "dataset=IMAGES": "dataset=path/to/images",
    "data.dataset=PATH": "data.dataset=path/to/images",
    "model=swin_tiny_patch4_window7_224": "model=test_vit",
    "RECIPE": "tour",
}


def picture(target: int, number: int) -> Image.Image:
    rng = np.random.default_rng(100 * target + number)
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = np.sin((target + 1) * x / 3 + rng.uniform(0, 6)) * np.cos(target * y / 2)
    pixels = 127 + 90 * wave[..., None] + rng.normal(0, 12, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def table(path: Path, header: tuple[str, ...], mark: str) -> None:
    """A table of labels of the images beside it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=mark)
        writer.writerow(header)
        for image in sorted(path.parent.rglob("*.png")):
            split = "test" if image.stem.endswith("0") else "train"
            writer.writerow((image.relative_to(path.parent), image.parent.name, split)[: len(header)])


def numbers(path: Path) -> None:
    """A table of numbers of the images beside it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "age", "length_mm", "weight_g"))
        for place, image in enumerate(sorted(path.parent.rglob("*.png"))):
            writer.writerow((image.relative_to(path.parent), place, 2.5 * place, 90 - place))


def with_fields(words: list[str], fields: dict[str, str]) -> list[str]:
    given = {word.partition("=")[0] for word in words}
    ends = {name.rpartition(".")[2] for name in given}
    return words + [
        f"{name}={value}" for name, value in fields.items() if name not in given and name not in ends
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: images, a trained network, and the runs that the texts speak of."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        images = Path("path/to/images")
        for target, name in enumerate(CLASSES):
            (images / name).mkdir(parents=True)
            for number in range(EACH):
                picture(target, number).save(images / name / f"{number}.png")
        table(images / "labels.csv", ("file", "label"), ",")
        table(images / "labels.tsv", ("picture", "species", "fold"), "\t")
        numbers(images / "numbers.csv")
        shutil.copytree(images, "path/to/labelled")
        shutil.copytree(images / "cat", "images")
        block = Block(num_heads=3, head_dim=8, mlp_hidden=48)
        arch = Arch(
            image_size=SIDE,
            patch_size=4,
            num_classes=len(CLASSES),
            stages=(Stage(embed_dim=24, blocks=(block,) * 4),),
        )
        about = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
        model = build(arch, generator=torch.Generator().manual_seed(0))
        save_timm(model, Path("net"), class_names=CLASSES, data_config=about)
        for folder, field in (
            ("runs/mine", [*run_fields("run images", whole=True)]),
            ("runs/small", ["budget=macs<=80%"]),
            ("runs/pre", ["space.patch_size=4", "data.image_size=16"]),
        ):
            words = next(words for words in typed() if f"folder={folder}" in words)
            assert main([*done_here(words, whole=True), *field]) == 0
        Path("other").mkdir()
        shutil.copy("runs/mine/chosen.json", "other")
    return root


def run_fields(command: str, *, whole: bool) -> list[str]:
    return ["data.image_size=16"] if whole and command == "run images" else []


def done_here(words: list[str], *, whole: bool) -> list[str]:
    """A command with toy images and networks."""
    words = [STAND_IN.get(word, word) for word in words]
    command = " ".join(words[:2]) if words[0] in ("run", "bench") else words[0]
    if words[0] == "slim":
        words = [word for word in words if not (word.startswith("budget=latency") and whole)]
    fields: dict[str, str] = QUICK.get(command, {})
    if whole:
        toy = {"run": RUN, "slim": SLIM, "pretrain": PRETRAIN}.get(words[0], {})
        fields = {**fields, **{name: value for name, value in toy.items() if name not in OF_DIGITS}}
    elif words[0] in ("run", "slim", "pretrain"):
        fields = {**SMALL, **(ITS_SPACE if "pretrained=runs/pre" in words else {})}
    return with_fields(words, fields)


@pytest.mark.parametrize("words", typed(), ids=" ".join)
def test_every_command_is_done(
    words: list[str], world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if (len(words) == 1 and words[0] not in ("list", "doctor")) or "FOLDER" in words:
        return  # named, not typed
    if words[0] == "show-tokens":
        pytest.skip(
            "NOT RUN: no command before it makes a network that drops patches; test_report_tokens.py does it"
        )
    if any("executorch" in word or word.endswith(".pte") for word in words):
        pytest.importorskip("executorch", reason="NOT RUN: needs pip install 'vitnas[executorch]'")
    monkeypatch.chdir(world)
    if words[0] == "push":
        takes = SimpleNamespace(create_repo=lambda *_, **__: None, upload_folder=lambda **_: None)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: takes)
    if words[0] == "dashboard":
        monkeypatch.setattr("optuna_dashboard.run_server", lambda *_, **__: None)
    if words[:2] == ["run", "tour"]:
        words = done_here(words, whole=True)
    elif words[0] in ("run", "slim", "pretrain") and "--help" not in words:
        words = done_here([w for w in words if not w.startswith("folder=")], whole=False)
        words += [word for word in ("folder=runs/dry", "dry=true") if word not in words]
    else:
        words = done_here(words, whole=False)
    assert main(words) == 0, capsys.readouterr().err
