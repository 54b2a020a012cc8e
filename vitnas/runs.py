"""Files of a run folder: written aside and renamed, so that a kill never leaves half a file.

Weights are safetensors, everything else JSON, JSON lines or YAML; nothing here is ever unpickled.
"""

from __future__ import annotations

import glob
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vitnas.errors import UserError

STALE_S = 3600.0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence that `path` cannot be written, whatever the writer raised.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk says
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} cannot be written ({reason}); the folder must be writable with free space. "
            "Mend that and run the same command again: it continues from the last checkpoint."
        ) from error


def write_with(path: Path, write: Callable[[Path], None]) -> None:
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
            _remove_stale(path)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            write(Path(temporary))
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files private; a run folder is meant to be shared
            os.replace(temporary, path)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Delete what killed writers of `path` left beside it; nobody takes an hour to write one file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_S:
                left.unlink()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` in one step (see `write_with`)."""
    content = data.encode() if isinstance(data, str) else data
    write_with(path, lambda temporary: _fill(temporary, content))


def _fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON. NaN and infinity are refused: JSON has neither."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; an earlier stage writes it. Run that stage first."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); it must be JSON. Delete it to make it anew."
        ) from error


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
            yield json.loads(line)
