"""Opening a folder: which of its folders are splits, which are classes, and which of its files are images."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from timm.utils.misc import natural_key

from vitnas.data.config import TEST_NAMES, TRAIN_NAMES, DataConfig
from vitnas.data.sources import NO_LABEL, Target, numbers_in
from vitnas.data.splits import Opened, find_holdout, find_test, note_test_name, said
from vitnas.data.tables import read_table
from vitnas.errors import UserError, at_home

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
NAMED = 3  # files that a note names
COMPARED_BYTES = 1 << 30


class FileSource:
    """Image files below `root`; a relative path names each."""

    def __init__(
        self, root: Path, paths: Sequence[str], targets: Sequence[Target], class_names: Sequence[str]
    ) -> None:
        self.root, self.paths = root, list(paths)
        self.targets: list[Target] = list(targets)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> Image.Image:
        with Image.open(self.root / self.paths[index]) as opened:
            opened.load()
            return opened.copy()


def open_folder(config: DataConfig, text: str) -> Opened:
    """Open `train/` and `test/` (or `val/`) folders of class folders; or class folders alone, then test is carved. The
    same of images that lie in no class folder, which have no labels.

    Args:
        text: the folder, as it was given.

    Raises:
        UserError: no such folder, no images, or folders that can be read in more than one way.
    """
    root, notes = _unpacked(at_home(text)), list[str]()
    inside, pick = _parted(root, config, notes)
    splits = named_splits(inside)

    def source(split: str | None) -> FileSource | None:
        return None if split is None else pick(splits[split])

    train_name = next((name for name in (config.train_split, *TRAIN_NAMES) if name in splits), None)
    train = source(train_name)
    if train is None or train_name is None:
        if odd := [name for name in TEST_NAMES if name in splits]:
            raise UserError(
                f"{text} has the folder {splits[odd[0]]!r} but no 'train'; both are needed. Add 'train'."
            )
        for name, given, usual in (
            ("train_split", config.train_split, TRAIN_NAMES),
            ("test_split", config.test_split, TEST_NAMES),
        ):
            if given.partition("[")[0] not in usual:
                raise UserError(
                    f"{name} is {given!r}, and {text} has no such folder beside a train folder. Correct it, or "
                    "leave it out."
                )
        if config.class_folders == "outside" and not isinstance(config.labels, str):
            raise UserError(
                f"class_folders is 'outside', but the class folders of {text} hold no folder 'train'; each needs its "
                "own. Leave class_folders out."
            )
        train, test_name = pick(None), None
        if config.labels is True:
            _refuse_inner_splits(train, text)
    else:
        test_name = find_test(config, list(splits))
    test = source(test_name)
    taken = [splits.get(name or "") for name in (train_name, test_name)]
    others = [name for name in splits if train_name and splits[name] not in taken]
    holdout = source(find_holdout(config, others, notes)) if test_name or config.holdout in others else None
    found = {"train": train, "test": test, "holdout": holdout}
    notes += _copies({name: each for name, each in found.items() if each is not None})
    said(notes)
    if test is None or test_name is None:
        return Opened(train=train, test=train, holdout=holdout, notes=tuple(notes))
    return Opened(train=train, test=test, holdout=holdout, notes=(*note_test_name(config, test_name), *notes))


def _parted(
    root: Path, config: DataConfig, notes: list[str]
) -> tuple[list[str], Callable[[str | None], FileSource]]:
    """Names that may be those of splits, and what opens the images of one of them; None opens all."""
    if isinstance(config.labels, str):
        images = _listing(root, config, notes)
        read = read_table(config, root, images)
        notes += read.notes
        # Without a column that says splits, folders do, as far as the table names images of a train folder.
        split_of = dict(read.splits) or {image: _parts(image)[0] for image in read.targets}
        if not read.splits and not {*TRAIN_NAMES} & {*named_splits([*{*split_of.values()}])}:
            split_of = {}

        def labelled(split: str | None) -> FileSource:
            kept = [i for i in images if i in read.targets and (split is None or split_of.get(i) == split)]
            return FileSource(root, kept, [read.targets[image] for image in kept], read.class_names)

        return sorted({*split_of.values()}), labelled
    if config.class_folders == "outside":
        listing = _listing(root, config, notes)

        def outside(split: str | None) -> FileSource:
            kept = [path for path in listing if len(_parts(path)) > 2 and _parts(path)[1] == split]
            return _labelled(root, kept, config, notes)

        return sorted({parts[1] for parts in map(_parts, listing) if len(parts) > 2}), outside
    inside = sorted(e.name for e in root.iterdir() if e.is_dir() and not _left_by_a_system(e.name))
    return inside, lambda split: _folder_source(
        root if split is None else _undoubled(root / split), config, notes
    )


def named_splits(folders: Sequence[str]) -> dict[str, str]:
    """Folders by what they may be called: their own names, and the usual word for a split where a folder's name is that
    word but for capitals, or holds it where another holds a partner: `Train` and `Test`, `seg_train` and `seg_test`."""
    found = {name: name for name in folders}
    lower = {name.lower(): name for name in reversed(folders)}
    for train in TRAIN_NAMES:
        for name in folders:
            shape, times = re.subn(rf"(?<![a-z]){train}(?![a-z])", "{}", name.lower(), count=1)
            partners = {
                word: lower[partner]
                for word in TEST_NAMES
                if times and (partner := shape.replace("{}", word)) in lower
            }
            if partners:
                found = {train: name} | partners | found
    return found


def _undoubled(folder: Path) -> Path:
    """The folder of the same name inside, where there is nothing beside it and folders in it: archives are often packed
    so."""
    names = [name for name in os.listdir(folder) if not _left_by_a_system(name)]
    inner = folder / folder.name
    if names != [folder.name] or not inner.is_dir():
        return folder
    return inner if any(map(Path.is_dir, inner.iterdir())) else folder


def _unpacked(root: Path) -> Path:
    """The folder inside that holds the splits, or is of the same name, where there is nothing beside it."""
    names = [name for name in os.listdir(root) if not _left_by_a_system(name)]
    if len(names) != 1 or names[0].lower() in (*TRAIN_NAMES, *TEST_NAMES) or not (root / names[0]).is_dir():
        return root
    inner = root / names[0]
    found = named_splits([entry.name for entry in inner.iterdir() if entry.is_dir()])
    has_splits = bool({*TRAIN_NAMES} & {*found}) and bool({*TEST_NAMES} & {*found})
    return _unpacked(inner) if has_splits or _undoubled(root) == inner else root


def _folder_source(root: Path, config: DataConfig, notes: list[str]) -> FileSource:
    paths = _listing(root, config, notes)
    if not paths:
        raise UserError(
            f"{root} has no images ({' '.join(IMAGE_TYPES)}); it must hold one folder of images per class, or "
            "images without labels. Check the path."
        )
    if not config.labels or not any(map(os.path.dirname, paths)):
        return FileSource(root, paths, [NO_LABEL] * len(paths), ())
    return _labelled(root, paths, config, notes)


def _labelled(root: Path, paths: Sequence[str], config: DataConfig, notes: list[str]) -> FileSource:
    """Images with the classes that their folders say; a class whose folder is empty does not exist."""
    if beside := [path for path in paths if not os.path.dirname(path)]:
        notes.append(
            f"{_some(beside, 'image')} of {root} beside the class folders have no class and are left out."
        )
    kept = [path for path in paths if os.path.dirname(path)]
    level = -2 if config.class_folders == "leaf" else 0
    classes = [_parts(path)[level] for path in kept]
    names = sorted({*classes}, key=natural_key)
    deeper = [path for path in kept if len(_parts(path)) > 2]
    if deeper and config.class_folders == "top":
        notes.append(
            f"{_some(deeper, 'image')} of {root} in folders inside class folders are of the class of the folder at the "
            "top; class_folders=leaf takes the innermost."
        )
    number = {name: target for target, name in enumerate(names)}
    return FileSource(root, kept, [number[name] for name in classes], names)


def _refuse_inner_splits(train: FileSource, text: str) -> None:
    """Refuse class folders that all hold the same split folders, whose images would be pooled."""
    inner: dict[str, set[str]] = defaultdict(set)
    for parts in map(_parts, train.paths):
        inner[parts[0]].add(parts[1] if len(parts) > 2 else "")
    common = set.intersection(*inner.values())
    splits = named_splits(sorted(common))
    if train.class_names and {*TRAIN_NAMES} & {*splits} and {*TEST_NAMES} & {*splits}:
        raise UserError(
            f"Each class folder of {text} holds the split folders {', '.join(sorted(common))}; splits hold class "
            "folders by default. Use class_folders=outside."
        )


def _parts(path: str) -> tuple[str, ...]:
    return Path(path).parts


def _listing(root: Path, config: DataConfig, notes: list[str]) -> list[str]:
    """Paths of the image files below `root`, from there, in the order of names.

    A link to a folder is followed where it leads to one below `root` that is not listed itself, or with `follow_links`
    anywhere that does not hold `root`; no image is listed twice.
    """
    found, left, top = list[str](), Counter[str](), os.path.realpath(root)
    seen, starts = set[str](), [str(root)]
    while starts:
        start = starts.pop(0)
        real = os.path.realpath(start)
        is_inside = _holds(top, real) or config.follow_links
        if start != str(root) and (real in seen or _holds(real, top) or not is_inside):
            left["links to folders"] += 1
            continue
        for folder, folders, files in os.walk(start, onerror=_refuse_unreadable):
            seen.add(os.path.realpath(folder))
            folders[:] = sorted(name for name in folders if not _left_by_a_system(name))
            starts += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
            for name in files:
                if name.lower().endswith(IMAGE_TYPES) and not _left_by_a_system(name):
                    path = os.path.join(folder, name)
                    if _is_special(path):
                        left["pipes or devices"] += 1
                    else:
                        found.append(os.path.relpath(path, root))
    for what, count in left.items():
        remedy = " Copy them, or use follow_links=true." if "links" in what else ""
        notes.append(f"{count} {what} below {root} are left out.{remedy}")
    return sorted(found, key=natural_key)


def _holds(folder: str, other: str) -> bool:
    return f"{other}{os.sep}".startswith(f"{folder}{os.sep}")


def _is_special(path: str) -> bool:
    """Neither a file nor a broken link, which is named as unreadable later."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _refuse_unreadable(error: OSError) -> None:
    raise UserError(
        f"{error.filename} cannot be read ({error.strerror}); its images would be missing. Change its permissions."
    ) from error


def _left_by_a_system(name: str) -> bool:
    """Hidden files and folders, and what macOS packs beside the files of an archive: no images of a person's."""
    return name.startswith(".") or name == "__MACOSX"


def _copies(sources: dict[str, FileSource]) -> list[str]:
    """Notes on files of the same bytes in two splits, in two classes, or twice. Only files of one size are compared,
    and none where that would be to read more than COMPARED_BYTES."""
    sizes: dict[int, list[_File]] = defaultdict(list)
    for split, source in sources.items():
        for path, target in zip(source.paths, source.targets, strict=True):
            with suppress(OSError):  # named as unreadable when everything is read
                label = (
                    ", ".join(source.class_names[n] for n in numbers_in([target]))
                    if source.class_names
                    else ""
                )
                sizes[os.path.getsize(source.root / path)].append(_File(split, label, source.root / path))
    compared = {size: files for size, files in sizes.items() if len(files) > 1}
    if sum(size * len(files) for size, files in compared.items()) > COMPARED_BYTES:
        return []  # every command that opens them would wait
    alike: dict[bytes, list[_File]] = defaultdict(list)
    for files in compared.values():
        for file in files:
            with suppress(OSError), file.path.open("rb") as stream:
                alike[hashlib.file_digest(stream, "blake2b").digest()].append(file)
    notes = []
    for apart, what, remedy in (
        (
            "split",
            f"in more than one of {', '.join(sources)}",
            "Scores on them say too much; remove them from one.",
        ),
        ("label", "in more than one class", "Remove the wrong ones."),
    ):
        if found := [files for files in alike.values() if len({getattr(file, apart) for file in files}) > 1]:
            some = " and ".join(str(file.path) for file in found[0][:2])
            notes.append(f"{len(found)} images are {what}, by their bytes (such as {some}). {remedy}")
    if found := [
        files for files in alike.values() if len(files) > len({(file.split, file.label) for file in files})
    ]:
        some = " and ".join(str(file.path) for file in found[0][:2])
        notes.append(
            f"{len(found)} images are there more than once, by their bytes (such as {some}). Where a part of them is "
            "set apart, scores on it say too much; leave one of each."
        )
    return notes


@dataclass(frozen=True)
class _File:
    split: str
    label: str
    path: Path


def _some(names: Sequence[str], what: str) -> str:
    """A count with a few names."""
    shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"
