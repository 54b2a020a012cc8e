"""What people give to commands that take results: what is wrong is one sentence with a remedy, and leaves nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from vitnas.cli import main


@pytest.fixture(scope="module")
def place(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, damaged models, files that are none, and images."""
    where = tmp_path_factory.mktemp("bad")
    shutil.copytree(finished, where / "run")
    chosen = where / "run" / "models" / "chosen"
    for name, file, content in (
        ("cut", "model.safetensors", b"cut"),
        ("json", "config.json", b"{"),
        ("strange", "config.json", b'{"architecture": "vit_unheard"}'),
    ):
        shutil.copytree(chosen, where / name)
        (where / name / file).write_bytes(content)
    (where / "text.onnx").write_text("no file of ONNX")
    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", kinds[:1], kinds[1:])
    foreign = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(foreign, where / "foreign.onnx")
    (where / "empty").mkdir()
    (where / "images" / "0").mkdir(parents=True)
    (where / "images" / "zero").mkdir()
    for name in ("0/a", "zero/b"):
        Image.new("L", (8, 8)).save(where / "images" / f"{name}.png")
    return where


MODEL = "run/models/chosen"
BAD = {
    "push run": r"`vitnas push` takes a run folder or a folder of a saved model, and a repository",
    "push run flowers": r"'flowers' is no name of a repository; it must be OWNER/NAME.* me/flowers\.$",
    "push run me/my#flowers": r"Write for example me/my-flowers\.$",
    "push run me/flowers license=my=own": r"license is 'my=own'; it must be one of Hugging Face's words",
    "push run me/größe": r"'me/größe' is no name of a repository; .* Write for example me/gr-e\.$",
    "push run me/-": r"'me/-' is no name of a repository",
    "push run@nobody me/flowers": r"has no model 'nobody' \(it has: .*chosen.*\)\. Give run@NAME",
    "push vit_tiny_patch16_224 me/flowers": r"what is pushed is a folder of a saved model or a run\. Give one",
    "export run@chosn": r"has no trained model 'chosn' .*Nearest: 'chosen'",
    "export run@chosen formats=[onnx_int]": r"formats is '\[onnx_int\]'; it must be a list of",
    "export run@chosen folder=x": r"folder are for other models\. Leave them out\.$",
    f"export {MODEL} formats=[onnx_int8] folder=out": r"are made and judged by images, and there are none\. Add data",
    f"export {MODEL} opset=3 folder=out": r"export\.opset is 3; files are written with 17 to 25\.",
    f"export {MODEL} opset=99 folder=out": r"export\.opset is 99; files are written with 17 to 25\.",
    f"export {MODEL} formats=[] folder=out": r"formats is \[\]; it names at least one of onnx, .* Use \[onnx\]",
    f"export {MODEL} format=[onnx] folder=out": r"There is no field 'format'\. Nearest: 'formats'",
    "export cut folder=out": r"cut.* (cannot be loaded|cannot be read|is damaged|is cut)",
    "export json folder=out": r"config\.json cannot be read",
    "export strange folder=out": r"names the architecture 'vit_unheard'; timm does not know it",
    "predict text.onnx images": r"text\.onnx cannot be read by ONNX Runtime .* Export it anew\.$",
    "predict foreign.onnx images": r"foreign\.onnx does not say which images it takes; files that vitnas writes do",
    f"predict {MODEL} empty": r"images is 'empty', which holds no image .* Give another folder\.$",
    f"predict {MODEL} images out=a.xlsx": r"out is 'a\.xlsx'; it must be one of csv, json, parquet",
    f"evaluate {MODEL} data.dataset=images": r"the images have the class 'zero', which MODEL does not know",
    f"evaluate {MODEL} data.dataset=images split=tests": r"split is 'tests'; it must be one of .*Nearest: 'test'",
}


@pytest.mark.parametrize("words", BAD)
def test_each_is_one_sentence_with_a_remedy(
    words: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = {path for path in place.rglob("*")}
    assert main(words.split()) == 2
    told = capsys.readouterr().err
    assert re.search(BAD[words], told.strip()), told
    assert "Traceback" not in told
    assert told.count("\n") == 1
    assert {path for path in place.rglob("*")} == before


def test_names_of_classes_may_be_anything(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the card, which is YAML and Markdown."""
    import huggingface_hub

    from vitnas.exporting import load_timm, save_timm

    names = ["a,b", "c|d", "<script>", "it's", '"', "---", "é\u2028", "true", "1", "x y"]
    model = load_timm(place / MODEL)
    save_timm(model, place / "named", class_names=names)
    assert json.loads((place / "named" / "config.json").read_text())["label_names"] == names
    card = huggingface_hub.ModelCard.load(place / "named" / "README.md")
    assert card.data.to_dict()["library_name"] == "timm"
    assert all(name in card.text for name in ("a,b", "it's", "x y"))
    assert "<script>" not in card.text
    again = load_timm(place / "named")
    assert again.pretrained_cfg["label_names"] == names  # type: ignore[union-attr, index]
