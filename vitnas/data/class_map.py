"""Class maps: other names for classes, several of one name made one, others left out, all in an order of one's own."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from vitnas.data.sources import Source, Subset, numbers_in, renumbered
from vitnas.data.splits import Opened
from vitnas.errors import UserError, nearest, unread


def mapped(opened: Opened, path: Path) -> Opened:
    """The same images by the classes that a file of lines `class,name` gives (tabs part as well as commas); the numbers
    of classes follow its order. A line of one word keeps that name.

    Raises:
        UserError: images without labels, no such file, a line of more than two words, or a class that it does not name.
    """
    if not opened.train.class_names:
        raise UserError(f"class_map is {str(path)!r}, and these images have no labels to map. Leave it out.")
    wanted = _read(path)
    names = [name for name in dict.fromkeys(wanted.values()) if name]
    if len(names) < 2:
        raise UserError(f"{path} gives {len(names)} classes; at least 2 are needed. Name more.")
    holdout = opened.holdout and _mapped(opened.holdout, wanted, names, path)
    train, test = (_mapped(source, wanted, names, path) for source in (opened.train, opened.test))
    return replace(opened, train=train, test=test, holdout=holdout)


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"class_map is {str(path)!r}, which cannot be read ({unread(error)}); it must be a text file in "
            "UTF-8 of lines `class,name`. Correct it."
        ) from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        cells = [
            cell.strip()
            for row in csv.reader([line], delimiter="\t" if "\t" in line else ",")
            for cell in row
        ]
        if not any(cells):
            continue
        if len(cells) > 2 or not cells[0] or cells[0] in found:
            raise UserError(
                f"Line {number} of {path} is {line!r}; a line is a class and its name, each class once. Mend it."
            )
        found[cells[0]] = cells[-1]
    return found


def _mapped(source: Source, wanted: dict[str, str], names: list[str], path: Path) -> Source:
    lacking = [
        source.class_names[n]
        for n in sorted(numbers_in(source.targets))
        if source.class_names[n] not in wanted
    ]
    if lacking:
        raise UserError(
            f"{path} does not say what becomes of the class {lacking[0]!r}; every class needs a line, one without a "
            f"name where it is left out. Add {lacking[0]!r}.{nearest(lacking[0], wanted)}"
        )
    number = {name: target for target, name in enumerate(names)}
    numbers = [number.get(wanted.get(name, ""), -1) for name in source.class_names]
    kept = [
        row
        for row, target in enumerate(source.targets)
        if target == () or any(numbers[n] >= 0 for n in numbers_in([target]))
    ]
    part = Subset(source, kept)
    part.targets = [
        tuple(n for n in target if n >= 0) if isinstance(target, tuple) else target
        for target in renumbered(part.targets, numbers)
    ]
    part.class_names = tuple(names)
    return part
