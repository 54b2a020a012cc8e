"""A run folder is one run's: run.yaml says which, and the same run goes on in it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from vitnas.errors import UserError, unread
from vitnas.records import Allocation
from vitnas.runs import check_there, to_json
from vitnas.stages.context import Context
from vitnas.stages.lock import one_writer
from vitnas.stages.run import GROWS, KINDS, OPTIONAL, RESOLVED, Run, changes, in_words, plain, save_run
from vitnas.stages.slim.prepare import forget_budget
from vitnas.stages.table import go_on, plan_of
from vitnas.train import Progress


@contextmanager
def opened(run: Run, folder: Path, progress: Progress, *, joins: bool = False) -> Iterator[Any]:
    """The Context of a run and its folder, as its plan has it.

    Args:
        joins: work beside others, as in a search that is shared, instead of alone.

    Raises:
        UserError: another process writes to the folder.
    """
    context = plan_of(run).context(run, folder, progress)
    try:
        with settled(), nullcontext() if joins else alone(context):
            yield context
    finally:
        if "engine" in vars(context):  # an error before there is one needs none
            context.engine.close()


@contextmanager
def settled() -> Iterator[None]:
    """Set aside from the garbage collector what is imported by now, if nobody has done so: every training calls it
    (Accelerate's `free_memory`), and looking through these objects took longer than training a small Arch does."""
    mine = not gc.get_freeze_count()
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


@contextmanager
def alone(context: Context) -> Iterator[None]:
    """Let no other run into the folder; the first process sees to it."""
    with ExitStack() as held:
        context.engine.from_first(lambda: held.enter_context(one_writer(context.folder)))
        if context.engine.is_main:
            context.check_folder = check_there(context.folder)
        yield


def begin(context: Context) -> Any:
    """Check a run before its folder is claimed, so that what is wrong leaves none behind; then claim it.

    Returns:
        What the plan's `prepare` gives.

    Raises:
        UserError: what the plan's `prepare` refuses, or a folder that holds another run.
    """
    run, folder, prepare = context.asked, context.folder, plan_of(context.run).prepare
    with context.engine.together():
        table = prepare(context) if not (folder / "run.yaml").exists() else None
        context.engine.from_first(lambda: claim_folder(run, folder))
        claim_folder(run, folder)
        return table or prepare(context)


def go_through(context: Context) -> None:
    """All stages of a run, as a call of a library's user; trackers are flushed however it ends.

    Raises:
        UserError: see `begin`.
    """
    try:
        with settled(), alone(context):
            begin(context)
            for stage in plan_of(context.run).stages.values():
                stage(context)
    finally:
        context.engine.finish()


def claim_folder(run: Run, folder: Path) -> None:
    """Write run.yaml, or check that the folder's is the same run; where only what may grow has grown, let it go on. A
    slimming may have another budget until networks are searched for: so what none is found for is not stuck with it.

    Raises:
        UserError: the folder holds another run (each differing field is named), or cannot be written.
    """
    path, alone = folder / "run.yaml", bool(run.slim or run.pretrain)
    changed = changes(_filled(read_run(path), _usual(run)), plain(run)) if path.exists() else {}
    other = {name: pair for name, pair in changed.items() if not _may_change(run, folder, name, *pair)}
    if other:
        grow = ", ".join(GROWS)
        raise UserError(
            f"{folder} holds another run ({in_words(other)}). Repeat its command, or give another folder=PATH to do "
            f"all anew{'' if alone else f'; only {grow} may grow in a folder'}."
        )
    for name in changed:
        if run.slim:
            forget_budget(folder)
        else:
            go_on(run, folder, GROWS[name])
    if changed or not path.exists():
        save_run(run, path)


# What a run meant that was begun before there was a field, where that is not the field's default.
BEFORE = {"search": {"score": "accuracy"}}


def read_run(path: Path) -> dict[str, Any]:
    """A YAML file of fields; one that a run wrote, which has every field that there was, says what later ones meant.

    Raises:
        UserError: as `read_yaml`.
    """
    values = read_yaml(path)
    return _filled(values, BEFORE) if path.read_text(encoding="utf-8").startswith(RESOLVED) else values


def meant(folder: Path) -> dict[str, str]:
    """What a run in `folder` meant where there is a field now, by the field's name."""
    path = folder / "run.yaml"
    old, now = (read(path) if path.exists() else {} for read in (read_yaml, read_run))
    return {name: then for name, (_, then) in changes(old, now).items()}


def _usual(run: Run) -> dict[str, Any]:
    """Every field as it is by default, of such kinds."""
    usual = to_json(Run())
    for name in (*KINDS, *OPTIONAL):
        part, kind = getattr(run, name), {"kind": plain(run)[name]["kind"]} if name in KINDS else {}
        usual[name] = part and {**kind, **to_json(type(part)())}
    return dict(usual)


def _filled(old: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """`old` with what it lacks of `usual`."""
    both = {
        name for name in old.keys() & usual if isinstance(old[name], dict) and isinstance(usual[name], dict)
    }
    return {**usual, **old, **{name: _filled(old[name], usual[name]) for name in both}}


def _may_change(run: Run, folder: Path, name: str, old: Any, new: Any) -> bool:
    if run.slim:
        return name == "budget" and not Allocation.exists(folder)
    return name in GROWS and not run.pretrain and isinstance(old, int) and bool(new >= old)


class _Once(yaml.SafeLoader):
    """A loader that refuses a field that is written twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if key.value in seen and isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _unread(error: Exception) -> str:
    """Why, and in which line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {' '.join(str(error.problem).split())}"
    return unread(error)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with a mapping.

    Raises:
        UserError: unreadable or something else.
    """
    try:
        values = _Once(path.read_text(encoding="utf-8")).get_single_data()
        json.dumps(values, default=str)  # what holds itself ends here
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as YAML ({_unread(error)}). Mend the file.") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds no fields; a run is written as `field: value` lines. See any run.yaml."
        )
    return values
