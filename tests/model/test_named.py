"""Archs by words: published names, codes, files that a search wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.model.named import ArchFile, Chosen, find_arch
from vitnas.model.net_id import net_id_of
from vitnas.model.published import PUBLISHED
from vitnas.runs import to_json

ARCH = Arch(
    image_size=8,
    patch_size=2,
    in_chans=1,
    num_classes=10,
    stages=(
        Stage(
            embed_dim=16,
            blocks=(
                Block(num_heads=2, head_dim=8, mlp_hidden=32, slot=0),
                Block(num_heads=1, head_dim=8, mlp_hidden=24, mixer="linformer", mixer_size=4, slot=3),
            ),
        ),
    ),
)
DATA = {"image_size": 8, "in_chans": 1, "num_classes": 10}


def test_a_published_name_and_its_code_are_one_arch() -> None:
    code = " ".join(map(str, net_id_of(PUBLISHED["vitas_b"])))
    for words in ("vitas_b", code, f"vitas:{code}", code.replace(" ", ", ")):
        found = find_arch(words)
        assert found.arch == PUBLISHED["vitas_b"]
        assert not found.is_file
    assert find_arch("vitas_b").name == "vitas_b"


def test_what_a_search_writes_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "chosen.json"
    found = {"macs": 7, "params": 8, "supernet_accuracy": 0.5, "budget": "", "recipe": "tour"}
    record = Chosen.of(ARCH, "vitas", **found)
    record.write(tmp_path)
    assert record.name == f"vitas-p2-{ARCH.id}"
    assert record.about == ARCH.describe()
    assert record.blocks == (
        "0: 2 heads of 8, MLP 32 (slot 0)",
        "1: 1 heads of 8, MLP 24, linformer 4 (slot 3)",
    )
    assert record.net_id is None
    assert find_arch(str(path)) == (record.name, ARCH, True)
    assert Chosen.read(tmp_path) == record
    vitas = Chosen.of(PUBLISHED["vitas_a"], "vitas", **found)
    assert vitas.net_id is not None
    assert find_arch(vitas.net_id).arch == PUBLISHED["vitas_a"]
    assert next(iter(to_json(vitas))) == "name"


def test_an_arch_json_and_its_folder(tmp_path: Path) -> None:
    ArchFile(ARCH).write(tmp_path)
    for words in (tmp_path, tmp_path / "arch.json"):
        assert find_arch(str(words)) == (ARCH.id, ARCH, True)


def test_names_follow_the_images_and_files_do_not(tmp_path: Path) -> None:
    fitted = find_arch("vitas_a").fitted(image_size=64, in_chans=1, num_classes=10)
    assert (fitted.image_size, fitted.in_chans, fitted.num_classes) == (64, 1, 10)
    assert fitted.stages == PUBLISHED["vitas_a"].stages
    with pytest.raises(UserError, match=r"vitas_a does not fit the data: image_size is 8; .* Nearest: 16"):
        find_arch("vitas_a").fitted(**DATA)
    fewer = find_arch("dynamicvit_deit_small_07").fitted(image_size=64, in_chans=1, num_classes=10)
    assert [block.keep for block in fewer.blocks if block.keep] == [11, 8, 5]  # the same share of 16
    ArchFile(ARCH).write(tmp_path)
    found = find_arch(str(tmp_path))
    assert found.fitted(**DATA) == ARCH
    for name, value in (("image_size", 16), ("in_chans", 3), ("num_classes", 9)):
        with pytest.raises(UserError, match=r"is for 8 pixels, 1 channels and 10 classes; the data are"):
            found.fitted(**{**DATA, name: value})


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        (
            "vitas_d",
            None,
            r"'vitas_d' is no model, arch\.json or ViTAS code; `vitnas list` names them. Nearest: 'vitas_",
        ),
        ("1 2 3", None, r"the net_id has 3 numbers; it must have"),
        ("vitas:1 2 x", None, r"position 2 is 'x'"),
        ("1 2 x", None, r"position 2 is 'x'"),
        ("1, two, 3", None, r"position 1 is 'two'"),
        ("gone.json", None, r"gone\.json does not exist; it must be a file with an Arch"),
        ("bad.json", "{", r"bad\.json cannot be read"),
        ("bad.json", "[1]", r"bad\.json cannot be read \(the Arch's schema is None"),
        (
            "bad.json",
            '{"name": "x", "arch": {"schema": 9}}',
            r"bad\.json cannot be read \(the Arch's schema is 9",
        ),
    ],
)
def test_what_is_no_arch_is_refused(words: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / words).write_text(text)
    given = str(tmp_path / words) if words.endswith(".json") else words
    with pytest.raises(UserError, match=message):
        find_arch(given)
