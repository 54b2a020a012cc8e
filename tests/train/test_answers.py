"""A teacher's answers that are kept: the same bits as without, whatever happens to the files; their size is said."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_help import Kill, Killed

from vitnas.data import Augment, Data, TrainBatches, synthetic
from vitnas.errors import UserError
from vitnas.model import Model, build
from vitnas.sample import Fixed, Sampler, Several
from vitnas.space import autoformer
from vitnas.supernet import Supernet
from vitnas.train import (
    Classification,
    Distillation,
    Features,
    Silent,
    Soft,
    StoredTeacher,
    Task,
    TeacherConfig,
    TrainConfig,
    fit,
)
from vitnas.train.answers import AnswerFile, packed, unpacked
from vitnas.train.task import At

SPACE = autoformer(
    "micro", image_size=8, patch_size=4, num_classes=6, embed_dims=(16, 32), depths=(1, 2), head_dim=8
)
DATA = synthetic(num_classes=6, image_size=8, n=44, seed=0)  # four batches of 8 an epoch
AUGMENT = Augment(shift=0.2, mixup=0.8, cutmix=1.0)
CONFIG = TrainConfig(epochs=3, lr=1e-2, warmup_epochs=0, monitor_every=0, checkpoint_minutes=0, drop_path=0.2)
BATCHES = 8  # two epochs' views of four


@dataclass
class Told(Silent):
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)


def weights(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 1) -> Model:
    return build(SPACE.largest(), generator=weights(seed))


def stored(folder: Path | None, seed: int = 1, top_k: int | None = 2) -> StoredTeacher:
    return StoredTeacher(network(seed), top_k=top_k, folder=folder)


def both() -> Task:
    losses: dict[str, tuple[Task, float]] = {"soft": (Soft(), 1.0), "features": (Features(), 1.0)}
    return Distillation(losses=losses, labels=Classification())


def train(
    teacher: StoredTeacher,
    *,
    data: Data = DATA,
    task: Task | None = None,
    student: nn.Module | None = None,
    sampler: Sampler | None = None,
    views: int | None = 2,
    config: TrainConfig = CONFIG,
    **options: Any,
) -> dict[str, Tensor]:
    """The weights that a student ends with."""
    fitted = fit(
        student or build(SPACE.smallest(), generator=weights(0)),
        task or both(),
        sampler or Fixed(),
        TrainBatches(data.train, AUGMENT, batch_size=8, seed=0, epoch_views=views),
        config=config,
        teacher=teacher,
        augment=AUGMENT,
        num_classes=6,
        **options,
    )
    return dict(fitted.network.state_dict())


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.fixture(scope="module")
def without() -> dict[str, Tensor]:
    return train(stored(None))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all answers."""
    folder = tmp_path_factory.mktemp("answers")
    teacher = stored(folder)
    train(teacher)
    assert (teacher.read, teacher.computed) == (4, BATCHES)
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copied"))


def test_bits_are_equal_with_and_without(without: dict[str, Tensor], tmp_path: Path) -> None:
    """While they are written, and when all are read."""
    for read in (4, 12):
        teacher = stored(tmp_path)
        assert_same(train(teacher), without)
        assert (teacher.read, teacher.computed) == (read, 12 - read)
    assert {path.name.rpartition("-")[0] for path in tmp_path.iterdir()} == {"logits", "tokens"}
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.slow
def test_more_epochs_views_find_those_that_are_there(copied: Path) -> None:
    teacher = stored(copied)
    assert_same(train(teacher, views=None), train(stored(None), views=None))
    assert (teacher.read, teacher.computed) == (8, 4)
    teacher = stored(copied)
    train(teacher, views=1)
    assert (teacher.read, teacher.computed) == (12, 0)


def test_a_student_of_another_shape_reads_them_too(written: Path) -> None:
    """Of the outputs that it wants, through another loss; several Archs of a Supernet share one."""
    teacher = stored(written)
    net = Supernet(SPACE, generator=weights(2))
    supernet = train(teacher, student=net, task=Soft(), sampler=Several(SPACE, 2))
    assert (teacher.read, teacher.computed) == (12, 0)
    net = Supernet(SPACE, generator=weights(2))
    assert_same(supernet, train(stored(None), student=net, task=Soft(), sampler=Several(SPACE, 2)))


def test_killed_and_resumed(without: dict[str, Tensor], tmp_path: Path) -> None:
    run, answers = tmp_path / "run", tmp_path / "answers"
    with pytest.raises(Killed):
        train(stored(answers), folder=run, hooks=[Kill(at=6)])
    teacher = stored(answers)
    assert_same(train(teacher, folder=run), without)
    assert (teacher.read, teacher.computed) == (4, 2)


@pytest.mark.slow
def test_begun_without_and_resumed_with(without: dict[str, Tensor], written: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(stored(None), folder=tmp_path, hooks=[Kill(at=6)])
    assert_same(train(stored(written), folder=tmp_path), without)


ROW = 64 + 128  # bytes of a record below: a header, and 5 x 10 numbers in half precision


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2 * ROW + 64 + 99] ^= 1
    path.write_bytes(content)


def torn(path: Path) -> None:
    """As where power fails before a page is on the disk."""
    content = path.read_bytes()
    path.write_bytes(content[: 2 * ROW + 64] + bytes(128) + content[3 * ROW :])


def without_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: 2 * ROW] + bytes(64) + content[2 * ROW + 64 :])


def swapped(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[ROW:] + content[:ROW])


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (flip, {2}),
        (torn, {2}),
        (without_header, {2}),
        (lambda path: os.truncate(path, 2 * ROW + 80), {2, 3}),
        (swapped, {0, 1, 2, 3}),
        (Path.unlink, {0, 1, 2, 3}),
        (lambda path: path.write_bytes(b"x" * 5000), {0, 1, 2, 3}),
    ],
)
def test_what_is_damaged_is_not_read(damage: Callable[[Path], None], lost: set[int], tmp_path: Path) -> None:
    answers = [packed(torch.full((5, 10), float(place))) for place in range(4)]  # one of zeros
    path, ats = tmp_path / "logits-0.bin", [At(place, 1000 + place) for place in range(4)]

    def opened() -> AnswerFile:
        file = AnswerFile(path, answers[0], 4)
        file.open()
        return file

    def there(file: AnswerFile) -> set[int]:
        found = [file.read(at) for at in ats]
        for place, parts in enumerate(found):
            assert parts is None or torch.equal(parts[0], answers[place][0])
        return {place for place, parts in enumerate(found) if parts is not None}

    file = opened()
    assert not there(file)
    for at, answer in zip(ats, answers, strict=True):
        file.write(at, answer)
    assert there(file) == {0, 1, 2, 3}
    assert file.read(At(1, 1002)) is None, "of other images"
    file.close()
    damage(path)
    file = opened()
    assert there(file) == {0, 1, 2, 3} - lost
    for place in lost:
        file.write(ats[place], answers[place])
    assert there(file) == {0, 1, 2, 3}
    path.unlink()
    with pytest.raises(OSError, match="deleted"):
        file.write(ats[0], answers[0])
    assert there(file) == {0, 1, 2, 3}
    file.close()


def test_a_damaged_answer_is_computed_again(without: dict[str, Tensor], copied: Path) -> None:
    path = next(copied.glob("logits-*"))
    content = bytearray(path.read_bytes())
    content[-1 - 60] ^= 1  # in the last record; numbers are filled up to 64 bytes
    path.write_bytes(content)
    teacher = stored(copied)
    assert_same(train(teacher), without)
    assert teacher.computed == 1
    assert path.read_bytes() != bytes(content), "mended"


def test_a_full_disk(without: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write = [0], os.pwrite

    def until_full(file: int, data: Any, at: int) -> int:
        written[0] += 1
        if written[0] > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:99], at)  # a part is written at a time

    monkeypatch.setattr(os, "pwrite", until_full)
    teacher, told = stored(tmp_path), Told()
    assert_same(train(teacher, progress=told), without)
    assert teacher.computed == 12
    assert not [*tmp_path.iterdir()], "they make room"
    assert told.notes[1:] == [
        f"the teacher's answers cannot be kept in {tmp_path} (No space left on device): they are deleted to make "
        "room, and computed from here on, with the same result"
    ]


def test_too_little_room_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written then."""
    # Logits: a header, 2 of 6 in half precision, 2 numbers, the rest; tokens: 8 x 5 x 32; each a multiple of 64 bytes.
    size = BATCHES * ((64 + 3 * 64) + (64 + 8 * 5 * 32 * 2))
    told = Told()
    train(stored(tmp_path / "new"), progress=told)
    took = f"{size / 1000:.2f}KB in {tmp_path / 'new'} ({size / BATCHES / 8:.0f}B an image: logits, tokens)"
    assert f"the teacher's answers take {took}; 0B are there" in told.notes[0]
    assert told.notes[1] == "of 12 answers of the teacher 4 were read"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size / 0.9 - 1))
    train(stored(tmp_path / "other"), progress=(told := Told()))
    assert f"would take {took.replace('/new', '/other')}, where" in told.notes[0]
    assert "a tenth stays so: they are computed. Fewer teacher.epoch_views" in told.notes[0]
    assert len(told.notes) == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_to(without: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_same(train(stored(tmp_path / "file" / "in"), progress=(told := Told())), without)
    assert "cannot be kept in" in told.notes[-1]
    assert "Not a directory" in told.notes[-1]


@pytest.mark.parametrize(
    "other",
    [
        {"teacher": lambda folder: stored(folder, seed=5)},
        *(
            pytest.param(other, marks=pytest.mark.slow)
            for other in (
                {"teacher": lambda folder: stored(folder, top_k=1)},
                {"data": synthetic(num_classes=6, image_size=8, n=44, seed=1)},
                {"seed": 1},
            )
        ),
    ],
    ids=["weights", "top_k", "images", "mixing"],
)
def test_answers_of_others_are_not_read(other: dict[str, Any], copied: Path) -> None:
    before = {path: path.read_bytes() for path in copied.iterdir()}
    make = other.pop("teacher", stored)
    teacher = make(copied)
    assert_same(train(teacher, **other), train(make(None), **other))
    assert teacher.computed == BATCHES
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_images_that_can_no_longer_be_read_are_not_answered_for(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch has the next image in its place then."""
    read = TrainBatches.at

    def replaced(batches: TrainBatches, place: int) -> Any:
        images, targets, bad = read(batches, place)
        if place == 5:
            images[3] = images[4]
        return images, targets, bad

    monkeypatch.setattr(TrainBatches, "at", replaced)
    teacher = stored(copied)
    assert_same(train(teacher), train(stored(None)))
    assert teacher.computed == 1


def test_who_cannot_keep_answers_is_refused(tmp_path: Path) -> None:
    loader = [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(UserError, match=r"the loader is a list, which does not say when a batch comes again"):
        fit(network(), Soft(), Fixed(), loader, config=CONFIG, teacher=stored(tmp_path))
    for name in ("epoch_views", "top_k"):
        with pytest.raises(UserError, match=f"teacher.{name} is 0; it must be at least 1"):
            TeacherConfig(network="x", **{name: 0})
    with pytest.raises(UserError, match=r"teacher\.network is not given"):
        TeacherConfig(cache=True)


def test_rounding_keeps_the_largest_and_the_probability_of_the_rest() -> None:
    logits_BY = torch.randn(5, 200, generator=weights(0)) * 4
    parts = packed(logits_BY, 7)
    assert [(part.dtype, part.shape[1]) for part in parts] == [
        (torch.float16, 7), (torch.int16, 7), (torch.float16, 1),
    ]  # fmt: skip
    found_BY = unpacked(parts, 200)
    top = logits_BY.topk(7).indices
    torch.testing.assert_close(
        found_BY.gather(1, top), logits_BY.half().float().gather(1, top), rtol=0, atol=0
    )
    others = torch.ones_like(logits_BY).scatter(1, top, 0).bool()
    assert (found_BY[others].view(5, -1).std(1) == 0).all()
    want, got = (x.softmax(1).where(others, 0.0).sum(1) for x in (logits_BY, found_BY))
    torch.testing.assert_close(got, want, rtol=5e-3, atol=0)
    assert packed(torch.randn(2, 40_000), 3)[1].dtype == torch.int32


def test_rounding_of_the_rest() -> None:
    output = torch.tensor([[1e6, -1e6, 1 / 3, 1e-9]])
    (kept,) = packed(output, 2)  # two and where they are take as much room as four
    torch.testing.assert_close(
        unpacked((kept,), 4), torch.tensor([[65504.0, -65504.0, 0.333251953125, 0.0]]), rtol=0, atol=0
    )
    assert packed(output.bfloat16())[0].dtype == torch.float16
    assert packed(torch.full((1, 1), torch.nan))[0].isnan().all(), "which the loop reports"
    places = torch.tensor([[70_000, -1]])
    assert torch.equal(unpacked(packed(places), 2), places)
