"""Files of a run folder: written aside and renamed, so that a kill never leaves half a file; and typed.

Weights are safetensors, everything else JSON, JSON lines or YAML; nothing here is ever unpickled. A JSON file is a
`RunFile`: a frozen dataclass that whoever makes the file writes and whoever needs it reads.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitnas.errors import HANDLES, UserError, lacks_handles

STALE_S = 3600.0
T = TypeVar("T")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence that `path` cannot be written, whatever the writer raised.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk says
        if lacks_handles(error):
            raise UserError(HANDLES) from error
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} cannot be written ({reason}); the folder must be writable with free space. "
            "Mend that and run the same command again: a run goes on where it was."
        ) from error


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    The file is flushed to disk before the rename, so `path` holds either the old content or the new, never a mix,
    also when the disk fills up while writing.

    Raises:
        UserError: the folder cannot be written to, or the disk is full. What was there before is untouched.
    """
    temporary: str | None = None
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(path)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            write(Path(temporary))
            with open(temporary, "r+b") as stream:  # Windows flushes only what may be written
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files private; a run folder is meant to be shared
            os.replace(temporary, path)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def remove_stale(path: Path) -> None:
    """Delete what killed writers of a file or folder left beside it; nobody takes an hour to write one."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_S:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


SUM = "crc32"  # in the header of a file of tensors: of all names and bytes, in the order of the names


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, in one step, with a checksum in the header, which may hold more text.

    Raises:
        UserError: see `write_with`.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {**(meta or {}), SUM: sum_of(whole)}

    def write(file: Path) -> None:
        save_file(whole, file, metadata=header)
        if len(header) > 1:
            _sort_header(file)

    write_with(path, write)


def _sort_header(file: Path) -> None:
    """Put the texts of a safetensors header in order: the library's is another each time, and so were the bytes."""
    with open(file, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        found = json.loads(stream.read(size))
        found["__metadata__"] = dict(sorted(found["__metadata__"].items()))
        text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # as long as it was, since only the order is another
            stream.seek(8)
            stream.write(text.ljust(size))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the text of its header.

    Raises:
        OSError, SafetensorError: it cannot be read, or has other bytes than were written. A file without a checksum, as
            other programs write them, is taken as it is.
    """
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if SUM in meta and meta[SUM] != sum_of(tensors):
        raise SafetensorError("its bytes are not those that were written")
    return tensors, meta


def sum_of(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of tensors on the host, which finds lost bits; a gigabyte takes a second."""
    total = 0
    for name in sorted(tensors):
        flat = tensors[name].reshape(-1).view(torch.uint8)
        total = zlib.crc32(flat.numpy().data, zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` in one step (see `write_with`)."""
    content = data.encode() if isinstance(data, str) else data
    write_with(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON. NaN and infinity are refused: JSON has neither."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def parse_json(text: str | bytes) -> Any:
    """A text as JSON; ValueError for what is none, also where it nests deeper than Python goes."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def read_text(path: Path) -> str:
    """What a text file of a run holds, which a person may have changed.

    Raises:
        UserError: it is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read ({error.reason}); it must be text. Delete it to make it anew."
        ) from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; an earlier stage writes it. Run that stage first."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); it must be JSON. Delete it to make it anew."
        ) from error


def check_there(folder: Path) -> Callable[[], None]:
    """A check that `folder` is still the one that it is now.

    Raises:
        UserError: by the check, where it was removed meanwhile.
    """
    first = folder.stat()

    def check() -> None:
        with suppress(OSError):
            if os.path.samestat(folder.stat(), first):
                return
        raise UserError(
            f"{folder} was removed or replaced while the run went on; what it held is gone. Leave a run's folder where "
            "it is, and run the same command again."
        )

    return check


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line in a single write, so that lines of several processes do not mix.

    Raises:
        UserError: as `write_with`. A part of the line may stay; `read_jsonl` leaves it out.
    """
    line = json.dumps(record, allow_nan=False) + "\n"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as stream:
            stream.write(line.encode())


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON-lines file; a last line cut short by a kill is left out."""
    if not path.exists():
        return
    with open(path, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            yield parse_json(line)


class RunFile:
    """Base of the dataclasses that are a file each: what is in the file is what the fields say, as a JSON object.

    `FILE` is its name in the folder, `COMMAND` what writes it, `REMEDY` what helps where it is damaged.
    """

    FILE: ClassVar[str]
    COMMAND: ClassVar[str] = "vitnas run"
    REMEDY: ClassVar[str] = "Delete it to make it anew."

    @classmethod
    def path(cls, folder: Path) -> Path:
        """Where it lies in `folder`."""
        return folder / cls.FILE

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether it was written."""
        return cls.path(folder).exists()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The file in `folder`; raises as `load`."""
        return cls.load(cls.path(folder))

    @classmethod
    def load(cls, path: Path) -> Self:
        """The file at `path`, whatever its name.

        Raises:
            UserError: it is missing, or damaged, or something else (saying what is wrong).
        """
        try:
            return from_json(cls, parse_json(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; `{cls.COMMAND}` writes it. Run that first.") from error
        except (OSError, ValueError) as error:  # json's and Unicode's errors, and UserError, are ValueErrors
            reason = str(error).rstrip(".")
            raise UserError(
                f"{path} cannot be read ({reason}); it must be as `{cls.COMMAND}` wrote it. {cls.REMEDY}"
            ) from error

    def write(self, folder: Path) -> None:
        """Write it into `folder`, in one step."""
        self.save(self.path(folder))

    def save(self, path: Path) -> None:
        """Write it to `path`, in one step."""
        write_json(path, to_json(self))


def to_json(value: Any) -> Any:
    """A dataclass, and whatever it holds, as JSON values; a class's own `to_json` goes first."""
    if hasattr(value, "to_json"):
        return to_json(value.to_json())
    if is_dataclass(value):
        return {item.name: to_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def from_json(kind: type[T], value: Any) -> T:
    """JSON values as a `kind`: a dataclass, tuples and mappings of them, `X | None`, Literal, a number, text.

    Raises:
        ValueError: something is missing, unknown or of another kind (saying where).
    """
    return cast(T, _reader(cast(Any, kind))(value))


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """The function that reads a `kind`; made once, as files of metrics have many thousands of lines."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
    if origin in (Union, UnionType):
        return _optional([_reader(part) for part in parts if part is not NoneType], NoneType in parts)
    if origin is Literal:
        return lambda value: (
            value if value in parts else _refuse(value, f"one of {', '.join(map(repr, parts))}")
        )
    if origin is tuple:
        return _tuple(parts)
    if hasattr(kind, "from_json"):
        return kind.from_json
    if is_dataclass(kind):
        return _dataclass(cast(type[Any], kind))
    if (origin or kind) in (dict, Mapping):
        return _mapping(_reader(parts[1] if parts else Any))
    if kind is float:
        return lambda value: float(value) if type(value) in (int, float) else _refuse(value, "a number")
    assert kind in (int, str, bool), f"files do not hold {kind}"
    words = {int: "a whole number", str: "text", bool: "true or false"}
    return lambda value: value if type(value) is kind else _refuse(value, words[kind])


def _refuse(value: Any, wanted: str) -> Any:
    raise ValueError(f"{json.dumps(value)[:40]} is not {wanted}")


def _inside(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    """Read a part; what is wrong there is said with its name."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _optional(readers: list[Callable[[Any], Any]], is_optional: bool) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value is None and is_optional:
            return None
        for each in readers[:-1]:
            with suppress(ValueError):
                return each(value)
        return readers[-1](value)

    return read


def _tuple(parts: tuple[Any, ...]) -> Callable[[Any], Any]:
    each = _reader(parts[0]) if parts[1:] == (...,) else None
    fixed = [] if each else [_reader(part) for part in parts]

    def read(value: Any) -> Any:
        if not isinstance(value, list) or (not each and len(value) != len(fixed)):
            _refuse(value, "a list" if each else f"a list of {len(fixed)}")
        readers = [each] * len(value) if each else fixed
        return tuple(
            _inside(str(i), one, item) for i, (one, item) in enumerate(zip(readers, value, strict=True))
        )

    return read


def _mapping(each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            _refuse(value, "an object")
        return {name: _inside(name, each, item) for name, item in value.items()}

    return read


def _dataclass(kind: type[Any]) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    readers = {item.name: _reader(hints[item.name]) for item in fields(kind)}
    needed = {
        item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING
    }

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            _refuse(value, "an object")
        if missing := sorted(needed - value.keys()):
            raise ValueError(f"{missing[0]!r} is missing")
        if unknown := sorted(value.keys() - readers.keys()):
            raise ValueError(f"{unknown[0]!r} is unknown")
        return kind(**{name: _inside(name, readers[name], item) for name, item in value.items()})

    return read
