"""Tables of kinds: the import lines of a package are the table, and every member says its own word.

A package's `__init__` imports its members, one a line, and calls `members` below them. So a new kind is one file and
one line, its word stands once, and "go to definition" works.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def members(base: Any, namespace: Mapping[str, Any], key: str = "word") -> dict[str, Any]:
    """Every class in `namespace` that stands on `base` and has a word of its own, by that, as they were imported."""
    kinds = [kind for kind in namespace.values() if inspect.isclass(kind) and issubclass(kind, base)]
    return {vars(kind)[key]: kind for kind in kinds if key in vars(kind)}
