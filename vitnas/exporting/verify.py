"""Does an exported file compute what the Model computes? One comparison for every format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.errors import UserError
from vitnas.measure.convert import input_shape, model_device, model_dtype, random_images
from vitnas.model.modes import evaluating

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
RANDOM_IMAGES = 8
BATCH_SIZES = (1, 3)  # after these, batches of MAX_BATCH; none equals the batch that files are traced with
MAX_BATCH = 64
TRACED_BATCH = 2

Run = Callable[[Tensor], Tensor]


class ExportError(UserError):
    """A Model cannot be exported, or its file does not compute the same; nothing was written in its place."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How closely an exported file follows the Model.

    Args:
        n_images: images compared.
        real_images: whether the caller gave them; else they are noise.
        batch_sizes: batch sizes that were run.
        max_abs_diff: largest difference of a logit.
        max_rel_diff: the same, as a share of the Model's largest absolute logit.
        top1_agreement: share of images with the same first class; None of numbers.
        tolerance: allowed `max_abs_diff`, times the Model's largest absolute logit where that is above 1.
    """

    n_images: int
    real_images: bool
    batch_sizes: tuple[int, ...]
    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float | None
    tolerance: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "batch_sizes": list(self.batch_sizes)}


def verify(
    model: nn.Module,
    run: Run,
    images_BCHW: Tensor,
    *,
    name: str,
    real_images: bool,
    tolerance: float | None = None,
    dynamic_batch: bool = True,
) -> Agreement:
    """Compare `run` with the Model (evaluating) on the same images, in batches of 1, of 3 and of the rest.

    Args:
        run: (B, C, H, W) images to (B, Y) logits, through the exported file.
        images_BCHW: what the model takes, on its device.
        name: what `run` is, for the message.
        dynamic_batch: False compares in batches of 1 only.

    Raises:
        ExportError: a difference is above the tolerance, or the Model's own logits are not finite.
    """
    tolerance = tolerance if tolerance is not None else TOLERANCES.get(model_dtype(model), 1e-4)
    wanted, gotten, sizes = [], [], set()
    with evaluating(model), torch.no_grad():
        for batch in _batches(images_BCHW, dynamic_batch):
            sizes.add(len(batch))
            wanted.append(model(batch).float().cpu())
            gotten.append(run(batch).float().cpu())
    agreement = compare(
        torch.cat(wanted),
        torch.cat(gotten),
        tolerance=tolerance,
        real_images=real_images,
        batch_sizes=tuple(sorted(sizes)),
    )
    if not torch.cat(wanted).isfinite().all():
        raise ExportError(
            "the Model's own logits are not finite; an export of it would be of no use. Train it anew."
        )
    if not agreement.passed:
        same = (
            "" if agreement.top1_agreement is None else f" (top-1 agreement {agreement.top1_agreement:.1%})"
        )
        raise ExportError(
            f"{name} differs from the Model by {agreement.max_abs_diff:.3g} on {agreement.n_images} images{same}; the "
            f"tolerance is {tolerance:.3g}. Export again, or pass a larger tolerance if that difference is acceptable."
        )
    return agreement


def compare(
    want_BY: Tensor,
    got_BY: Tensor,
    *,
    tolerance: float,
    real_images: bool = True,
    batch_sizes: tuple[int, ...] = (),
) -> Agreement:
    """Agreement of two sets of logits; shapes that differ, and values that are not finite, never pass."""
    if want_BY.shape != got_BY.shape:
        raise ExportError(
            f"the exported file's output has shape {tuple(got_BY.shape)}; the Model's has {tuple(want_BY.shape)}. "
            "Export with another exporter or a fixed batch."
        )
    largest = float(want_BY.abs().max()) if want_BY.numel() else 0.0
    diff = float((want_BY - got_BY).abs().nan_to_num(nan=torch.inf).max()) if want_BY.numel() else 0.0
    same = (want_BY.argmax(1) == got_BY.argmax(1)).float().mean() if want_BY.numel() else torch.tensor(1.0)
    return Agreement(
        n_images=len(want_BY),
        real_images=real_images,
        batch_sizes=batch_sizes,
        max_abs_diff=diff,
        max_rel_diff=diff / largest if largest else diff,
        top1_agreement=float(same),
        tolerance=tolerance,
        passed=diff <= tolerance * max(1.0, largest),
    )


def example_images(model: nn.Module, images_BCHW: Tensor | None) -> tuple[Tensor, bool]:
    """Images on the model's device in its dtype, and whether they are the caller's; noise if there are none.

    Raises:
        UserError: the images are not a batch of float images, or none are given and the model does not say
            which it takes.
    """
    given = images_BCHW is not None
    if images_BCHW is None:
        images_BCHW = random_images((RANDOM_IMAGES, *input_shape(model)))
    if images_BCHW.dim() != 4 or not len(images_BCHW) or not images_BCHW.is_floating_point():
        raise UserError(
            f"images have shape {tuple(images_BCHW.shape)} and dtype {images_BCHW.dtype}; they must be at least one "
            "preprocessed float image, (batch, channels, height, width). Mend them."
        )
    return images_BCHW.detach().to(model_device(model), model_dtype(model)), given


def traced_images(images_BCHW: Tensor, *, dynamic_batch: bool) -> Tensor:
    """The images to trace with: two of them (a batch of 1 would be taken for a constant), or one for a fixed batch."""
    return images_BCHW[:1].repeat(TRACED_BATCH if dynamic_batch else 1, 1, 1, 1).contiguous()


def _batches(images_BCHW: Tensor, dynamic_batch: bool) -> Iterator[Tensor]:
    if not dynamic_batch:
        yield from images_BCHW.split(1)
        return
    needed = sum(BATCH_SIZES)
    if len(images_BCHW) < needed:  # too few images to fill the batches: repeat them
        images_BCHW = images_BCHW.repeat(-(-needed // len(images_BCHW)), 1, 1, 1)[:needed]
    start = 0
    for size in BATCH_SIZES:
        yield images_BCHW[start : start + size]
        start += size
    if start < len(images_BCHW):
        yield from images_BCHW[start:].split(MAX_BATCH)
