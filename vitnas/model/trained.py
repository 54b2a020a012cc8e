"""Where a trained network is, by what a user types: a folder of a saved model, RUN or RUN@ROLE of a run folder, a timm
name, or NAME@FILE."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import timm

from vitnas.errors import UserError, nearest

SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")  # of files of weights
LOCAL = "local-dir:"  # timm's word for a folder
HUB = ("hf-hub:", "hf_hub:")  # and for a name on the Hub


class Trained(NamedTuple):
    """`name` is what timm makes the network by; its weights lie in `folder` or `file`, else timm knows where."""

    name: str
    folder: Path | None = None
    file: Path | None = None


def find_trained(text: str, *, what: str) -> Trained:
    """The network that `text` stands for; nothing is loaded.

    Args:
        what: the field that `text` stands in, for errors.

    Raises:
        UserError: no such folder, name or file.
    """
    path = Path(text.removeprefix(LOCAL))
    if path.is_dir():
        return _in_folder(path, "", text, what)
    if text.startswith(LOCAL):
        raise UserError(f"{what} is {text!r}, but there is no folder {str(path)!r}. Correct the path.")
    name, _, file = text.partition("@")
    if file and (Path(name) / "run.yaml").exists():
        return _in_folder(Path(name), file, text, what)
    if not file and path.is_file() and path.suffix not in SUFFIXES:
        raise UserError(
            f"{what} is {text!r}, a file that holds no network to go on from; one is a saved model's folder, RUN@ROLE "
            "or a name that timm knows, with weights of its own NAME@FILE. Give such a one."
        )
    if not file and path.suffix in SUFFIXES:
        raise UserError(
            f"{what} is {text!r}; a file of weights does not say what they are of. Write NAME@{text}, for example "
            f"vit_tiny_patch16_224@{text}."
        )
    known, _, _ = name.partition(".")  # of the weights' tag
    if not name.startswith(HUB) and not timm.is_model(known):
        near = "" if len(Path(name).parts) > 1 else nearest(known, timm.list_models())
        raise UserError(
            f"{what} is {text!r}; it must be a folder of a saved model or a name that timm knows, alone or as "
            f"NAME@FILE.{near or ' Correct it.'}"
        )
    if file and not Path(file).is_file():
        raise UserError(f"{what} is {text!r}, but there is no file {file!r}. Correct the path.")
    return Trained(name, file=Path(file) if file else None)


def _in_folder(folder: Path, role: str, text: str, what: str) -> Trained:
    """A saved model's folder: itself, or one in a run folder."""
    if role or ((folder / "run.yaml").exists() and not (folder / "config.json").exists()):
        saved = (
            path.parent
            for part in ("front", "models")
            for path in sorted(folder.glob(f"{part}/*/config.json"))
        )
        found = {path.name: path for path in saved}
        if (wanted := role or "chosen") not in found:
            raise UserError(
                f"{what} is {text!r}, but {folder} has no model {wanted!r} (it has: {', '.join(found) or 'none yet'}). "
                f"Give {folder}@NAME with one of these, or let the run make it.{nearest(wanted, found)}"
            )
        folder = found[wanted]
    return Trained(f"{LOCAL}{folder}", folder=folder)
