"""Files of a run folder: what killed writers leave is cleared away."""

from __future__ import annotations

import os
import time
from pathlib import Path

from vitnas.runs import STALE_S, read_json, write_json


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    old, young, other = (
        tmp_path / name for name in (".a.json.abcdefgh", ".a.json.ijklmnop", ".b.json.abcdefgh")
    )
    for path in (old, young, other):
        path.write_text("half")
    then = time.time() - STALE_S - 1
    os.utime(old, (then, then))
    os.utime(other, (then, then))
    write_json(tmp_path / "a.json", [1])
    assert read_json(tmp_path / "a.json") == [1]
    assert [path.exists() for path in (old, young, other)] == [False, True, True]
