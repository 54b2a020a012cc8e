"""Words of a command line as typed values: a command's options are a dataclass, which jsonargparse reads."""

from __future__ import annotations

import math
import re
import warnings
from argparse import ArgumentError
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from vitnas.data import DataConfig
from vitnas.errors import UserError, nearest

Options = TypeVar("Options")


def options(kind: type[Options], words: Sequence[str], usage: str) -> Options:
    """The options of a command. Fields without a default come first and stand by their place.

    Args:
        usage: a sentence that says what the command takes, for words that are too many or too few.

    Raises:
        UserError: as in `parsed`, or what `kind` refuses.
    """
    items: Sequence[Any] = fields(kind)  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    types = {item.name: hints[item.name] for item in items}
    placed = [item.name for item in items if item.default is MISSING and item.default_factory is MISSING]
    words = [
        word.replace("data.", "", 1)
        if word.startswith("data.") and word[5:].partition("=")[0] in types
        else word
        for word in _joined(words)
    ]  # as `data.dataset`, which other commands take, for a command that has `dataset`
    named = [word for word in words if word.startswith("--") or ("=" in word and not _is_path(word, types))]
    for name in (word.removeprefix("--").partition("=")[0] for word in named):
        if name not in types:
            raise UserError(f"{usage} There is no field {name!r}.{nearest(name, types)}")
    try:
        values = parsed(types, words, placed)
    except _WordsError as error:
        raise UserError(usage) from error
    for name, value in values.items():  # jsonargparse's PositiveInt is a class of its own
        for base in (int, float):
            if isinstance(value, base) and not isinstance(value, bool):
                values[name] = base(value)
    return kind(**{name: value for name, value in values.items() if value is not None or name in placed})


def split(kind: type[Any], words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words for the options `kind`, and by name the texts of all other `name=value`.

    Raises:
        UserError: a name that is given two values.
    """
    own, words = {item.name for item in fields(kind)}, _joined(words)
    named = {word: word.removeprefix("--").partition("=") for word in words if "=" in word}
    others = {word: (name, text) for word, (name, _, text) in named.items() if name not in own}
    texts: dict[str, str] = {}
    for name, text in others.values():
        if name in texts:
            raise UserError(f"{name} is given twice, as {texts[name]!r} and {text!r}. Leave one out.")
        texts[name] = text
    return [word for word in words if word not in others], texts


def of_data(texts: Mapping[str, str]) -> dict[str, str]:
    """Fields of data by their whole names: `dataset` is `data.dataset`, as for a run.

    Raises:
        UserError: a field that is given both ways.
    """
    found: dict[str, str] = {}
    for name, text in texts.items():
        whole = f"data.{name}" if name in DataConfig.__dataclass_fields__ else name
        if whole in found:
            raise UserError(f"{whole} is given twice, as {found[whole]!r} and {text!r}. Leave one out.")
        found[whole] = text
    return found


def _joined(words: Sequence[str]) -> list[str]:
    """`--name value` as one word, since a value may hold a `=` of its own (`--budget macs<=1M`)."""
    found: list[str] = []
    for word in words:
        if found and found[-1].startswith("--") and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _is_path(word: str, known: Container[str]) -> bool:
    """Whether a word with a `=` in it is no field with its value, but the name of a file or folder."""
    return word.partition("=")[0].removeprefix("--") not in known and Path(word).exists()


class _WordsError(UserError):
    """Too many words, or too few."""


def parsed(types: Mapping[str, Any], words: Iterable[str], positional: Sequence[str] = ()) -> dict[str, Any]:
    """Values of `types` from the words of a command line: `name=value`, `--name=value`, `--name value`; dotted names
    go into dataclasses.

    Args:
        positional: those that stand by their place, without a name.

    Raises:
        UserError: an unknown name (the nearest is told), one too many or too few, a value that is not of its type, or
            what a dataclass refuses.
    """
    parser, known = ArgumentParser(exit_on_error=False), dict(_hints(types))
    for name, kind in types.items():
        parser.add_argument(name if name in positional else f"--{name}", type=kind)
    flags, texts = [], {}
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        is_field = bool(equals) and not _is_path(word, known)
        if is_field:
            if name not in known:
                raise UserError(f"there is no field {name!r}.{nearest(name, known)}")
            texts[name] = text
            if _is_list(known[name], text):
                text = f"[{text}]"
        flags.append(f"--{name}={text}" if is_field else word)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jsonargparse's own deprecations differ between its versions
            found = parser.parse_args(flags)
            make = getattr(parser, "instantiate", None) or parser.instantiate_classes
            values = dict(vars(make(found)))
    except UserError:
        raise
    except (ArgumentError, ValueError) as error:
        if isinstance(error.__cause__, UserError):  # jsonargparse tells it in its own words
            raise error.__cause__ from None
        raise _refusal(str(error), known, texts) from error
    # Nothing was said of a dataclass: it is its defaults.
    values = {k: types[k]() if v is None and is_dataclass(types[k]) else v for k, v in values.items()}
    for name, text in texts.items():
        kinds = (known[name], *get_args(known[name]))
        if (Path in kinds and not text) or (_takes_float(kinds) and not _is_finite(text)):
            raise _refusal(f'Parser key "{name}"', known, texts)
    return values


def _takes_float(kinds: Iterable[Any]) -> bool:
    """Whether one of these types is a float, a restricted one of jsonargparse's too."""
    return any(isinstance(kind, type) and issubclass(kind, float) for kind in kinds)


def _is_finite(text: str) -> bool:
    """Whether a text is no number, or a finite one."""
    if re.fullmatch(r"[-+.]*(inf|infinity|nan)", text.lower()):
        return False
    try:
        return math.isfinite(float(text))
    except ValueError:
        return True


def _refusal(reason: str, known: Mapping[str, Any], texts: Mapping[str, str]) -> UserError:
    """What jsonargparse says, as one sentence."""
    match = re.match(r'Parser key "([\w.]+)"', reason)
    name = next((text for text in texts if match and text.startswith(match[1])), "")
    if match and match[1] in texts:
        name = match[1]
    if not name:
        return _WordsError(f"the command cannot be read: {' '.join(reason.split())}.")
    return UserError(f"{name} is {texts[name]!r}; it must be {_told(known[name])}. Mend it.")


def _hints(types: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted name and its type."""
    for name, hint in types.items():
        yield f"{prefix}{name}", hint
        for nested in filter(is_dataclass, (hint, *get_args(hint))):
            own = get_type_hints(nested)
            yield from _hints({item.name: own[item.name] for item in fields(nested)}, f"{prefix}{name}.")


def _plain(hint: Any) -> Any:
    """A type without its `| None`."""
    parts = [part for part in get_args(hint) if part is not NoneType]
    return parts[0] if len(parts) == 1 and NoneType in get_args(hint) else hint


def _is_list(hint: Any, text: str) -> bool:
    """Whether a text is a list without its brackets; with a comma it is one where a type may be something else too."""
    if not text or text[0] in "[n":  # n of null
        return False
    hint = _plain(hint)
    return get_origin(hint) is tuple or (
        "," in text and any(get_origin(part) is tuple for part in get_args(hint))
    )


def _told(hint: Any) -> str:
    """A type in words."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        NoneType: "null",
        Path: "a path",
    }
    if hint in words:
        return words[hint]
    # jsonargparse's PositiveInt and PositiveFloat.
    if isinstance(hint, type) and issubclass(hint, int | float):
        return "a whole number of at least 1" if issubclass(hint, int) else "a number above 0"
    parts = [part for part in get_args(hint) if part is not Ellipsis]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if get_origin(hint) is tuple:
        kinds = dict.fromkeys(_told(part).removeprefix("a ") for part in parts)
        several = (re.sub(r"^(whole number|number|text|path)\b", r"\1s", kind) for kind in kinds)
        count = "" if Ellipsis in get_args(hint) else f"{len(parts)} "
        return f"a list of {count}{' and '.join(several)}"
    if parts:
        return " or ".join(map(_told, parts))
    return f"fields, such as {fields(hint)[0].name} below it" if is_dataclass(hint) else "text"
