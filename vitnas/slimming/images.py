"""Images as slimming takes them: batches of normalised pixels, with or without targets, gone through more than once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from vitnas.data import has_one_class
from vitnas.errors import UserError

Images = Iterable[Any]
"""Batches of (B, C, H, W) normalised images, or pairs of these and (B,) targets; a list, or `EvalBatches`."""


LOOKED_AT = 256
"""Images that suffice for orders and sensitivities; folding takes all."""
HELD, MOST_HELD = 0.25, 64  # of them are measured on, as a share and at most


def pairs_of(
    images: Images, network: nn.Module, most: int | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The batches, up to `most` images, on the device of `network`, with their targets; None where it has no labels.

    Raises:
        UserError: what can be gone through once only, or no images.
    """
    if iter(images) is images:
        raise UserError(
            "images are a generator, which can be gone through once; slimming needs several passes. Pass a list."
        )
    device, count = next(network.parameters()).device, 0
    for batch in images:
        images_BCHW, targets_B = (batch, None) if isinstance(batch, Tensor) else batch
        if targets_B is not None and not has_one_class(targets_B):
            targets_B = None
        if most is not None and len(images_BCHW) > most - count:
            images_BCHW = images_BCHW[: most - count]
            targets_B = None if targets_B is None else targets_B[: most - count]
        count += len(images_BCHW)
        yield images_BCHW.to(device), targets_B
        if count == most:
            break
    if not count:
        raise UserError("there are no images; slimming looks at some. Pass at least 32.")


def split(
    images: Images, network: nn.Module, share: float = HELD, most: int = MOST_HELD
) -> tuple[list[Tensor], list[Tensor]]:
    """Batches to fit to, and a share of the images, `most` at most, to measure on; of the first `LOOKED_AT`.

    Raises:
        UserError: fewer than two images.
    """
    given = [images_BCHW for images_BCHW, _ in pairs_of(images, network, LOOKED_AT)]
    total = sum(map(len, given))
    if total < 2:
        raise UserError(
            f"there is {total} image; some are fitted to and others measured on. Pass at least 32."
        )
    left = max(1, min(most, int(total * share)))
    held: list[Tensor] = []
    while left:
        last = given.pop()
        taken = min(left, len(last))
        held.append(last[len(last) - taken :])
        if taken < len(last):
            given.append(last[: len(last) - taken])
        left -= taken
    return given, held[::-1]
