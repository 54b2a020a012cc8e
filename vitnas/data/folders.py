"""Opening a folder: which of its folders are splits, which are classes, and which of its files are images."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from timm.utils.misc import natural_key

from vitnas.data.config import TEST_NAMES, TRAIN_NAMES, DataConfig
from vitnas.data.sources import NO_LABEL
from vitnas.data.splits import Opened, carve_test, find_holdout, find_test, note_test_name, said
from vitnas.errors import UserError

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
NAMED = 3  # files that a note names
COMPARED_BYTES = 1 << 30


class FileSource:
    """Image files below `root`; a relative path names each."""

    def __init__(
        self, root: Path, paths: Sequence[str], targets: Sequence[int], class_names: Sequence[str]
    ) -> None:
        self.root, self.paths = root, list(paths)
        self.targets, self.class_names = list(targets), tuple(class_names)

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
    root, notes = Path(text).expanduser(), list[str]()
    inside = sorted(e.name for e in root.iterdir() if e.is_dir() and not _left_by_a_system(e.name))
    listing = _listing(root, config, notes) if config.class_folders == "outside" else None
    if listing is not None:
        inside = sorted({parts[1] for parts in map(_parts, listing) if len(parts) > 2})
    splits = named_splits(inside)

    def source(split: str | None) -> FileSource | None:
        if split is None:
            return None
        if listing is None:
            return _folder_source(_undoubled(root / splits[split]), config, notes)
        kept = [path for path in listing if len(_parts(path)) > 2 and _parts(path)[1] == splits[split]]
        return _labelled(root, kept, config, notes)

    train_name = next((name for name in (config.train_split, *TRAIN_NAMES) if name in splits), None)
    train = source(train_name)
    if train is None or train_name is None:
        if odd := [name for name in TEST_NAMES if name in splits]:
            raise UserError(
                f"{text} has the folder {splits[odd[0]]!r} but no 'train'; both are needed. Add 'train'."
            )
        if listing is not None:
            raise UserError(
                f"class_folders is 'outside', but the class folders of {text} hold no folder 'train'; each needs its "
                "own. Leave class_folders out."
            )
        train, test_name = _folder_source(root, config, notes), None
        _refuse_inner_splits(train, text)
    else:
        test_name = find_test(config, list(splits))
    test = source(test_name)
    if test is None or test_name is None:
        said(notes := [*notes, *_copies({"train": train})])
        return carve_test(train, config, notes)
    others = [
        name for name in splits if splits[name] not in (splits.get(train_name or ""), splits[test_name])
    ]
    holdout = source(find_holdout(config, others, notes))
    notes += _copies({"train": train, "test": test} | ({} if holdout is None else {"holdout": holdout}))
    said(notes)
    return Opened(train=train, test=test, holdout=holdout, notes=(*note_test_name(config, test_name), *notes))


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
    """Notes on files of the same bytes in two splits, or in two classes. Only files of one size are compared, and none
    where that would be to read more than COMPARED_BYTES."""
    sizes: dict[int, list[_File]] = defaultdict(list)
    for split, source in sources.items():
        for path, target in zip(source.paths, source.targets, strict=True):
            with suppress(OSError):  # named as unreadable when everything is read
                label = source.class_names[target] if source.class_names else ""
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
