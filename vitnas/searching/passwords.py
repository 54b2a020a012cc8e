"""Texts that may hold the password of a storage, as people may see them."""

from __future__ import annotations

import re

from vitnas.errors import first_line

PASSWORD = "VITNAS_STORAGE_PASSWORD"
_SECRET = re.compile(r"(://[^:/@?#]*):[^?#]*@|([?&](?:password|passwd|sslpassword)=)[^&#]*", re.IGNORECASE)


def shown(where: object) -> str:
    """A storage as people may see it: without its password."""
    return _SECRET.sub(lambda found: f"{found[1]}:***@" if found[1] else f"{found[2]}***", str(where))


def has_password(where: str) -> bool:
    """Whether a storage's URL holds a password."""
    return shown(where) != where


def reason(error: BaseException) -> str:
    """What is behind a storage's error, in a line and without a password."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shown(first_line(getattr(error, "orig", None) or error))
