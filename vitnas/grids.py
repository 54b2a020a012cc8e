"""Height and width: of images in pixels, of grids in patches. Always in this order, rows first."""

from __future__ import annotations

from collections.abc import Sequence

from vitnas.errors import UserError

Grid = tuple[int, int]
"""Rows and columns."""

ImageSize = int | tuple[int, int]
"""Pixels: one number for a square image, (height, width) for any other."""

NO_GRID: Grid = (0, 0)


MOST_PIXELS = 1 << 15


def as_image_size(name: str, size: int | Sequence[int]) -> ImageSize:
    """A size as it is kept: one number where both sides are equal, so that equal sizes are equal values.

    Raises:
        UserError: neither one nor two whole numbers of at least 1, or one beyond all images.
    """
    sides = [size] if isinstance(size, int) else list(size) if isinstance(size, Sequence) else []
    if len(sides) not in (1, 2) or any(
        not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides
    ):
        raise UserError(
            f"{name} is {size!r}; it must be a whole number of at least 1, or two of them, height and width. "
            "Correct it."
        )
    if max(sides) > MOST_PIXELS:
        raise UserError(f"{name} is {size!r}; a side must be at most {MOST_PIXELS} pixels. Correct it.")
    height, width = int(sides[0]), int(sides[-1])  # plain ones, whatever kind of number was given
    return height if height == width else (height, width)


def sides_of(size: ImageSize) -> tuple[int, int]:
    """Height and width, in pixels."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: ImageSize) -> str:
    """`224`, or `32 x 64` where height and width differ."""
    return str(size) if isinstance(size, int) else f"{size[0]} x {size[1]}"


def side_of(name: str, size: int | Sequence[int]) -> int:
    """The side of a size given as one number or as two equal ones."""
    sides = (size,) if isinstance(size, int) else tuple(size)
    if len(set(sides)) != 1 or len(sides) > 2:
        raise UserError(f"{name} is {size}; both sides must be the same number of pixels. Give one number.")
    return int(sides[0])
