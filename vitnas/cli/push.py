"""`vitnas push MODEL REPO`: a saved model, its card and its exported files on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from vitnas.cli.options import options
from vitnas.reporting.hub import push

USAGE = (
    "`vitnas push` takes a run folder or a folder of a saved model, and a repository, as in `vitnas push runs/mine "
    "me/flowers`; license=apache-2.0 and private=true may follow."
)


@dataclass(frozen=True)
class PushOptions:
    """A model, a repository of the Hub, the licence for the card, and whether a new repository is private."""

    model: str
    repo: str
    license: str | None = None
    private: bool = False


def push_command(words: list[str], console: Console) -> None:
    """Put a model on the Hub."""
    asked = options(PushOptions, words, USAGE)
    console.out(push(asked.model, asked.repo, private=asked.private, licence=asked.license))
