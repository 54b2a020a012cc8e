"""Sharing: a saved model, its card and its exported files as a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from vitnas.errors import UserError, first_line
from vitnas.exporting.card import CARD, UNKNOWN, licence_in, with_licence
from vitnas.exporting.script import SCRIPT
from vitnas.model.trained import find_trained
from vitnas.reporting.cards import at_hub, loads
from vitnas.runs import read_text

MODEL_FILES = ("config.json", "model.safetensors", CARD)
EXPORTED = ("*.onnx", "*.pt2", "*.pte", SCRIPT)


def push(model: Path | str, repo: str, *, private: bool = False, licence: str | None = None) -> str:
    """Put a saved model on the Hub, with its card and, of a run, its exported files; returns the address.

    `timm.create_model("hf-hub:REPO", pretrained=True)` loads it from there (after `import vitnas`, where the card says
    so). A repository that is there gets a new commit. Who pushes is known by `hf auth login` or HF_TOKEN.

    Args:
        model: a folder of a saved model, a run folder, or RUN@ROLE.
        repo: `owner/name`.
        private: of a repository that is not there yet.
        licence: Hugging Face's word for one (`apache-2.0`, `mit`, `cc-by-4.0`, `other`), written into the card.

    Raises:
        UserError: no such model, a repository that is no name, or the Hub cannot be reached or refuses.
    """
    folder, exported = _found(str(model))
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/\w([\w.-]{0,94}\w)?", repo, re.ASCII):
        raise UserError(
            f"{repo!r} is no name of a repository; it must be OWNER/NAME, of letters, digits, '.', '_' and '-'. Write "
            f"for example me/{re.sub(r'[^A-Za-z0-9_-]+', '-', repo.rpartition('/')[2]).strip('-') or 'flowers'}."
        )
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", licence):
        raise UserError(
            f"license is {licence!r}; it must be one of Hugging Face's words for one. Write apache-2.0, mit, cc-by-4.0 "
            "or other."
        )
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="vitnas-push-") as where:
        gather(folder, exported, Path(where), repo, licence)
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(folder_path=where, repo_id=repo, commit_message="A model, by vitnas")
        except Exception as error:  # the Hub's, its HTTP library's and the system's, by version
            raise UserError(
                f"{repo} cannot be written ({first_line(error)}); the Hub must be reached, and know you. Run `hf auth "
                "login`, or set HF_TOKEN to a token that may write."
            ) from error
    return f"https://huggingface.co/{repo}"


def gather(folder: Path, exported: Path | None, where: Path, repo: str, licence: str | None) -> None:
    """Copy what is pushed to `where`; the card says how it is loaded from the Hub."""
    for name in MODEL_FILES:
        shutil.copyfile(folder / name, where / name)
    card = read_text(folder / CARD)
    for source in filter(None, (folder, exported)):
        for file in sorted(path for pattern in EXPORTED for path in source.glob(pattern)):
            shutil.copyfile(file, where / file.name)
        if source == exported:
            found = "".join(f"### With {name}\n\n```python\n{code}\n```\n\n" for name, code in loads(source))
            card += f"\n## Its exported files\n\n{found}" if found else ""
    card = at_hub(card, repo)
    if licence is not None and licence_in(folder / CARD) in (UNKNOWN, licence):
        card = with_licence(card, licence)
    elif licence is not None:
        raise UserError(
            f"license is {licence!r}, and {folder / CARD} names {licence_in(folder / CARD)!r}; one of them is wrong. "
            "Correct the card, or leave license out."
        )
    (where / CARD).write_text(card, encoding="utf-8")


def _found(text: str) -> tuple[Path, Path | None]:
    """The folder of a saved model, and that of its exported files, if it has one of its own."""
    given = find_trained(text, what="MODEL")
    if given.folder is None:
        raise UserError(
            f"MODEL is {text!r}; what is pushed is a folder of a saved model or a run. Give one, such as runs/mine."
        )
    folder = given.folder
    for name in MODEL_FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}; a model that is pushed has {', '.join(MODEL_FILES)}. Save it anew."
            )
    if folder.parent.name != "models":
        return folder, None
    export = folder.parents[1] / "export"
    exported = export if folder.name == "chosen" else export / folder.name
    return folder, exported if exported.is_dir() else None
