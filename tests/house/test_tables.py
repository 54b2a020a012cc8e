"""Tables are the only lists of their names: nothing else counts mixers, Spaces, Samplers, Searchers or Tasks up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitnas.mixers import MIXERS
from vitnas.sample import SAMPLERS
from vitnas.searching import SEARCHERS
from vitnas.space import SPACES
from vitnas.train import TASKS

REPO = Path(__file__).resolve().parents[2]
TABLES = {"mixers": MIXERS, "spaces": SPACES, "samplers": SAMPLERS, "searchers": SEARCHERS, "tasks": TASKS}
FIELDS = {
    "mixer": "mixers",
    "kind": "",
    "searcher": "searchers",
}  # attributes that hold a name, of any table if ""

# What names several by choice, with the reason; a new member changes none of them.
ALLOWED = {
    "model/vision_xformers_official.py": "biases that only the authors' Performer has",
    "recipes/transformer_ls.py": "the paper's mixers",
    "recipes/vision_xformers.py": "the paper's mixers",
    "space/mixers.py": "the mixers of the presets",
    "space/unified.py": "the mixers of the presets",
}
# Plain ViTs have softmax; what is said of them is not said of a list.
PLAIN = "softmax"


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where a module lists two names of one table, or compares one with a field."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict):
            parts = [*node.keys, *node.values] if isinstance(node, ast.Dict) else node.elts
            words = {
                part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)
            }
            for name, table in TABLES.items():
                if len(words & set(table)) > 1 and len(words & set(table)) * 2 > len(words):
                    yield node.lineno, f"lists {name}: {sorted(words & set(table))}"
        elif (
            isinstance(node, ast.Compare)
            and isinstance(node.left, ast.Attribute)
            and node.left.attr in FIELDS
        ):
            wanted = FIELDS[node.left.attr]
            for part in node.comparators:
                word = part.value if isinstance(part, ast.Constant) else None
                tables = [table for name, table in TABLES.items() if wanted in ("", name)]
                if word != PLAIN and any(word in table for table in tables):
                    yield node.lineno, f"compares .{node.left.attr} with {word!r}"


def test_nothing_but_the_tables_lists_their_names() -> None:
    found, used = [], set()
    for path in sorted((REPO / "vitnas").rglob("*.py")):
        name = str(path.relative_to(REPO / "vitnas"))
        for line, what in names_in(ast.parse(path.read_text())):
            if name in ALLOWED:
                used.add(name)
            else:
                found.append(f"{name}:{line} {what}")
    assert not found, "ask the kind instead, by a class variable or a method:\n" + "\n".join(found)
    assert used == set(ALLOWED), f"no longer needed: {sorted(set(ALLOWED) - used)}"


@pytest.mark.parametrize(
    "code",
    [
        'NEEDS = ("nystrom", "performer")',
        'x = {"softmax": 1, "fourier": 2}',
        'if run.sampler.kind == "focus": pass',
        'if config.kind in ("focus", "best_up"): pass',
        'if block.mixer != "fourier2d": pass',
        'if search.searcher == "sampler": pass',
    ],
)
def test_the_search_finds_what_it_should(code: str) -> None:
    assert list(names_in(ast.parse(code)))


@pytest.mark.parametrize("code", ['if block.mixer != "softmax": pass', 'x = ("softmax", "kernel", "other")'])
def test_the_search_leaves_the_rest_alone(code: str) -> None:
    assert not list(names_in(ast.parse(code)))


@pytest.mark.parametrize("name", TABLES)
def test_members_say_their_own_word_once(name: str) -> None:
    words = [vars(kind).get("word") or vars(kind)["kind"] for kind in TABLES[name].values()]
    assert words == list(TABLES[name])
