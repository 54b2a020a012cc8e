"""Data, labels, words and YAML as they should not be: one sentence each, with what is wrong and the remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stage_help import refused


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good images and much that is not good."""
    root = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)

    def pictures(folder: str, number: int = 6) -> None:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for n in range(number):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{n}.png")

    for folder in ("good/a", "good/b", "zero/a", "zero/b"):
        pictures(folder)
    pictures("flat", 12)
    for file in (root / "zero" / "b").iterdir():
        file.write_bytes(b"")
    (root / "bare").mkdir()
    for name in ("none.json", "bare/config.json"):
        (root / name).write_text("{}")
    for name in ("labels.xlsx", "net.onnx"):
        (root / name).write_bytes(b"PK")
    (root / "images.zip").write_bytes(b"PK\x03\x04")
    names = [f"{n}.png" for n in range(12)]
    for table, text in {
        "empty": "",
        "header": "file,label\n",
        "quote": 'file,label\n"0.png,x\n1.png,y\n',
        "twice": "file,file\n0.png,1.png\n",
        "ids": "file,label\n" + "".join(f"{name},x{n}\n" for n, name in enumerate(names)),
        "one": "file,label\n" + "".join(f"{name},x\n" for name in names),
        "blank": "file,label\n0.png,\n1.png,x\n",
        "elsewhere": "file,label\nz1.png,x\nz2.png,y\n",
        "wide": f"file,{','.join(f'c{n}' for n in range(99))}\n0.png{',1' * 99}\n1.png{',1' * 99}\n",
        "tested": "file,label,split\n0.png,x,test\n1.png,y,test\n",
    }.items():
        (root / f"{table}.csv").write_text(text)
    (root / "utf16.csv").write_text("file,label\n0.png,x\n", encoding="utf-16")
    for name, text in {
        "tab": "supernet:\n\tepochs: 3\n",
        "tag": "!!python/object/apply:os.system ['true']\n",
        "list": "- tour\n",
        "null": "recipe: tour\ndata:\n",
        "deep": "recipe: tour\ndata: {augment: {mixup: {x: 1}}}\n",
        "key": "recipe: tour\n1: 2\n",
    }.items():
        (root / f"{name}.yaml").write_text(text)
    (root / "latin.yaml").write_bytes("budget: 'é'\n".encode("latin-1"))
    return root


FLAT = "run images dataset=flat labels="
GOOD = "run images dataset=good "


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "run images dataset=images.zip",
            "a file; it must be a folder of class folders or images. Unpack it",
        ),
        ("run images dataset=zero", "not one image of the class 'b' can be read (such as b/"),
        ("run images dataset=hfds/", "behind hfds/ stands a name of the Hub or a folder"),
        (
            "run images dataset=https://example.org/x.zip",
            "an address; images are read from this machine. Download",
        ),
        (
            "run images dataset=~nobody1/x",
            "'~nobody1/x' begins with ~nobody1, and there is no such home folder.",
        ),
        ("run tour SEED=3", "there is no field 'SEED'. Nearest: 'seed'."),
        (
            "swap net.onnx mixer=nystrom",
            "'net.onnx', a file that holds no network to go on from; one is a saved",
        ),
        ("list -v", "`vitnas list` takes nothing, but '-v' was given. Leave it out."),
        (
            FLAT + "labels.xlsx",
            "labels.xlsx is a .xlsx file; a table of labels is a CSV or TSV file. Save it as one.",
        ),
        (FLAT + "wide.csv", "has the classes c0, c1, c2, c3, c4...; an image has one class"),
        (
            FLAT + "tested.csv",
            "has the column 'split' and no row of it says train (it says test); some must.",
        ),
        (GOOD + "test_split=nothing", "test_split is 'nothing', and good has no such folder"),
        (GOOD + "train_split=nothing", "train_split is 'nothing', and good has no such folder"),
        (GOOD + "data.mean=[0.5]", "mean has 1 values; the images have 3 channels. Give 3."),
        (GOOD + "data.holdout=100", "holdout is 100: 100 of 10 images cannot be set apart"),
        (GOOD + "search.folds=9", "search.folds is above "),
        (GOOD + "class_map=nowhere.csv", "(No such file or directory); it must be a text file in UTF-8"),
        (GOOD + "balance=0.5 labels=false", "balance is 0.5 and labels is false; it goes by classes"),
        (GOOD + "label_kind=classes", "several are said by a table or by lists. Give data.labels"),
        (
            FLAT + "utf16.csv",
            "utf16.csv cannot be read (it is no text in UTF-8); it must be a text file in UTF-8",
        ),
        (FLAT + "empty.csv", "empty.csv has 0 rows and 0 columns; a table of labels has"),
        (
            FLAT + "header.csv",
            "header.csv has one row; below the names of its columns stands a row per image",
        ),
        (FLAT + "quote.csv", "Line 2 of quote.csv has 1 cells and its first line 2"),
        (FLAT + "twice.csv", "twice.csv has two columns 'file'; each needs a name of its own. Rename one."),
        (FLAT + "ids.csv", "each of the 12 classes needs an image on both sides"),
        (FLAT + "one.csv", "flat has one class only, 'x'; at least 2 are needed"),
        (FLAT + "blank.csv", "Row 1 of blank.csv has no 'label'; every image needs a class"),
        (FLAT + "elsewhere.csv", "None of the 2 images that elsewhere.csv names is below the folder"),
        ("run tab.yaml", "tab.yaml cannot be read as YAML (line 2: found character"),
        ("run tag.yaml", "tag.yaml cannot be read as YAML (line 1: could not determine a constructor"),
        ("run latin.yaml", "latin.yaml cannot be read as YAML (it is no text in UTF-8). Mend the file."),
        ("run list.yaml", "list.yaml holds no fields; a run is written as `field: value` lines"),
        ("run null.yaml", "data is 'null'; it must be fields, such as dataset below it"),
        ("run deep.yaml", "data.augment.mixup has the field 'data.augment.mixup.x'; it is a value"),
        ("run key.yaml", "key.yaml has an unknown field '1'"),
        ("run tour folder=images.zip", "folder is 'images.zip', and images.zip is a file. Give another"),
        ("run tour folder=images.zip/x", "images.zip is a file. Give another folder=PATH."),
        ("run tour folder=a\0b", "a word of the command holds a zero byte; words are text. Remove it."),
        ("tour", "'tour' is a recipe, and no command stands before it. Write `vitnas run tour`."),
        ("dataset=good", "Write `vitnas run images dataset=good`."),
        ("run images good", "a recipe comes first. Write `vitnas run images dataset=good`."),
        ("run good images", "'good' is a folder and stands where no folder does"),
        ("vitnas run tour", "'vitnas' stands twice; a command comes behind it. Leave one out."),
        ("bench mixer", "run folder, mixers or tokens, and 'mixer' is none. Correct it. Nearest: 'mixers'."),
        ("show none.json", "It holds no Arch); it must be as `vitnas retrain` wrote it. Give another"),
        ("count bare", "'bare' cannot be made (its config.json has no 'architecture'); it must be"),
        ("count images.zip", "'images.zip' is no model, recipe or arch.json; `vitnas list` names them."),
    ],
)
def test_it_is_told_in_one_sentence(
    line: str,
    expected: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    said = refused(line.split(), capsys)
    assert expected in said
    assert not any(word in said for word in ("Errno", "codec", "<unicode string>", "Error:"))
    assert not (place / "runs").exists(), "it leaves nothing"
