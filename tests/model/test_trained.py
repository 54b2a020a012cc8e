"""Trained networks by what a user types: one reading of it, for weights, images' constants and Spaces alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitnas.errors import UserError
from vitnas.model.trained import Trained, find_trained

NAME = "vit_tiny_patch16_224"


def test_names_folders_and_files(tmp_path: Path) -> None:
    file = tmp_path / "weights.anything"
    file.touch()
    for name in (NAME, f"{NAME}.augreg_in21k", "hf-hub:timm/some_model", "local-dir:somewhere"):
        assert find_trained(name, what="pretrained") == Trained(name)
    assert find_trained(f"{NAME}@{file}", what="pretrained") == Trained(NAME, file=file)
    assert find_trained(str(tmp_path), what="pretrained") == Trained(f"local-dir:{tmp_path}", folder=tmp_path)
    with pytest.raises(UserError, match=r"a file of weights does not say what they are of\. Write NAME@/"):
        find_trained(str(file), what="pretrained")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vit_tyny_patch16_224", rf"it must be a folder .*, alone or as NAME@FILE\. Nearest: '{NAME}'\.$"),
        ("vit_tyny_patch16_224@a.pth", rf"; it must be a folder .* Nearest: '{NAME}'\.$"),
        ("runs/mine/models/chosen", r"it must be a folder of a saved model or .* NAME@FILE\. Correct it\.$"),
        (f"{NAME}@no/weights.pth", r", but there is no file 'no/weights\.pth'\. Correct the path\.$"),
        (
            "a.pth.tar",
            r"a file of weights does not say what they are of\. Write NAME@a\.pth\.tar, for example",
        ),
    ],
)
def test_what_is_none_of_these_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^task\.teacher is '{text}'.*{message}"):
        find_trained(text, what="task.teacher")
