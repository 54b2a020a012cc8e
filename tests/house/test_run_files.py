"""Files of a run folder are read and written as dataclasses; nothing else parses them."""

from __future__ import annotations

import ast
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
BARE = {"read_json", "write_json", "read_jsonl", "append_jsonl", "parse_json", "loads", "load"}

# What reads or writes JSON by hand, and why, as (file, what).
ALLOWED = {
    ("runs.py", "write_json"),  # where the dataclasses are read and written
    ("runs.py", "json.loads"),
    ("runs.py", "parse_json"),
    ("stages/table.py", "read_json"),  # whether a result that is there is damaged
    ("train/metrics.py", "read_jsonl"),  # the lines of metrics.jsonl, each as a dataclass
    ("train/metrics.py", "append_jsonl"),
    ("train/checkpoint.py", "parse_json"),  # a safetensors header, which is text
    ("train/checkpoint.py", "json.loads"),  # of what was written a line before
    ("searching/database.py", "parse_json"),  # attributes of trials, as Optuna writes them
    ("stages/lock.py", "parse_json"),  # of the open file, as closing it anywhere lets go of its lock
    ("exporting/timm_dir.py", "read_json"),  # timm's config.json
    ("exporting/card.py", "read_json"),  # the same
    ("exporting/script.py", "parse_json"),  # metadata of an ONNX file
    ("predicting/networks.py", "parse_json"),  # metadata of a file
    ("testing/space.py", "json.loads"),  # the contract of what a Space writes
    ("cli/swap.py", "write_json"),  # swap.json is for people; nothing reads it
    ("cli/tokens.py", "write_json"),  # tokens.json likewise
}


def calls(tree: ast.AST) -> set[str]:
    """What reads or writes JSON in a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in BARE - {"loads", "load"}:
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "json":
            found |= {f"json.{node.attr}"} if node.attr in BARE else set()
    return found


def test_run_files_are_dataclasses() -> None:
    package = REPO / "vitnas"
    found = {
        (path.relative_to(package).as_posix(), what)
        for path in sorted(package.rglob("*.py"))
        for what in calls(ast.parse(path.read_text()))
    }
    assert found <= ALLOWED, f"make it a RunFile: {sorted(found - ALLOWED)}"
    assert found == ALLOWED, f"no longer needed; take it out of ALLOWED: {sorted(ALLOWED - found)}"


def test_the_search_finds_what_it_should() -> None:
    assert calls(ast.parse("read_json(path)\njson.loads(text)\nRunFile.load(path)")) == {
        "read_json",
        "json.loads",
    }
