"""The two errors that a user may see, and what their messages share: the nearest name, the word that is none."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Collection, Iterable
from pathlib import Path


class UserError(ValueError):
    """Bad input, told in one sentence: what it is, the rule, the remedy. The command line prints it bare."""


class MissingExtra(UserError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional part; run: pip install 'vitnas[{extra}]'.")


def nearest(word: str, options: Iterable[str]) -> str:
    """Return " Nearest: 'x'." for the option most like `word`, or "" when nothing is close."""
    known = {option.lower(): option for option in options}
    match = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.4)
    return f" Nearest: {known[match[0]]!r}." if match else ""


def check_word(name: str, value: object, options: Collection[str]) -> None:
    """Raise UserError where `value`, which the user calls `name`, is none of `options`."""
    if value not in tuple(options):  # a list out of a YAML file has no hash
        raise UserError(
            f"{name} is {value!r}; it must be one of {', '.join(options)}.{nearest(str(value), options)}"
        )


def check_words(name: str, values: Iterable[object], options: Collection[str]) -> None:
    """Raise UserError where the list `values`, which the user calls `name`, has a word that is none of `options`."""
    for value in values:
        if value not in options:
            raise UserError(
                f"{name} has {value!r}; known are {', '.join(options)}.{nearest(str(value), options)}"
            )


def unread(error: Exception) -> str:
    """Why a file of text cannot be read, without what Python calls it."""
    if isinstance(error, UnicodeError):
        return "it is no text in UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def at_home(text: str) -> Path:
    """A path whose `~` is a home folder.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{text!r} begins with {text.partition('/')[0]}, and there is no such home folder. Write the whole path."
        ) from error


HANDLES = (
    "this process may open no more files. Raise the limit (`ulimit -n 4096`) or lower data.workers, and run the same "
    "command again."
)


def lacks_handles(error: BaseException) -> bool:
    """Whether the limit on open files was met; libraries say so in words only."""
    return getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(
        error
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough to sit inside a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
