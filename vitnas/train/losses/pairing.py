"""Which blocks and tokens of two networks are held side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from vitnas.errors import UserError
from vitnas.grids import Grid
from vitnas.train.gives import Gives
from vitnas.train.task import Outputs

Pairs = tuple[tuple[int, int], ...]
"""(block of the student, block of the teacher); negative numbers count from the last."""


class Side(NamedTuple):
    """One network's tokens for one place.

    Attributes:
        prefix_BKD: those in front of the patches.
        patches_BPD: in the order of the grid.
    """

    prefix_BKD: Tensor
    patches_BPD: Tensor
    grid: Grid


def first_and_last(student: int, teacher: int, most: int = 4) -> Pairs:
    """The first `most` blocks and the last `most`, fewer in a network that is not so deep.

    Args:
        student, teacher: how many blocks each has.
    """
    depth = min(student, teacher, 2 * most)
    first = (depth + 1) // 2
    early = tuple((index, index) for index in range(first))
    return early + tuple((student - left, teacher - left) for left in range(depth - first, 0, -1))


class BlockPairs:
    """The pairs of blocks between two networks, of each Arch of a Supernet those that it has.

    Args:
        asked: pairs; none for `first_and_last`.
        field: what the user calls them, for errors.

    Raises:
        UserError: a block that a network has not, or none that every Arch has.
    """

    def __init__(self, asked: Pairs, student: Gives, teacher: Gives, field: str) -> None:
        self.asked, self._student, self._teacher = asked, student, teacher
        for whose, side, network in (("network", 0, student), ("teacher", 1, teacher)):
            numbers = [pair[side] for pair in asked] or [0]
            bad = [number for number in numbers if not -network.depth <= number < network.depth]
            if bad:
                has = f"blocks 0 to {network.depth - 1}" if network.depth else "none"
                raise UserError(
                    f"{field} asks for block {bad[0]} of the {whose}, which has {has}; a pair is a block of the "
                    "network, then one of the teacher. Choose others."
                )
        if not self._of(student.least_depth):
            raise UserError(
                f"{field} is {[list(pair) for pair in asked]}, and an Arch of {student.least_depth} blocks has none of "
                "these; every Arch must learn something. Add [-1,-1], the last of both."
            )

    @property
    def wants(self) -> tuple[str, ...]:
        """Of the student; of a Supernet all blocks, as Archs differ in depth."""
        if self._student.space is not None:
            return tuple(f"blocks.{index}?" for index in range(self._student.depth))
        return tuple(dict.fromkeys(mine for _, mine, _ in self.most))

    @property
    def wants_taught(self) -> tuple[str, ...]:
        """Of the teacher, for an Arch of any depth."""
        depths = range(self._student.least_depth, self._student.depth + 1)
        return tuple(dict.fromkeys(theirs for depth in depths for *_, theirs in self._of(depth)))

    @property
    def most(self) -> list[tuple[str, str, str]]:
        """As `of`, for the deepest Arch."""
        return self._of(self._student.depth)

    def of(self, outputs: Outputs) -> list[tuple[str, str, str]]:
        """For the Arch whose outputs these are: a name for the pair, the same at any depth, and both outputs."""
        one = self._student.space is None
        depth = sum(name.startswith("blocks.") for name in outputs)
        return self._of(self._student.depth if one else depth)

    def _of(self, depth: int) -> list[tuple[str, str, str]]:
        last, found = self._teacher.depth, []
        for pair in self.asked or first_and_last(depth, last):
            mine, theirs = (
                number + of if number < 0 else number for number, of in zip(pair, (depth, last), strict=True)
            )
            if 0 <= mine < depth:
                found.append((f"{pair[0]}:{pair[1]}", f"blocks.{mine}", f"blocks.{theirs}"))
        return found


def side_of(x_BND: Tensor, network: Gives, whose: str) -> Side:
    """Take tokens apart.

    Raises:
        UserError: patches that are no whole grid.
    """
    found = network.taken_apart(x_BND.shape[1])
    if found is None:
        raise no_grid(whose, f"an output of {x_BND.shape[1]} tokens", network)
    first, grid = found
    return Side(x_BND[:, :first], x_BND[:, first:], grid)


def no_grid(whose: str, what: str, network: Gives) -> UserError:
    """The error for tokens that make no grid."""
    height, width = network.image_size
    return UserError(
        f"the {whose} gives {what}, which is no grid of patches for images of {height} x {width} pixels; patches of "
        "both networks are matched by their places. Use a network that keeps them all."
    )


def check_grids(teacher: Gives, names: Sequence[str]) -> None:
    """Refuse, before any training, a teacher whose patches have no places.

    Raises:
        UserError: its tokens of one of these names are no whole grid.
    """
    for name in names:
        if teacher.split(name) is None:
            raise no_grid("teacher", name, teacher)


def kept_BP(outputs: Outputs) -> Tensor | None:
    """1 for each patch that the student keeps to its end, where it drops some; without gradient."""
    return outputs["keep"][:, -1].detach() if "keep" in outputs else None


def mean_of_kept(loss_BP: Tensor, keep_BP: Tensor | None) -> Tensor:
    """The mean over the patches of a batch that the student keeps; 0 where it keeps none."""
    return loss_BP.mean() if keep_BP is None else (loss_BP * keep_BP).sum() / keep_BP.sum().clamp_min(1)


def matched(student: Side, teacher: Side, keep_BP: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Patches of both, (B, P, .) each, on one grid: the finer is resampled to the coarser, by places.

    Where the student drops patches (`keep_BP`), the teacher's are resampled to the student's.
    """
    mine, theirs = student.patches_BPD, teacher.patches_BPD
    if student.grid == teacher.grid:
        return mine, theirs
    if keep_BP is not None or mine.shape[1] < theirs.shape[1]:
        return mine, resampled(theirs, teacher.grid, student.grid)
    return resampled(mine, student.grid, teacher.grid), theirs


def resampled(x_BPD: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """A map of features on another grid, bilinearly, averaging where the new one is coarser."""
    x_BDRC = x_BPD.transpose(1, 2).unflatten(2, tuple(old))
    x_BDRC = functional.interpolate(x_BDRC.float(), size=tuple(new), mode="bilinear", antialias=True)
    return x_BDRC.flatten(2).transpose(1, 2)
