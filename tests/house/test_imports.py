"""Imports point one way, every module imports with the core dependencies, and deployment stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FLOW = """stopping version errors grids kinds layers mixers block arch budget runs model counting space
          supernet sample data train probing measure searching extraction slimming exporting predicting records
          reporting stages recipes testing cli""".split()

# What brings which optional module; these are hidden when the core is tried.
OPTIONAL = (
    "datasets",
    "webdataset",
    "optuna_dashboard",
    "openvino",
    "executorch",
    "psycopg",
    "tensorboard",
    "wandb",
    "pytest",
)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((REPO / "vitnas").rglob("*.py")):
        name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        yield name, path


def imported(path: Path) -> Iterator[str]:
    """Modules of vitnas that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} uses a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def stage(name: str) -> str | None:
    """`space` of `vitnas.space.autoformer`; None outside of vitnas and for what the package itself exports."""
    root, _, rest = name.partition(".")
    first = rest.partition(".")[0]
    return first if root == "vitnas" and first in FLOW else None


def test_the_flow_names_every_stage() -> None:
    found = {name.split(".")[1] for name, _ in modules() if "." in name}
    assert found - {"__main__"} == set(FLOW)


def test_imports_point_left() -> None:
    bad = []
    for name, path in modules():
        here = stage(name)
        for target in imported(path):
            there = stage(target)
            if here and there and FLOW.index(there) > FLOW.index(here):
                bad.append(f"{name} imports {target}")
    assert not bad, "later stages may import earlier ones, never the reverse:\n" + "\n".join(bad)


def test_the_package_is_imported_by_stage() -> None:
    """`from vitnas import x` inside the package would hide which stage is meant."""
    bad = [
        f"{name} imports {target}"
        for name, path in modules()
        for target in imported(path)
        if name != "vitnas" and target.startswith("vitnas.") and not stage(target)
    ]
    assert not bad, bad


def test_imports_run_in_no_circle() -> None:
    """Wherever in a file they stand: one that waits inside a function still makes two modules one."""
    paths = dict(modules())

    def module_of(target: str) -> str:
        return target if target in paths else target.rpartition(".")[0]

    graph = {
        name: {module_of(target) for target in imported(path)} & set(paths) - {name}
        for name, path in paths.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("these import each other: " + " <- ".join(error.args[1]))


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_module_imports_with_core_dependencies() -> None:
    """In one fresh process where optional packages are hidden; first the Model alone, which pulls in no search."""
    names = [name for name, _ in modules() if not name.endswith("__main__")]
    output = run(
        f"""
import importlib, sys
from importlib.machinery import PathFinder
class Hide(PathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        hidden = name.partition(".")[0] in {OPTIONAL!r}
        return None if hidden else PathFinder.find_spec(name, path, target)
sys.meta_path = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
import vitnas.model
print(sorted({{n.split(".")[1] for n in sys.modules if n.startswith("vitnas.")}}))
for name in {names!r}:
    importlib.import_module(name)
print("all", len({names!r}))
"""
    )
    light, everything = output.strip().splitlines()
    few = ["arch", "block", "errors", "grids", "kinds", "layers", "mixers", "model", "stopping", "version"]
    assert light == str(few)
    assert everything == f"all {len(names)}"


def test_optional_packages_are_not_core() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    core = {text.split(">")[0].split("[")[0].strip().replace("-", "_") for text in project["dependencies"]}
    assert not core & set(OPTIONAL)
    extras = " ".join(text for group in project["optional-dependencies"].values() for text in group)
    assert all(name.replace("_", "-") in extras for name in OPTIONAL)
