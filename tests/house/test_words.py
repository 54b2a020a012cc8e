"""What no file of the project may name, and the size that files and functions keep to."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# Written in pieces, so that this file does not name them either.
REGISTRIES = (
    "pypi" + ".org",
    "python" + "hosted.org",
    "registry." + "npmjs",
    "deb." + "debian",
    "download." + "pytorch",
)
MACHINE = re.compile(r"(^|[^A-Za-z0-9_.])/(wo" + r"rk|fa" + r"rm)/", re.MULTILINE)
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".j2", ".txt", ".cfg", ".csv", ".sh", ""}


def listed() -> list[Path]:
    """What is tracked, or would be: all but what git ignores."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(
            "NOT CHECKED: this is no git checkout, so the project's own files cannot be told from others."
        )
    return [REPO / name for name in done.stdout.split("\0") if name]


def files() -> list[Path]:
    """Those that are text."""
    return [path for path in listed() if path.is_file() and path.suffix in TEXT]


def offences(pattern: re.Pattern[str]) -> list[str]:
    found = []
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(REPO)}: {match.group()!r}" for match in pattern.finditer(text)]
    return found


def test_no_file_names_a_package_registry() -> None:
    assert not offences(re.compile("|".join(map(re.escape, REGISTRIES))))


def test_no_file_names_a_path_of_one_machine() -> None:
    assert not offences(MACHINE)


def test_no_lock_file_is_kept() -> None:
    assert not [path for path in listed() if path.name == "uv" + ".lock"]


def test_the_patterns_find_what_they_should() -> None:
    assert MACHINE.search("see /wo" + "rk/main")
    assert not MACHINE.search("a.com/wo" + "rk/x and frame" + "/wo" + "rks/")
    assert len(files()) > 50


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_start(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """First line behind the docstring."""
    return node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno


def test_files_and_functions_stay_small() -> None:
    long = []
    for path in sorted((REPO / "vitnas").rglob("*.py")):
        text = path.read_text()
        lines = len(text.splitlines())
        if lines > 500:
            long.append(f"{path.relative_to(REPO)} has {lines} lines")
        for node in functions(ast.parse(text)):
            length = (node.end_lineno or node.lineno) - code_start(node) + 1
            if length > 60:
                long.append(f"{path.relative_to(REPO)}: {node.name} has {length} lines")
    assert not long, "files keep to 500 lines and functions to 60:\n" + "\n".join(long)


def test_every_module_says_what_it_is() -> None:
    bare = [
        str(path.relative_to(REPO))
        for path in sorted((REPO / "vitnas").rglob("*.py"))
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not bare


def test_the_counts_in_papers_md_are_those_of_the_code() -> None:
    from vitnas.counting import count
    from vitnas.model import PUBLISHED

    text = " ".join((REPO / "PAPERS.md").read_text().split())
    archs = [PUBLISHED[f"autoformer_{size}"] for size in ("tiny", "small", "base")]
    for convention in ("plain", "dense_relative", "executed"):
        macs = " / ".join(f"{count(arch, convention=convention).macs / 1e9:.3f}" for arch in archs)
        assert f"`{convention}` {macs} G" in text, f"{convention}: {macs}"
    assert " / ".join(f"{count(arch).params / 1e6:.3f}" for arch in archs) + " M" in text
    resnas = [
        PUBLISHED[name]
        for name in ("vit_res_tiny", *(f"vit_resnas_{n}" for n in ("tiny", "small", "medium")))
    ]
    assert " / ".join(f"{count(arch).macs / 1e9:.4f}" for arch in resnas) + " G (ViT-Res-Tiny" in text
    assert " / ".join(f"{count(arch).params / 1e6:.3f}" for arch in resnas) + " M; the paper's" in text


def test_texts_name_their_encoding() -> None:
    """A system's own cannot say every class name."""
    bare = [
        f"{path.relative_to(REPO)}:{call.lineno}"
        for path in (REPO / "vitnas").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("read_text", "write_text")
        and "encoding" not in {word.arg for word in call.keywords}
    ]
    assert not bare
