"""A network held against labels: by class or by number, and where it is wrong.

Legend: N images, Y classes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from vitnas.data import EvalBatches, Images, require_labels
from vitnas.data.sources import to_pil
from vitnas.errors import UserError, nearest
from vitnas.model.modes import evaluating
from vitnas.model.scale import Scale, explained
from vitnas.runs import RunFile
from vitnas.train import Score
from vitnas.train.evaluate import evaluate_each

MISTAKES, SIDE = 12, 128  # shown, and pixels of a picture's longer side


@dataclass(frozen=True)
class ClassScore:
    """One class: `n` images are of it, `said` were taken for it, `right` both."""

    name: str
    n: int
    said: int
    right: int

    @property
    def recall(self) -> float | None:
        """Share of its images that are found."""
        return self.right / self.n if self.n else None

    @property
    def precision(self) -> float | None:
        """Share of what is taken for it that is of it."""
        return self.right / self.said if self.said else None


@dataclass(frozen=True, kw_only=True)
class NumberScore:
    """One number that is told: how much of its variance is explained, and in units of its own the mean absolute error,
    and what that would be by always saying the mean of these images."""

    name: str
    r2: float
    mae: float
    mae_of_mean: float


@dataclass(frozen=True)
class Confusion:
    """So many images of the class `true` were taken for `said`."""

    true: str
    said: str
    count: int


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for another class, and how sure that was; or whose numbers are far off, and then 0."""

    name: str
    true: str
    said: str
    probability: float
    jpeg: str  # base64


@dataclass(frozen=True, kw_only=True)
class Evaluation(RunFile):
    """A network on images with labels; of images that may have several classes there is the Score alone.

    Args:
        confusions: most frequent first.
        mistakes: the surest ones; of numbers the largest.
    """

    FILE = "evaluation.json"
    COMMAND = "vitnas evaluate"

    model: str
    dataset: str
    split: str
    score: Score
    classes: tuple[ClassScore, ...] = ()
    numbers: tuple[NumberScore, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    notes: tuple[str, ...] = ()


Answered: TypeAlias = list[tuple[Tensor, Tensor]]


def answers(network: nn.Module, batches: EvalBatches) -> Answered:
    """(B, Y) float32 logits of `network` for every batch, with its targets, on the CPU.

    Raises:
        UserError: images without labels.
    """
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    require_labels(batches.images.targets, "accuracy")
    with evaluating(network), torch.no_grad():
        return [(network(some.to(device)).float().cpu(), targets) for some, targets in batches]


def examine(answered: Answered, images: Images, *, model: str, dataset: str) -> Evaluation:
    """Hold answers against the labels of `images`, whose classes are those of the network, in its order."""
    score = evaluate_each(nn.Identity(), answered, device="cpu", scale=images.scale)[0]
    found = Evaluation(model=model, dataset=dataset, split=images.split, score=score)
    if images.several:
        return found
    if images.scale is not None:
        return _of_numbers(found, answered, images, images.scale)
    logits_NY, target_N = (torch.cat(parts) for parts in zip(*answered, strict=True))
    sure_N, said_N = logits_NY.softmax(1).max(1)
    counts_YY = torch.zeros(len(images.class_names), logits_NY.shape[1], dtype=torch.int64)
    counts_YY.index_put_((target_N, said_N), torch.ones_like(target_N), accumulate=True)
    return replace(
        found,
        classes=tuple(_by_class(counts_YY, images.class_names)),
        confusions=tuple(_confusions(counts_YY, images.class_names)),
        mistakes=tuple(_mistakes(images, target_N, said_N, sure_N)) if len(target_N) == len(images) else (),
    )


def _of_numbers(found: Evaluation, answered: Answered, images: Images, scale: Scale) -> Evaluation:
    told_NT, numbers_NT = (torch.cat(parts) for parts in zip(*answered, strict=True))
    names, columns = images.class_names, zip(told_NT.split(1, 1), numbers_NT.split(1, 1), strict=True)
    explained_NT = torch.stack([explained(told_N1, numbers_N1) for told_N1, numbers_N1 in columns], 1)
    of_mean_T = (numbers_NT - numbers_NT.mean(0)).abs().mean(0) * torch.tensor(scale.std)
    rows = zip(names, explained_NT.mean(0).tolist(), found.score.mae, of_mean_T.tolist(), strict=True)
    numbers = tuple(NumberScore(name=name, r2=r2, mae=mae, mae_of_mean=mean) for name, r2, mae, mean in rows)
    mistakes = []
    worst = explained_NT.mean(1).argsort(stable=True).tolist() if len(told_NT) == len(images) else []
    for place in worst[:MISTAKES]:
        if (pixels := images.read(place)) is not None:
            true, said = (_in_words(names, scale.restored(each[place])) for each in (numbers_NT, told_NT))
            mistakes.append(Mistake(images.name(place), true, said, 0.0, _jpeg(to_pil(pixels))))
    return replace(found, numbers=numbers, mistakes=tuple(mistakes))


def _in_words(names: Sequence[str], numbers_T: Tensor) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in zip(names, numbers_T.tolist(), strict=True))


def _by_class(counts_YY: Tensor, names: Sequence[str]) -> Iterable[ClassScore]:
    said_Y = counts_YY.sum(0).tolist()
    for number, (name, row) in enumerate(zip(names, counts_YY.tolist(), strict=True)):
        yield ClassScore(name, sum(row), said_Y[number], row[number])


def _confusions(counts_YY: Tensor, names: Sequence[str]) -> list[Confusion]:
    wrong = counts_YY.clone().fill_diagonal_(0)
    found = [Confusion(names[i], names[j], int(wrong[i, j])) for i, j in wrong.nonzero().tolist()]
    return sorted(found, key=lambda each: (-each.count, each.true, each.said))


def _mistakes(images: Images, target_N: Tensor, said_N: Tensor, sure_N: Tensor) -> Iterable[Mistake]:
    """The surest mistakes, not more than two of a kind."""
    kinds: dict[tuple[int, int], int] = {}
    shown = 0
    for place in sure_N.argsort(descending=True, stable=True).tolist():
        kind = int(target_N[place]), int(said_N[place])
        if kind[0] == kind[1] or kinds.get(kind, 0) == 2:
            continue
        if shown == MISTAKES:
            return
        pixels = images.read(place)
        if pixels is None:
            continue
        kinds[kind], shown = kinds.get(kind, 0) + 1, shown + 1
        true, said = (images.class_names[number] for number in kind)
        yield Mistake(images.name(place), true, said, round(float(sure_N[place]), 4), _jpeg(to_pil(pixels)))


def _jpeg(picture: Image.Image) -> str:
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()


def matched_classes(own: Sequence[str], given: Sequence[str], num_classes: int) -> list[int] | None:
    """For each class of the images its number in the network, by name; None where both have the same order.

    Raises:
        UserError: the images have a class that the network has not, or, of a network that does not name its classes,
            another number of them.
    """
    if not own:
        if len(given) != num_classes:
            raise UserError(
                f"the images have {len(given)} classes and MODEL {num_classes}, which it does not name; they must be "
                "the same, in order. Give images of its classes."
            )
        return None
    if missing := [name for name in given if name not in own]:
        raise UserError(
            f"the images have the class {missing[0]!r}, which MODEL does not know (it knows {len(own)}, such as "
            f"{', '.join(own[:3])}). Rename or remove its folder.{nearest(missing[0], own)}"
        )
    numbers = [list(own).index(name) for name in given]
    return None if numbers == list(range(num_classes)) else numbers
