"""From words on the command line to a Run: a recipe or a YAML file, then `field=value` overrides."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from vitnas.cli.options import parsed
from vitnas.data import AUGMENTS
from vitnas.data.glance import glance
from vitnas.errors import UserError, check_word, nearest
from vitnas.recipes import LIKE, RECIPES
from vitnas.runs import to_json
from vitnas.stages.claim import read_run
from vitnas.stages.run import KINDS, OPTIONAL, SHORT, Run, field_names, plain


def split_budgets(text: str) -> list[str]:
    """The budgets of a list in brackets, or the one. Only a comma before another limit parts two: a latency's target
    has commas of its own (`latency<=8ms@onnxruntime,batch=1`).

    Raises:
        UserError: a list that does not end, or an empty one.
    """
    text = text.strip()
    if not text.startswith("["):
        return [text]
    if not text.endswith("]"):
        raise UserError(f"the list of budgets {text!r} does not end; it must end with ']'. Add it.")
    budgets: list[str] = []
    for piece in filter(str.strip, text[1:-1].split(",")):
        if budgets and not re.search(r"[<>≤≥]|\bin\b", piece):
            budgets[-1] += "," + piece.rstrip()
        else:
            budgets.append(piece.strip())
    if not budgets:
        raise UserError(
            f"the list of budgets {text!r} is empty; give at least one, for example '[macs<=1M]'."
        )
    return budgets


def make_run(name: str, pairs: Mapping[str, str]) -> Run:
    """The Run of a recipe or a YAML file, with overrides.

    Raises:
        UserError: unknown recipe, file or field (the nearest is named), a field of another kind than the run's, or a
            value of the wrong type.
    """
    known = field_names()
    for short, field in SHORT.items():
        if short in pairs and field in pairs:
            raise UserError(f"{short} and {field} are both given; the first is short for it. Leave one out.")
    pairs = in_full(pairs, known, "RECIPE")
    base, values = _base(name, known)
    if base["recipe"] in LIKE and not {item.name for item in fields(Run)} <= {
        *values
    }:  # that a run folder has
        # Which space there is follows from what is asked, so fields of one are looked at after that.
        asked = _resolved(
            base, {field: text for field, text in pairs.items() if field[:6] != "space."}, known
        )
        seen, given = glance(asked.data), "time" in pairs or "time" in values
        fitted = LIKE[asked.recipe](seen, asked, asked.seconds if given else None) if seen else None
        base, _ = _base(name, known, fitted)
    return _resolved(base, pairs, known)


def _resolved(base: dict[str, Any], pairs: Mapping[str, str], known: Mapping[str, set[str]]) -> Run:
    for field in pairs:
        group = field.partition(".")[0]
        if group in OPTIONAL and group != field and base[group] is None:
            raise UserError(
                f"{field} belongs to the recipe {group}; this run is of {base['recipe']}. Leave it out."
            )
    if any(field.startswith("data.augment.") for field in pairs) and isinstance(base["data"]["augment"], str):
        named = base["data"]["augment"]
        if named not in AUGMENTS:
            raise UserError(
                f"data.augment is {named!r}, which the images decide; its fields cannot be set one by one. "
                "Write them all in a YAML file, or choose a recipe that spells them out."
            )
        base["data"]["augment"] = to_json(AUGMENTS[named])
    for group in KINDS:
        _choose(base, group, pairs.get(f"{group}.kind", base[group]["kind"]))
    texts = {**dict(_leaves(base)), **pairs}
    kinds = {group: texts.pop(f"{group}.kind") for group in KINDS}
    for field in texts:
        group = field.partition(".")[0]
        if field not in known:
            inside = field.rpartition(".")[0]
            raise UserError(
                f"{inside} has the field {field!r}; it is a value, and has none. Write one value there."
            )
        if known[field] and kinds[group] not in known[field]:
            raise UserError(
                f"{field} belongs to {group}.kind {' and '.join(sorted(known[field]))}, but {group}.kind is "
                f"{kinds[group]!r}. Set {group}.kind, or leave it out."
            )
    types = {**get_type_hints(Run), **{group: KINDS[group][kind] for group, kind in kinds.items()}}
    # Then each of its fields is told of by its own name.
    types |= {group: kind for group, kind in OPTIONAL.items() if base[group] is not None}
    return Run(**parsed(types, (f"{field}={text}" for field, text in texts.items())))


def in_full(
    pairs: Mapping[str, str], known: Collection[str], recipe: str, short: Mapping[str, str] = SHORT
) -> dict[str, str]:
    """Fields by their whole names: `dataset` is `data.dataset`, as no other ends so.

    Args:
        recipe: what `vitnas show` is told to be given.
        short: further names, and what for.

    Raises:
        UserError: an unknown name (the nearest is told), one that several fields end in, or a field given twice.
    """
    found: dict[str, str] = {}
    for name, text in pairs.items():
        full = short.get(name, name)
        if full not in known:
            ends = [field for field in known if field.endswith(f".{name}")]
            if len(ends) > 1:
                raise UserError(
                    f"{name} may be {', '.join(ends[:-1])} or {ends[-1]}; a field is named in full. Write one of them."
                )
            if not ends:
                raise UserError(
                    f"there is no field {name!r}.{nearest(name, [*short, *known])} `vitnas show {recipe}` lists them "
                    "all."
                )
            full = ends[0]
        if full in found:
            raise UserError(f"{full} is given twice, once in short. Leave one out.")
        found[full] = text
    return found


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted fields and their values as texts."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif not isinstance(value, dict):
            # YAML knows dates and sets, which no field takes.
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def _choose(base: dict[str, Any], group: str, kind: Any) -> None:
    """Make `group` of that kind; fields of another kind that the recipe chose are gone."""
    check_word(f"{group}.kind", kind, KINDS[group])
    if base[group]["kind"] != kind:
        base[group] = {"kind": kind}


def _base(
    name: str, known: Collection[str], fitted: Run | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a recipe, with those of a YAML file in their places, and what that file says.

    Args:
        fitted: in place of the recipe.
    """
    if name in RECIPES:
        return plain(fitted or RECIPES[name]()), {}
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{name!r} is no recipe; recipes are {', '.join(RECIPES)}.{nearest(name, RECIPES)}")
    if not path.exists():
        raise UserError(f"{path} does not exist; give a recipe ({', '.join(RECIPES)}) or a YAML file.")
    values = read_run(path)
    recipe = values.get("recipe", "tour")
    check_word(f"{path}: recipe", recipe, RECIPES)
    base = plain(fitted or RECIPES[recipe]())
    for group in KINDS:
        given = values.get(group, {})
        if not isinstance(given, dict):
            raise UserError(
                f"{path}: {group} is {given!r}; it must be fields, of which kind is one of {', '.join(KINDS[group])}. "
                "Indent them below it."
            )
        if "kind" in given:
            _choose(base, group, given["kind"])
    _merge(base, values, known, path)
    return base, values


def _merge(
    base: dict[str, Any], values: dict[str, Any], known: Collection[str], path: Path, prefix: str = ""
) -> None:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name not in known:
            raise UserError(f"{path} has an unknown field {name!r}.{nearest(name, known)}")
        if name in SHORT and not isinstance(value, dict):
            value = {SHORT[name].rpartition(".")[2]: value}
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value, known, path, f"{name}.")
        else:
            base[key] = value


def open_run(folder: Path, pairs: Mapping[str, str] | None = None) -> Run:
    """The Run of a run folder, with overrides.

    Raises:
        UserError: no such folder, no run.yaml, or one that cannot be read; as in `make_run`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the run folder that `vitnas run` made.")
    if not (folder / "run.yaml").exists():
        raise UserError(f"{folder} has no run.yaml, so it is no run folder; give one that `vitnas run` made.")
    return make_run(str(folder / "run.yaml"), pairs or {})
