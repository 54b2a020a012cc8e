"""Accuracy of a network, or of one Arch of a Supernet; of numbers how much of their variance it explains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.data import are_numbers, has_one_class, require_labels
from vitnas.errors import UserError
from vitnas.model.modes import evaluating
from vitnas.model.scale import Scale, explained


@dataclass(frozen=True, kw_only=True)
class Score:
    """Top-1 and top-5 accuracy in [0, 1], mean cross-entropy, and the number of images they are of; `balanced` is the
    mean over classes of the accuracy on each one's images, which guessing the largest class does not raise, `loss_odd`
    the loss on every second image, by which losses on the same images can be told from luck.

    Of numbers the accuracy is R^2 (1: all of their variance is explained, 0: none, as by always saying the mean), the
    mean over them; `error` its standard error, which says that it is; `mae` mean absolute errors, in units of theirs;
    the loss the mean squared error, standardised.
    """

    accuracy: float
    top5: float | None
    loss: float
    n: int
    balanced: float | None = None
    loss_odd: float | None = None
    error: float | None = None
    mae: tuple[float, ...] = ()

    @property
    def values(self) -> dict[str, float]:
        """What a search keeps of it, by name."""
        found = {"accuracy": self.accuracy, "loss": self.loss, "loss_odd": self.loss_odd, "error": self.error}
        return {name: value for name, value in found.items() if value is not None}


def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    arch: Arch | None = None,
    *,
    device: torch.device | str | None = None,
) -> Score:
    """See `evaluate_each`, without the single images."""
    return evaluate_each(network, batches, arch, device=device)[0]


@torch.no_grad()
def evaluate_each(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    arch: Arch | None = None,
    *,
    device: torch.device | str | None = None,
    scale: Scale | None = None,
) -> tuple[Score, Tensor]:
    """Score `network` (as `arch`) on all `batches`, in evaluation mode; the training mode is restored.

    Where a Supernet has several weight sets per Arch (bilateral sharing), every number is the mean over them, as
    ViTAS scores: all of them were trained, and which one extraction gives is no merit of the Arch. That takes as many
    passes.

    Args:
        batches: (B, C, H, W) images and (B,) class numbers; or (B, Y) bool of images that may have several classes:
            accuracy is then mean average precision, `top5` the share that has one of the five, the loss binary; or
            float (B, T) or (B,) of numbers.
        device: where the network is; found from its parameters when None.
        scale: what numbers are standardised by; `EvalBatches` say it.

    Returns:
        The Score, and bool (N,): which images are of the class that the network finds likeliest; of numbers float32
        (N,), what of each image's is explained, whose mean is R^2.

    Raises:
        UserError: images without labels.
    """
    target_device = torch.device(device) if device is not None else next(network.parameters()).device
    sides = 1 if arch is None else int(getattr(network, "sides", 1))
    tallies: list[_Tally | _Told] = []
    with evaluating(network):
        for images_BCHW, targets in batches:
            require_labels(targets, "accuracy")
            tallies = tallies or [_Told() if are_numbers(targets) else _Tally() for _ in range(sides)]
            images_BCHW, targets = images_BCHW.to(target_device), targets.to(target_device)
            for side, tally in enumerate(tallies):
                given = () if arch is None else (arch,)
                logits_BY = network(images_BCHW, *given, **({"side": side} if side else {})).float()
                tally.add(logits_BY, targets)
    assert tallies, "no batch came"
    scores = [tally.score() for tally in tallies]
    means = {
        name: sum(found) / sides
        for name in ("accuracy", "top5", "loss", "balanced", "loss_odd", "error")
        if None not in (found := [getattr(score, name) for score in scores])
    }
    scale = scale or getattr(getattr(batches, "images", None), "scale", None)
    mae = tuple(sum(each) / sides for each in zip(*(score.mae for score in scores), strict=True))
    if scale is not None:
        mae = tuple(each * std for each, std in zip(mae, scale.std, strict=True))
    return Score(**{"top5": None, **means}, n=scores[0].n, mae=mae), tallies[0].right_N


class _Told:
    """Numbers as they come, on the CPU."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, told_BT: Tensor, targets: Tensor) -> None:
        numbers_BT = targets.reshape(len(targets), -1)
        if told_BT.shape != numbers_BT.shape:
            raise UserError(
                f"the network tells {told_BT.shape[1]} numbers of an image and the labels {numbers_BT.shape[1]}; they "
                "must be the same. Give images with its numbers."
            )
        self.pairs.append((told_BT.cpu().double(), numbers_BT.cpu().double()))

    @property
    def right_N(self) -> Tensor:
        """What is explained of each image's numbers."""
        told_NT, numbers_NT = (torch.cat(each) for each in zip(*self.pairs, strict=True))
        return explained(told_NT, numbers_NT).float()

    def score(self) -> Score:
        told_NT, numbers_NT = (torch.cat(each) for each in zip(*self.pairs, strict=True))
        apart_NT, explained_N = told_NT - numbers_NT, self.right_N.double()
        n, squared_N = len(explained_N), (apart_NT**2).mean(1)
        return Score(
            accuracy=float(explained_N.mean()),
            top5=None,
            loss=float(squared_N.mean()),
            n=n,
            loss_odd=float(squared_N[1::2].sum()) / max(1, n // 2),
            error=float(explained_N.std(correction=1)) / math.sqrt(n) if n > 1 else 1.0,
            mae=tuple(apart_NT.abs().mean(0).tolist()),
        )


class _Tally:
    """What is counted while batches come, on the CPU: not every device has float64."""

    def __init__(self) -> None:
        self.totals = torch.zeros(5, dtype=torch.float64)
        self.by_class_2Y: Tensor | None = None  # images, and those that were right
        self.several: list[tuple[Tensor, Tensor]] = []
        self.right: list[Tensor] = []

    def add(self, logits_BY: Tensor, targets: Tensor) -> None:
        odd = slice(1 - int(self.totals[3]) % 2, None, 2)
        if not has_one_class(targets):
            loss = functional.binary_cross_entropy_with_logits(logits_BY, targets.float(), reduction="none")
            loss = loss.mean(1)
            best = targets.gather(1, logits_BY.topk(min(5, logits_BY.shape[1]), dim=1).indices).any(1)
            right = best.sum()
            sums = torch.stack([right, right, loss.sum(), loss.new_tensor(len(targets)), loss[odd].sum()])
            self.several.append((logits_BY.cpu(), targets.cpu()))
            self.right.append(targets.gather(1, logits_BY.argmax(1, keepdim=True))[:, 0].cpu())
        else:
            best = logits_BY.topk(min(5, logits_BY.shape[1]), dim=1).indices == targets[:, None]
            loss = functional.cross_entropy(logits_BY, targets, reduction="sum")
            loss_odd = functional.cross_entropy(logits_BY[odd], targets[odd], reduction="sum")
            sums = torch.stack([best[:, 0].sum(), best.sum(), loss, loss.new_tensor(len(targets)), loss_odd])
            classes = logits_BY.shape[1]
            found = [torch.bincount(t, minlength=classes) for t in (targets, targets[best[:, 0]])]
            by_class_2Y = torch.stack(found).cpu()
            self.right.append(best[:, 0].cpu())
            self.by_class_2Y = by_class_2Y if self.by_class_2Y is None else self.by_class_2Y + by_class_2Y
        self.totals += sums.cpu().double()

    @property
    def right_N(self) -> Tensor:
        """Which images are of the likeliest class."""
        return torch.cat(self.right)

    def score(self) -> Score:
        top1, top5, loss, n, loss_odd = self.totals.tolist()
        if self.several:
            accuracy = balanced = _mean_average_precision(*map(torch.cat, zip(*self.several, strict=True)))
        else:
            assert self.by_class_2Y is not None, "no batch came"
            recalls = [right / seen for seen, right in self.by_class_2Y.T.tolist() if seen]
            accuracy, balanced = top1 / n, sum(recalls) / len(recalls)
        return Score(
            accuracy=accuracy,
            top5=top5 / n,
            loss=loss / n,
            n=int(n),
            balanced=balanced,
            loss_odd=loss_odd / max(1, n // 2),
        )


def _mean_average_precision(logits_NY: Tensor, has_NY: Tensor) -> float:
    """Mean over the classes that occur of the area under precision by recall, as scikit-learn sums it."""
    from sklearn.metrics import average_precision_score

    occurs_Y = has_NY.any(0)
    return float(average_precision_score(has_NY[:, occurs_Y].numpy(), logits_NY[:, occurs_Y].numpy()))


Z95 = 1.959964
"""Standard errors to either side of a 95 % interval."""


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of the share `correct / n`, as fractions.

    Raises:
        ValueError: `n` is below 1, or `correct` is not in 0..n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(
            f"correct is {correct} of n = {n}; an interval needs 0 <= correct <= n and n >= 1. Count again."
        )
    share, z2 = correct / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def interval_of(accuracy: float, n: int, error: float | None = None) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy on `n` images: Wilson's, or of R^2 (which has an `error`) Student's t by
    what is explained of each image, the variance of the labels taken as known."""
    if error is None:
        return wilson(round(accuracy * n), n)
    half = t95(n) * error
    return accuracy - half, min(1.0, accuracy + half)


def t95(n: int) -> float:
    """Standard errors to either side of a 95 % interval of a mean of `n`: Student's t by its expansion (Abramowitz and
    Stegun 26.7.5), right to 0.5 % from n = 5 on.

    >>> [round(t95(n), 2) for n in (5, 10, 100)]
    [2.77, 2.26, 1.98]
    """
    z, free = Z95, max(1, n - 1)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + (z**3 + z) / 4 / free + second / free**2 + third / free**3


def paired_mean(first_N: Tensor, second_N: Tensor) -> tuple[float, tuple[float, float]]:
    """Return the mean difference of what two networks explain of the same images, and its 95 % interval (Student's t of
    the differences)."""
    apart_N = (first_N - second_N).double()
    middle, n = float(apart_N.mean()), len(apart_N)
    half = t95(n) * float(apart_N.std(correction=1)) / math.sqrt(n) if n > 1 else 1.0
    return middle, (middle - half, middle + half)


def paired(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two networks' accuracies on the same `n` images, as fractions.

    Only images count that one of the two gets right and the other does not. The interval is Bonett and Price's (Journal
    of Educational and Behavioral Statistics 2012), which adds one image to either side and so holds for few of them.

    Raises:
        ValueError: counts that no `n` images give.
    """
    if n < 1 or min(only_first, only_second) < 0 or only_first + only_second > n:
        raise ValueError(
            f"only_first is {only_first} and only_second {only_second} of n = {n}; together they are at most n. Count "
            "again."
        )
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    middle = first - second
    half = Z95 * math.sqrt((first + second - middle**2) / (n + 2))
    return max(-1.0, middle - half), min(1.0, middle + half)


ALIKE = 0.02  # Archs of a search are often no further apart
TYPICAL = 0.9  # an accuracy


def cannot_tell(n: int) -> str:
    """What scores on `n` images do not say, and how many would say it; "" where they do."""
    width = _width(n)
    if width <= 2 * ALIKE:
        return ""
    enough = next(count for count in range(n, 1 << 20, 10) if _width(count) <= 2 * ALIKE)
    return (
        f"an accuracy of {TYPICAL:.0%} on {n} images is known to {50 * width:.1f} points either way, so scores of "
        f"Archs that are closer say little; {enough} images would tell {100 * ALIKE:.0f} points apart"
    )


def _width(n: int) -> float:
    low, high = wilson(round(TYPICAL * n), n)
    return high - low
