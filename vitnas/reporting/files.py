"""Read a run folder for its report: every file is optional; one that cannot be read is named, not fatal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.runs import read_json, read_jsonl

Record = Mapping[str, Any]

# The order in which models are shown; other roles follow by name.
ROLES = {"chosen": "chosen", "hand_scaled": "hand-scaled ViT", "random_search": "random search"}
# What proves that a folder belongs to a run: one of these is enough to make a report.
SIGNS = (
    "run.yaml",
    "manifest.json",
    "space.json",
    "feasibility.json",
    "metrics.jsonl",
    "search.json",
    "results.json",
)


@dataclass
class RunFiles:
    """What a run folder holds now. A document that is not there yet is an empty mapping or list."""

    folder: Path
    manifest: Record = field(default_factory=dict)
    space: Record = field(default_factory=dict)
    search: Record = field(default_factory=dict)
    correlation: Record = field(default_factory=dict)
    results: Record = field(default_factory=dict)
    sampler: Record = field(default_factory=dict)
    export: Record = field(default_factory=dict)
    feasibility: list[Record] = field(default_factory=list)
    family: list[Record] = field(default_factory=list)
    latency: list[Record] = field(default_factory=list)
    test_reads: list[Record] | None = None
    metrics: list[Record] = field(default_factory=list)
    models: dict[str, Record] = field(default_factory=dict)
    archs: dict[str, Arch] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def chosen_id(self) -> str:
        """The id of the chosen Arch, or "" while none is chosen."""
        found = (
            self.results.get("chosen")
            or self.search.get("chosen")
            or self.models.get("chosen", {}).get("arch_id")
        )
        if isinstance(found, Mapping):
            found = found.get("arch_id")
        return found if isinstance(found, str) else ""

    @property
    def chosen(self) -> Arch | None:
        """The chosen Arch, when its arch.json is in the folder."""
        return self.archs.get(self.chosen_id)


def read_run(folder: Path) -> RunFiles:
    """Read everything the report shows.

    Raises:
        UserError: `folder` is not a folder, or holds none of the files of a run.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; a report is made from a run folder. Give the folder of a run."
        )
    if not any((folder / name).exists() for name in SIGNS):
        raise UserError(
            f"{folder} holds no file of a run ({', '.join(SIGNS)}); a report needs at least one. "
            "Give the folder that `vitnas run` wrote."
        )
    run = RunFiles(folder)
    for name in ("manifest", "space", "search", "correlation", "results", "sampler"):
        setattr(run, name, _mapping(run, folder / f"{name}.json"))
    run.export = _mapping(run, folder / "export" / "export.json")
    run.feasibility = _records(run, folder / "feasibility.json")
    run.family = _records(run, folder / "family.json")
    run.latency = _records(run, folder / "export" / "latency.json")
    if (folder / "test_reads.json").exists():
        run.test_reads = _records(run, folder / "test_reads.json")
    run.metrics = _metrics(run, folder / "metrics.jsonl")
    found = {path.parent.name: _mapping(run, path) for path in sorted(folder.glob("models/*/result.json"))}
    run.models = {role: found[role] for role in sorted(found, key=_role_order)}
    _read_archs(run)
    return run


# Parts of a document that are walked through, so their kind is checked when read.
_KINDS: dict[str, type[Any]] = {
    "trials": list, "front": list, "objectives": list, "hypervolume": list, "rejections": dict,
    "rows": list, "points": list, "genes": list,
}  # fmt: skip
_OF_RECORDS = ("trials", "objectives", "rows", "points", "genes")


def _role_order(role: str) -> tuple[int, str]:
    known = list(ROLES)
    return (known.index(role) if role in known else len(known), role)


def _read_archs(run: RunFiles) -> None:
    paths: Iterable[Path] = [*run.folder.glob("front/*/arch.json"), *run.folder.glob("models/*/arch.json")]
    for path in paths:
        data = _mapping(run, path)
        if not data:
            continue
        try:
            arch = Arch.from_json(dict(data))
        except (ValueError, KeyError, TypeError) as error:
            run.problems.append(f"{path.relative_to(run.folder)} is not an Arch ({error}).")
            continue
        run.archs[arch.id] = arch


def _read(run: RunFiles, path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return read_json(path)
    except UserError as error:
        run.problems.append(str(error))
        return None


def _mapping(run: RunFiles, path: Path) -> Record:
    value = _read(run, path)
    if value is not None and not isinstance(value, dict):
        run.problems.append(f"{path.relative_to(run.folder)} holds a {type(value).__name__}, not an object.")
    if not isinstance(value, dict):
        return {}
    for key, kind in _KINDS.items():
        part = value.get(key)
        if part is not None and not isinstance(part, kind):
            name = path.relative_to(run.folder)
            run.problems.append(f"{name}: {key} is a {type(part).__name__}, not a {kind.__name__}; left out.")
            part = None
        if part is None:
            value.pop(key, None)
        elif key in _OF_RECORDS:
            value[key] = [item for item in list(part) if isinstance(item, dict)]
    return value


def _records(run: RunFiles, path: Path) -> list[Record]:
    """Read a list of records: bare, under "rows", or as an object from name to record."""
    value = _read(run, path)
    if isinstance(value, dict):
        named = [{"name": key, **item} for key, item in value.items() if isinstance(item, dict)]
        value = value.get("rows", named or [value])
    if value is None:
        return []
    if not isinstance(value, list):
        run.problems.append(
            f"{path.relative_to(run.folder)} holds a {type(value).__name__}, not a list of rows."
        )
        return []
    return [row for row in value if isinstance(row, dict)]


def _metrics(run: RunFiles, path: Path) -> list[Record]:
    try:
        lines = []
        for record in read_jsonl(path):
            lines.append(record)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        run.problems.append(f"metrics.jsonl cannot be read past line {len(lines)} ({error}).")
    return [line for line in lines if isinstance(line, dict)]


def stage_label(stage: str) -> str:
    """Return the words for a stage of metrics.jsonl: "retrain/hand_scaled" is "hand-scaled ViT"."""
    name = stage.partition("/")[2] or stage
    return ROLES.get(name, name)
