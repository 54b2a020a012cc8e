"""What a call says when it refuses; without pytest, so that contracts import anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vitnas.errors import UserError


def refusal(call: Callable[[], Any]) -> str:
    """The message of the UserError that `call` raises."""
    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("no UserError was raised")
