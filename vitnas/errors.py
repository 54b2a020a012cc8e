"""The two errors that a user may see, and the nearest-name helper their messages use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one sentence: what it is, the rule, the remedy. The command line prints it bare."""


class MissingExtra(UserError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional part; run: pip install 'vitnas[{extra}]'.")


def nearest(word: str, options: Iterable[str]) -> str:
    """Return " Nearest: 'x'." for the option most like `word`, or "" when nothing is close."""
    match = difflib.get_close_matches(word, list(options), n=1, cutoff=0.4)
    return f" Nearest: {match[0]!r}." if match else ""
