"""All that may go wrong, done on purpose: kills, signals, odd words, damaged files, hostile images, dying workers.

    python benchmarks/torture.py                        all of it, in two processes and less than half an hour
    python benchmarks/torture.py share=0.05             the same with a twentieth of the time
    python benchmarks/torture.py parts=kills,lines kills=40 lines=100 files=100 images=20 seed=7
    python benchmarks/torture.py parts=lines seed=7 only=31     one case again

A part ends with its number of cases or its time, and says which.

What must hold: a command ends with status 0, or with 2 and one sentence, or as its signal says; never with a traceback.
A run that was killed, as often as you like, ends with the bits of one that was not, in every file but for times. Every
part prints its seed, and every failure what brings it back. Full disks need a disk of their own, which
tests/stages/test_faults.py mounts.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from pretrain_help import pretrain_words  # noqa: E402
from slim_help import save, slim_words, trained  # noqa: E402
from stage_help import FIELDS, FOCUS, Warm, words  # noqa: E402

FAST: dict[str, str | None] = {"retrain__rank_archs": "0", "export__formats": "[]", "export__latency": "[]"}
MIXERS: dict[str, str | None] = {"space__kind": "mixers", "space__head_dim": None, "space__embed_dims": None,
          "space__num_heads": None, "space__depths": None, "budget": "", "retrain__baselines": "[]"}  # fmt: skip
SLIM = {
    "effort": "search",
    "supernet__epochs": "1",
    "retrain__train__epochs": "2",
    "retrain__train__lr": "1e-3",
}
HALVING = {
    "search__searcher": "halving",
    "search__num_trials": "3",
    "finals__epochs": "1",
    "retrain__baselines": "[random_search]",
}
DISTRUST = {"retrain__rank_archs": "5", "search__least_tau": "1", "retrain__baselines": "[]"}


def labelled(folder: Path, kind: str) -> dict[str, str | None]:
    """A run on images that may have several classes, or that are told numbers of; they are made once."""
    root, rng = folder / "labelled", np.random.default_rng(0)
    if not root.exists():
        rows = ["file,split,labels,shade,number"]
        for number in range(120):
            shade = 180 * (number % 2)
            picture(root / f"{number}.png", rng, shade)
            labels = "|".join(["light"] * (number % 2) + ["wide"] * (number // 2 % 2))
            rows.append(f"{number}.png,{'test' if number >= 100 else 'train'},{labels},{shade}.5,{number}")
        (root / "labels.csv").write_text("\n".join(rows))
    return {
        "data__dataset": str(root),
        "data__labels": "labels.csv",
        "data__label_kind": kind,
        "data__target_key": "[shade,number]" if kind == "numbers" else "labels",
        "data__max_images": None,
        "data__augment__mixup": None,
        "retrain__baselines": "[]",
    }


# By the kind of a run its command, given its folder and that of a trained network.
KINDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "search": lambda run, model: words(run, **FAST),
    "probe": lambda run, model: [
        "probe",
        str(model),
        f"folder={run}",
        "data.dataset=digits",
        "data.max_images=200",
    ],
    "halving": lambda run, model: words(run, **{**FAST, **HALVING}),
    "a ranking that is not trusted": lambda run, model: words(run, **{**FAST, **DISTRUST}),
    "folds": lambda run, model: words(run, **{**FAST, "search__folds": "2", "retrain__baselines": "[]"}),
    "several labels": lambda run, model: words(run, **{**FAST, **labelled(model.parent, "classes")}),
    "numbers": lambda run, model: words(run, **{**FAST, **labelled(model.parent, "numbers")}),
    "a sampler that learns": lambda run, model: words(run, **{**FAST, **FOCUS}),
    "mixers": lambda run, model: words(run, **{**FAST, **MIXERS}),
    "slim, folded": lambda run, model: slim_words(model, run),
    "slim, with a supernet": lambda run, model: slim_words(model, run, **SLIM),
    "pretrain": lambda run, model: pretrain_words(run),
    "pretrain a supernet": lambda run, model: pretrain_words(run, pretrain__model="supernet"),
}
# What a run says of the time and of itself. A trial that is run again has another number.
TIMES = {"seconds", "images_per_s", "latency_ms", "number", "ms", "test_readings"}
TIMED = {
    "manifest.json",
    "report.html",
    "test_reads.json",
    "forecast.json",
    "pretrain_forecast.json",
    "run.lock",
}
LONG_S = 60.0
MOST_ENDS = 14  # of one run, so that every kind has its turn
MOST_S = 1780.0  # of all


class Tally:
    """What was tried in a part, and what went wrong."""

    def __init__(self, name: str, seed: int, most_s: float) -> None:
        self.name, self.seed, self.tried, self.wrong = name, seed, 0, list[str]()
        self.begun, self.most_s, self.is_cut = time.monotonic(), most_s, False
        self.case, self.rng = -1, random.Random()
        self.only: int | None = None
        print(f"{name}: seed {seed}", flush=True)

    def next(self, count: int) -> bool:
        """Whether there is a further case, and time for it; it has random numbers of its own, so that it can be had
        again alone."""
        if self.only is not None:
            self.case, is_one = self.only, self.case < 0
        else:
            self.case, is_one = self.case + 1, self.tried < count
            self.is_cut = is_one and time.monotonic() - self.begun > self.most_s
        self.rng = random.Random(f"{self.name}/{self.seed}/{self.case}")
        return is_one and not self.is_cut

    def fail(self, text: str) -> None:
        """Note what went wrong, and tell it at once."""
        self.wrong.append(text)
        again = f"parts={self.name} seed={self.seed} only={self.case}"
        print(f"  WRONG ({again}): {text}", flush=True)

    def end(self) -> dict[str, object]:
        """One line of the result."""
        row = {"part": self.name, "seed": self.seed, "tried": self.tried, "wrong": len(self.wrong),
               "seconds": round(time.monotonic() - self.begun), "ended_by": "time" if self.is_cut else "number",
               "cases": self.wrong}  # fmt: skip
        print(json.dumps({name: value for name, value in row.items() if name != "cases"}), flush=True)
        return row


def said(warm: Warm) -> str:
    return warm.log.read_text(errors="replace")


def ended(warm: Warm, argv: list[str], number: int, wait_s: float) -> int:
    """Start a command and send it a signal after so long; returns its status."""
    end = time.monotonic() + wait_s
    return warm.end_when(argv, lambda: time.monotonic() > end, number)


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process, signal.SIGKILL)


def status_of(warm: Warm, argv: list[str]) -> int | None:
    """A command's status; None where it still ran after `LONG_S`, and was killed."""
    process = warm.start(argv)
    timer = threading.Timer(LONG_S, kill, (process,))
    timer.start()
    status = int(warm._line())
    timer.cancel()
    return None if status == -signal.SIGKILL else status


def is_right(warm: Warm, status: int | None) -> bool:
    """It ended by itself with 0, or with 2 and one sentence."""
    text = said(warm)
    return status in (0, None) or (status == 2 and "Traceback" not in text and text.count("vitnas: ") == 1)


def without_times(value: object) -> object:
    """JSON without what differs between two runs that do the same."""
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def left_by(run: Path) -> dict[str, object]:
    """All that a finished run leaves and a kill must not change, by file; what a killed write left beside is not."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if (
            path.is_dir()
            or path.name in TIMED
            or "/." in f"/{name}"
            or name.startswith(("checkpoints/", "study.db"))
        ):
            continue
        found[name] = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".yaml"):
            text = path.read_text().replace(str(run), "")
            lines = [text] if path.suffix == ".json" else text.splitlines()
            found[name] = (
                lines if path.suffix == ".yaml" else [without_times(json.loads(line)) for line in lines]
            )
    return found


def kills(warm: Warm, folder: Path, tally: Tally, count: int) -> None:
    """Runs of every kind, killed or asked to stop at random instants until they are done."""
    model = save(trained(epochs=3), folder / "model")
    wholes: dict[str, tuple[dict[str, object], float]] = {}
    while tally.next(count):
        kind = list(KINDS)[tally.case % len(KINDS)]
        if kind not in wholes:
            whole, begun = folder / f"whole {kind}" / "run", time.monotonic()  # named alike, as cards say so
            try:
                warm.run(KINDS[kind](whole, model))
            except AssertionError as error:
                tally.tried += 1
                tally.fail(f"{kind}, not killed at all: {str(error)[-300:]}")
                continue
            wholes[kind] = left_by(whole), time.monotonic() - begun
        run = folder / str(tally.case) / "run"
        want, length_s = wholes[kind]
        status, ends = 1, list[str]()
        while status != 0 and len(ends) < MOST_ENDS:
            number = tally.rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
            wait_s = tally.rng.uniform(0.05, length_s / 2)
            status = ended(warm, KINDS[kind](run, model), number, wait_s)
            ends.append(f"{number.name} after {wait_s:.3f} s")
            tally.tried += status != 0
            if status not in (0, -number, 128 + number) or "Traceback" in said(warm):
                tally.fail(f"{kind}, {ends}: status {status}: {said(warm)[-300:]}")
                break
        try:
            warm.run(KINDS[kind](run, model))
        except AssertionError as error:
            tally.fail(f"{kind}, {ends}: it does not go on: {str(error)[-300:]}")
            continue
        got = left_by(run)
        others = [name for name in sorted(got.keys() | want.keys()) if got.get(name) != want.get(name)]
        if others:
            kept = Path(tempfile.gettempdir()) / f"torture-kept-{tally.seed}-{tally.case}"
            shutil.copytree(run, kept / "killed", dirs_exist_ok=True)
            shutil.copytree(folder / f"whole {kind}" / "run", kept / "whole", dirs_exist_ok=True)
            tally.fail(f"{kind}, {ends}: {others} differ; both are in {kept}")
        shutil.rmtree(run.parent)


ODD = ["", "-1", "0", "nan", ".inf", "-.inf", "1e999", "²", "１", "null", "true", "[]", "[[]]", "{}", "{a: [}",
       "!!set {1}", "2020-01-01", "&a [*a]", "x" * 300, "\x00", "[/red]", "'", '"', "a=b", "9" * 30, "1__0", "../..",
       "/dev/null", "-", ":",
       "[1,2,3,4,5,6,7,8,9]", "%", "50%", "$(id)", "!!python/object/apply:os.system [id]", "\n", "\udcff"]  # fmt: skip


def lines(warm: Warm, folder: Path, tally: Tally, count: int) -> None:
    """Command lines with one or two odd words."""
    commands = ["run", "train", "search", "retrain", "export", "bench", "evaluate", "specialize", "report", "count",
                "show", "finetune", "slim", "pretrain", "swap", "tokens", "probe", "list", "doctor"]  # fmt: skip
    while tally.next(count):
        rng = tally.rng
        if rng.random() < 0.7:
            fields = dict(FIELDS)
            for name in rng.sample(
                [*fields, "seed", "data.dataset", "search.storage", "pretrained"], rng.choice([1, 1, 2])
            ):
                fields[name] = rng.choice(ODD)
            argv = ["run", "tour", f"folder={folder / 'fuzzed'}", *(f"{k}={v}" for k, v in fields.items())]
        else:
            argv = [rng.choice(commands), *(rng.choice(ODD) for _ in range(rng.randrange(3)))]
        argv = [word.replace("\x00", "") for word in argv]
        status = status_of(warm, argv)
        tally.tried += 1
        if not is_right(warm, status):
            tally.fail(f"{argv}: status {status}: {said(warm)[-300:]}")
        shutil.rmtree(folder / "fuzzed", ignore_errors=True)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file's bytes after something happened to them."""
    kind = rng.choice(["half", "empty", "flip", "garbage", "other json", "grown"])
    if kind == "half":
        return content[: rng.randrange(len(content) + 1)]
    if kind == "flip" and content:
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == "garbage":
        return rng.randbytes(200)
    if kind == "other json":
        return rng.choice(
            [b"{}", b"[]", b"null", b'{"a": 1}', b"1e999", b'"' + b"x" * 500 + b'"', b"[" * 2000]
        )
    return b"" if kind == "empty" else content + rng.randbytes(9)


def files(warm: Warm, folder: Path, tally: Tally, count: int) -> None:
    """Finished and unfinished runs with one damaged file, and every command that may read it."""
    whole = folder / "whole"
    warm.run(words(whole, **FAST))
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    while tally.next(count):
        run = folder / "damaged"
        shutil.copytree(whole, run)
        name = tally.rng.choice(names)
        (run / name).write_bytes(damaged((whole / name).read_bytes(), tally.rng))
        for later in tally.rng.sample(["search.json", "models", "results.json", "export", "finals.json"], 2):
            path = run / later
            if path.is_dir():
                shutil.rmtree(path)
            elif later != str(name):
                path.unlink(missing_ok=True)
        argv = tally.rng.choice(
            [words(run, **FAST), ["report", str(run)], ["evaluate", str(run)], ["search", str(run)]]
        )
        status = status_of(warm, argv)
        tally.tried += 1
        if not is_right(warm, status):
            tally.fail(f"{name} damaged, {argv[0]}: status {status}: {said(warm)[-300:]}")
        shutil.rmtree(run)


def picture(path: Path, rng: np.random.Generator, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((rng.integers(0, 60, (8, 8)) + shade).astype(np.uint8)).save(path)


def hostile(root: Path, rng: random.Random) -> str:
    """Do something to a folder of images; says what."""
    some = rng.choice(sorted(root.rglob("*.png")))
    acts: dict[str, Callable[[], object]] = {
        "cut": lambda: some.write_bytes(some.read_bytes()[: rng.randrange(60)]),
        "garbage": lambda: some.write_bytes(rng.randbytes(300)),
        "a bomb": lambda: Image.new("1", (9000, 9000)).save(some),
        "text": lambda: some.with_suffix(".txt").write_text("notes"),
        "a hostile name": lambda: some.rename(some.with_name("<script>[red]'\"$(id).png")),
        "an empty class": lambda: (some.parent.parent / "empty").mkdir(exist_ok=True),
        "a link to above": lambda: (some.parent / "again").symlink_to(root),
        "a link to nowhere": lambda: (some.parent / "gone.png").symlink_to("/nowhere"),
        "a pipe": lambda: os.mkfifo(some.parent / "pipe.png"),
        "four bands": lambda: Image.new("RGBA", (8, 8)).save(some),
        "sixteen bits": lambda: Image.fromarray(np.zeros((8, 8), np.uint16)).save(some),
        "one pixel": lambda: Image.new("L", (1, 1)).save(some),
        "a thin one": lambda: Image.new("L", (1, 3000)).save(some),
        "the class is a file": lambda: (some.parent.parent / "file.png").write_bytes(some.read_bytes()),
        "a deep folder": lambda: picture(
            some.parent / "a" / "b" / "c" / "x.png", np.random.default_rng(0), 9
        ),
    }
    name = rng.choice(list(acts))
    acts[name]()
    return name


def images(warm: Warm, folder: Path, tally: Tally, count: int) -> None:
    """Folders of images to which one to three things were done."""
    while tally.next(count):
        root, generator = folder / "pictures", np.random.default_rng(tally.case)
        for split, many in (("train", 20), ("test", 6)):
            for shade, name in ((0, "dark"), (180, "light")):
                for number in range(many):
                    picture(root / split / name / f"{number}.png", generator, shade)
        done = [hostile(root, tally.rng) for _ in range(tally.rng.choice([1, 2, 3]))]
        changes = {**FAST, "data__dataset": str(root), "data__max_images": "null", "retrain__baselines": "[]"}
        status = status_of(warm, words(folder / "run", **changes, search__num_trials="2"))
        tally.tried += 1
        if status is None or not is_right(warm, status):
            tally.fail(f"{done}: status {status}: {said(warm)[-300:]}")
        shutil.rmtree(root)
        shutil.rmtree(folder / "run", ignore_errors=True)


def workers(warm: Warm, folder: Path, tally: Tally, seconds: int) -> None:
    """Workers of one search that die."""
    seconds = max(10, min(seconds, int(tally.most_s / 2)))
    words_ = [sys.executable, "-W", "ignore", str(HERE / "workers.py"), "storage=sqlite", "workers=4"]
    words_ += [f"seconds={seconds}", "sleep=0.3", "kill_every=1", f"seed={tally.seed}"]
    done = subprocess.run(words_, capture_output=True, text=True, timeout=10 * seconds)
    tally.tried = seconds - 1
    print(done.stdout.strip())
    if done.returncode:
        tally.fail(done.stderr[-500:])


@dataclass(frozen=True)
class Part:
    """What is tried, how often, for how long at the most, and the promise that it is held against."""

    do: Callable[[Warm, Path, Tally, int], None]
    count: int
    most_s: float
    promise: str


PARTS = {
    "kills": Part(kills, 200, 1440, "a run killed at any moment ends with the bits of one that was not"),
    "workers": Part(workers, 60, 120, "no trial is lost or doubled, however many workers die"),
    "lines": Part(lines, 500, 500, "odd words are one sentence"),
    "files": Part(files, 500, 500, "damaged files are one sentence"),
    "images": Part(images, 100, 480, "hostile folders of images are one sentence, or are taken"),
}
HALVES = ("kills,workers", "lines,files,images")  # each in a process of its own


@contextmanager
def a_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        yield Path(name)


def one(name: str, given: dict[str, str], seed: int) -> dict[str, object]:
    """Do one part; what fails in the part itself is told as one more thing that went wrong."""
    part, tally = PARTS[name], Tally(name, seed, PARTS[name].most_s * float(given.get("share", "1")))
    tally.only = int(given["only"]) if "only" in given else None
    with (
        a_folder() as folder,
        contextlib.chdir(folder),
    ):  # an odd word may be a path, which is taken from here
        warm = Warm(folder / "log.txt")
        try:
            part.do(warm, folder, tally, int(given.get(name, str(part.count))))
        except Exception:
            tally.fail(f"the part ended: {traceback.format_exc()[-800:]}")
        finally:
            warm.close()
    return tally.end()


def told(rows: list[dict[str, object]]) -> int:
    """Print the table of promises; returns the status to end with."""
    print("\n| promise | tried | wrong | seconds | ended by | seed |\n|---|---|---|---|---|---|")
    for name, part in PARTS.items():
        for row in rows:
            if row["part"] == name:
                print(f"| {part.promise} ({name}) |", *(f"{row[key]} |" for key in
                      ("tried", "wrong", "seconds", "ended_by", "seed")))  # fmt: skip
    print(
        *(f"WRONG in {row['part']}: {case}" for row in rows for case in cast(list[str], row["cases"])),
        sep="\n",
    )
    return int(any(row["wrong"] for row in rows))


def main(given: dict[str, str]) -> int:
    """Do the parts that are asked for, or all, in two processes; returns the status to end with."""
    seed = int(given.get("seed", str(random.SystemRandom().randrange(10**6))))
    if "parts" in given:
        rows = []
        for name in given["parts"].split(","):
            rows.append(one(name, given, seed))
            if "rows" in given:
                Path(given["rows"]).write_text(json.dumps(rows))
        return 0 if "rows" in given else told(rows)
    with a_folder() as folder:
        others = [f"{name}={value}" for name, value in given.items() if name != "seed"]
        command = [sys.executable, __file__, *others, f"seed={seed}"]
        paths = [folder / f"{number}.json" for number in range(len(HALVES))]
        halves = [
            subprocess.Popen([*command, f"parts={parts}", f"rows={path}"])
            for parts, path in zip(HALVES, paths, strict=True)
        ]
        end = time.monotonic() + MOST_S
        hung = [parts for half, parts in zip(halves, HALVES, strict=True) if hangs(half, end)]
        status = told([row for path in paths if path.exists() for row in json.loads(path.read_text())])
    print(*(f"WRONG: {parts} did not end within {MOST_S:.0f} s" for parts in hung), sep="\n")
    return int(bool(status or hung or any(half.returncode for half in halves)))


def hangs(process: subprocess.Popen[bytes], end: float) -> bool:
    """Whether it still ran at `end`, and was killed."""
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(dict(word.split("=", 1) for word in sys.argv[1:])))
