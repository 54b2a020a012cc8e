"""`vitnas run --help` shows a file, since what it is made of imports torch; the two are held equal here."""

from __future__ import annotations

from pathlib import Path

import vitnas.cli
from vitnas.cli.commands import field_text


def test_the_help_tells_the_fields_that_there_are() -> None:
    kept = Path(vitnas.cli.__file__).with_name("fields.txt").read_text(encoding="utf-8")
    assert kept == field_text(), "`make fields` writes it anew"
