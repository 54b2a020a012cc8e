"""The files of a pretraining, and the looks at its features that its log has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vitnas.grids import ImageSize
from vitnas.runs import RunFile, from_json
from vitnas.train import metrics


@dataclass(frozen=True, kw_only=True)
class PretrainForecast(RunFile):
    """What a pretraining takes here, from steps that were really done, and what was made of the time given.

    Args:
        step_s, look_s: seconds of a training step, and of all looks at held-out images together.
        images: of the train split.
        asked: the epochs were asked for, so the time was not looked at.
        notes: what a person should know.
        disk_bytes, memory_bytes: that the run folder will take, and that the steps took at most.
    """

    FILE = "pretrain_forecast.json"
    COMMAND = "vitnas pretrain"

    time_s: float
    step_s: float
    look_s: float
    images: int
    batch_size: int
    steps_per_epoch: int
    epochs: float
    steps: int
    asked: bool
    notes: tuple[str, ...]
    disk_bytes: int = 0
    memory_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.steps * self.step_s + self.look_s


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a teacher's features of held-out images were worth on the way.

    Args:
        knn: accuracy of nearest neighbours on `n` images; None where there are no labels.
        rank: effective rank of the features.
        teacher_entropy, winner_entropy, center_norm: see `Vitals`.
    """

    knn: float | None
    n: int
    rank: float
    teacher_entropy: float
    winner_entropy: float
    center_norm: float

    @property
    def information(self) -> float:
        """See `Vitals`."""
        return self.winner_entropy - self.teacher_entropy


@dataclass(frozen=True, kw_only=True)
class Pretrained(RunFile):
    """What came of a pretraining: the averaged network, in models/chosen.

    Args:
        model: what learned, as it was typed; `network` in words.
        macs: None of networks that no Arch can say.
        first, last: looks before the first step (None: nobody looked), and at the end.
    """

    FILE = "pretrained.json"
    COMMAND = "vitnas pretrain"

    model: str
    network: str
    params: int
    macs: int | None
    image_size: ImageSize
    width: int
    images: int
    epochs: float
    steps: int
    seconds: float
    first: Look | None
    last: Look


def looks_of(lines: Iterable[metrics.Line]) -> Iterator[tuple[float, Look]]:
    """(epoch, look) of those that a training took."""
    for line in lines:
        if isinstance(line, metrics.Hooked) and line.event == "watch" and "n" in line.said:
            yield line.epoch, from_json(Look, {name: line.said[name] for name in Look.__dataclass_fields__})
