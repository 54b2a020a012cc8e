"""Labels from a table: a CSV or TSV file that says of each image which classes it has, and maybe its split."""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from timm.utils.misc import natural_key

from vitnas.data.config import TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES, DataConfig
from vitnas.data.sources import Numbers, Target
from vitnas.data.splits import listed
from vitnas.errors import UserError, at_home, nearest, unread

FILE_NAMES = (
    "file",
    "filename",
    "file_name",
    "image",
    "path",
    "img",
    "image_path",
    "filepath",
    "image_id",
    "id",
)
CLASS_NAMES = ("label", "labels", "class", "classes", "class_name", "category", "target", "tags")
NUMBER_NAMES = ("target", "value", "label", "score", "y")
SPLIT_NAMES = ("split", "subset", "set", "usage", "fold")
PARTS = "|;,"  # what may part several classes in one cell; else spaces do
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "")


@dataclass(frozen=True)
class Labelled:
    """The images that a table names, by their paths: their classes (or of numbers what they are of), their splits where
    it says some, and remarks."""

    targets: Mapping[str, Target]
    class_names: tuple[str, ...]
    splits: Mapping[str, str]
    notes: tuple[str, ...]


def read_table(config: DataConfig, root: Path, images: Sequence[str]) -> Labelled:
    """Read the table that `config.labels` names; its path is looked for below `root`, then from here.

    The first row names the columns unless it names an image. Images go by their path from `root`, or where that says
    one image alone by their name, with or without its ending.

    Args:
        images: paths below `root`.

    Raises:
        UserError: no such table, columns that cannot be told, no image that it names, an image of two classes where
            `config.label_kind` is "class", or, of numbers, a cell that is none or an image in two rows.
    """
    given = str(config.labels)
    path = next((p for p in (root / given, at_home(given)) if p.is_file()), None)
    if path is None:
        raise UserError(
            f"labels is {given!r}; it must be true, false, or a CSV or TSV file, in {root} or from here. Correct it."
        )
    header, rows = _rows(path)
    find = _Finder(images)
    if any(find(cell) for cell in header):
        header, rows = [str(number + 1) for number in range(len(header))], [header, *rows]
    if odd := [number for number, row in enumerate(rows, 2) if len(row) != len(header)]:
        raise UserError(
            f"Line {odd[0]} of {path} has {len(rows[odd[0] - 2])} cells and its first line {len(header)}; all must "
            "have as many. Mend it."
        )
    if twice := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{path} has two columns {twice[0]!r}; each needs a name of its own. Rename one.")
    columns = {name: [row[place].strip() for row in rows] for place, name in enumerate(header)}
    file_key = _column(config.input_key, "input_key", columns, FILE_NAMES, path) or _file_column(
        columns, find, path
    )
    split_key = _split_column(config, columns, path)
    rest = {name: cells for name, cells in columns.items() if name not in (file_key, split_key)}
    files, splits = columns[file_key], columns[split_key] if split_key else []
    if config.label_kind == "numbers":
        return _measured(path, find, files, _numbers(config, rest, path), splits)
    said = _classes(config, rest, path)
    return _labelled(config, path, find, files, said, splits)


def _labelled(
    config: DataConfig,
    path: Path,
    find: _Finder,
    files: Sequence[str],
    said: Sequence[tuple[str, ...]],
    splits: Sequence[str],
) -> Labelled:
    classes: dict[str, set[str]] = defaultdict(set)
    split_of: dict[str, str] = {}
    missing = []
    for row, (file, some) in enumerate(zip(files, said, strict=True)):
        image = find(file)
        if image is None:
            missing.append(file)
            continue
        classes[image].update(some)
        if splits:
            split_of[image] = splits[row]
        if config.label_kind == "class" and len(classes[image]) != 1:
            many = listed(classes[image]) or "none"
            raise UserError(
                f"{file!r} in {path} has the classes {many}; an image has one class. Mend the table, or use "
                "data.label_kind=classes for images of several."
            )
    names = sorted({name for some in classes.values() for name in some}, key=natural_key)
    number = {name: target for target, name in enumerate(names)}
    targets: dict[str, Target] = {}
    for image, named in classes.items():
        numbers = tuple(sorted(number[name] for name in named))
        targets[image] = numbers if config.label_kind == "classes" else numbers[0]
    return Labelled(targets, tuple(names), split_of, _notes(path, find, files, targets, missing))


def _measured(
    path: Path, find: _Finder, files: Sequence[str], said: Mapping[str, list[float]], splits: Sequence[str]
) -> Labelled:
    targets: dict[str, Target] = {}
    split_of: dict[str, str] = {}
    missing = []
    for row, (file, numbers) in enumerate(zip(files, zip(*said.values(), strict=True), strict=True)):
        image = find(file)
        if image is None:
            missing.append(file)
            continue
        if image in targets:
            raise UserError(
                f"{file!r} is in two rows of {path}; of numbers an image has one row. Remove one of them."
            )
        targets[image] = Numbers(numbers)
        if splits:
            split_of[image] = splits[row]
    return Labelled(targets, tuple(said), split_of, _notes(path, find, files, targets, missing))


def _notes(
    path: Path, find: _Finder, files: Sequence[str], targets: Mapping[str, Target], missing: Sequence[str]
) -> tuple[str, ...]:
    """What a person should know of the rows and images that go without each other."""
    if not targets:
        raise UserError(
            f"None of the {len(files)} images that {path} names is below the folder; cells are paths from there, "
            f"or names (the first is {files[0] if files else ''!r}). Correct data.dataset or the table."
        )
    notes = []
    if missing:
        notes.append(f"{len(missing)} images that {path} names are not there (such as {missing[0]!r}).")
    if others := find.count - len(targets):
        notes.append(f"{others} images that {path} does not name are left out.")
    return tuple(notes)


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """The first row, and the others that are not empty."""
    if path.suffix.lower() in (".xls", ".xlsx", ".ods", ".json", ".parquet"):
        raise UserError(
            f"{path} is a {path.suffix} file; a table of labels is a CSV or TSV file. Save it as one."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({unread(error)}); it must be a text file in UTF-8. Save it so."
        ) from error
    first = text.partition("\n")[0]
    mark = "\t" if path.suffix.lower() == ".tsv" else max("\t;,", key=first.count)
    rows = [row for row in csv.reader(text.splitlines(), delimiter=mark) if any(cell.strip() for cell in row)]
    if len(rows) == 1 and len(rows[0]) > 1:
        raise UserError(
            f"{path} has one row; below the names of its columns stands a row per image. Add them."
        )
    if len(rows) < 2 or len(rows[0]) < 2:
        raise UserError(
            f"{path} has {len(rows)} rows and {len(rows[0]) if rows else 0} columns; a table of labels has a column of "
            "images and one of classes, parted by commas, semicolons or tabs. Correct it."
        )
    return [cell.strip() for cell in rows[0]], rows[1:]


class _Finder:
    """Which image a cell means: a path, or a name that one image alone has, with or without its ending."""

    def __init__(self, images: Sequence[str]) -> None:
        self.count = len(images)
        self.paths = {PurePosixPath(Path(image)).as_posix(): image for image in images}
        self.short: dict[str, list[str]] = defaultdict(list)
        for path, image in self.paths.items():
            pure = PurePosixPath(path)
            for name in {pure.name, pure.stem, pure.with_suffix("").as_posix()}:
                self.short[name].append(image)

    def __call__(self, cell: str) -> str | None:
        text = re.sub(r"^\./", "", cell.strip().replace("\\", "/"))
        for name in (text, PurePosixPath(text).name):
            if name in self.paths:
                return self.paths[name]
            found = self.short.get(name, [])
            if len(found) > 1:
                raise UserError(
                    f"{cell!r} in the table of labels may be {found[0]} or {found[1]}; it must mean one image. Write "
                    "its path from the folder."
                )
            if found:
                return found[0]
        return None


def _column(
    asked: str | None, option: str, columns: Mapping[str, object], usual: Iterable[str], path: Path
) -> str | None:
    """The column that was asked for, or the first of a usual name."""
    if asked is not None:
        if asked not in columns:
            raise UserError(
                f"{option} is {asked!r}; {path} has the columns {', '.join(columns)}. Choose one of them."
                + nearest(asked, columns)
            )
        return asked
    lower = {name.lower().replace(" ", "_"): name for name in columns}
    return next((lower[name] for name in usual if name in lower), None)


def _file_column(columns: Mapping[str, Sequence[str]], find: _Finder, path: Path) -> str:
    for name, cells in columns.items():
        if any(find(cell) for cell in cells[:20]):
            return name
    raise UserError(
        f"No column of {path} names images below the folder; its columns are {', '.join(columns)}. Name it with "
        "data.input_key, or correct data.dataset."
    )


def _split_column(config: DataConfig, columns: Mapping[str, Sequence[str]], path: Path) -> str | None:
    """The column of splits; one that is not named by `config` must say some, train among them."""
    key = _column(config.split_key, "split_key", columns, SPLIT_NAMES, path)
    if not key or config.split_key is not None or _says_splits(columns[key]):
        return key
    if any(cell.lower() in (*TEST_NAMES, *VALIDATION_NAMES) for cell in columns[key]):
        raise UserError(
            f"{path} has the column {key!r} and no row of it says train (it says {listed({*columns[key]})}); some "
            "must. Write train for the images to learn from, or remove the column."
        )
    return None


def _says_splits(cells: Sequence[str]) -> bool:
    return any(cell.lower() in TRAIN_NAMES for cell in cells) and len({*cells}) <= len(TEST_NAMES) + 2


def _numbers(config: DataConfig, rest: Mapping[str, Sequence[str]], path: Path) -> dict[str, list[float]]:
    """The columns of numbers that are asked for: those named, or the one of a usual name, or the only one."""
    asked = (config.target_key,) if isinstance(config.target_key, str) else config.target_key or (None,)
    keys = [_column(name, "target_key", rest, NUMBER_NAMES, path) for name in asked]
    if keys == [None] and len(rest) == 1:
        keys = [*rest]
    found = {
        key: [_number(cell, key, row, path) for row, cell in enumerate(rest[key], 1)] for key in keys if key
    }
    if not found:
        raise UserError(
            f"Which columns of {path} have the numbers cannot be told from {', '.join(rest)}. Name one with "
            "data.target_key, or several as in data.target_key='[x,y]'."
        )
    return found


def _number(cell: str, key: str, row: int, path: Path) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"Row {row} of {path} has {cell!r} in {key!r}; every image needs a finite number there. Fill it in, or "
            "remove the row."
        )
    return value


def _classes(config: DataConfig, rest: Mapping[str, Sequence[str]], path: Path) -> list[tuple[str, ...]]:
    """The classes of each row: from one column, or from columns of 0 and 1 that are the classes."""
    assert not isinstance(config.target_key, tuple), "checked by DataConfig"
    key = _column(config.target_key, "target_key", rest, CLASS_NAMES, path)
    if key is None and len(rest) == 1:
        (key,) = rest
    if key is None:
        marked = {name: cells for name, cells in rest.items() if {c.lower() for c in cells} <= {*YES, *NO}}
        if len(marked) < 2:
            raise UserError(
                f"Which column of {path} has the classes cannot be told from {', '.join(rest)}. Name it with "
                "data.target_key."
            )
        rows = zip(*marked.values(), strict=True)
        return [tuple(n for n, cell in zip(marked, row, strict=True) if cell.lower() in YES) for row in rows]
    cells = rest[key]
    if config.label_kind == "class":
        if "" in cells:
            raise UserError(
                f"Row {cells.index('') + 1} of {path} has no {key!r}; every image needs a class. Fill it in, or remove "
                "the row."
            )
        if len({*cells}) > len(cells) / 2 and all(map(_is_fraction, cells)):
            raise UserError(
                f"The column {key!r} of {path} has {len({*cells})} numbers with fractions in {len(cells)} rows; each "
                "would be a class. Use data.label_kind=numbers, or name another column with data.target_key."
            )
        return [(cell,) for cell in cells]
    mark = next((mark for mark in PARTS if any(mark in cell for cell in cells)), None)
    return [tuple(part.strip() for part in cell.split(mark) if part.strip()) for cell in cells]


def _is_fraction(cell: str) -> bool:
    return re.fullmatch(r"[+-]?\d*\.\d+", cell) is not None
