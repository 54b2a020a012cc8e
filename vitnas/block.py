"""Block and Stage: the parts of an Arch, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from vitnas.errors import UserError, check_word
from vitnas.mixers import MIXERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One transformer block.

    The inner width of attention is `num_heads * head_dim` and need not equal the stage's `embed_dim`.
    `mixer_size` is the mixer's own number (random features, rank, landmarks, hidden units, mixtures); None means its
    default. Mixers without heads ignore `num_heads` and `head_dim`. `window` is the longest side of the windows of a
    mixer that has them, in patches; None means its default.
    `slot` is the block's place in its stage of a Supernet (whose weights it takes); None means its own index, which
    is right whenever blocks are only ever removed from the end. It does not change what the block computes.
    `keep` patches enter the block, fewer than came before (None: as many); which ones, the Arch's `selector` says. With
    0 the block gives the class token alone, by keys and values of all that came; so it does with any number where the
    selector is one of Patch Slimming's.
    """

    num_heads: int
    head_dim: int
    mlp_hidden: int
    mixer: str = "softmax"
    mixer_size: int | None = None
    slot: int | None = None
    keep: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "num_heads", "head_dim", "mlp_hidden")
        check_word("mixer", self.mixer, MIXERS)
        if self.window is not None:
            self._check_window(MIXERS[self.mixer].default_window)
        if self.mixer_size is not None:
            at_least(1, self, "mixer_size")
        if self.keep is not None:
            at_least(0, self, "keep")
        if self.slot is not None and self.slot < 0:
            raise UserError(
                f"slot is {self.slot}; it counts from 0. Leave it out to use the block's own index."
            )

    def _check_window(self, usual: int) -> None:
        at_least(1, self, "window")
        if not usual:
            raise UserError(f"window is {self.window}; mixer {self.mixer!r} has no windows. Leave it out.")
        if self.window == usual:
            object.__setattr__(self, "window", None)  # equal Blocks are equal values

    @property
    def inner_dim(self) -> int:
        """Width of q, k and v each: all heads together."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Blocks that share one embedding width. Depth is `len(blocks)`."""

    embed_dim: int
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        at_least(1, self, "embed_dim")
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a list would not hash
        if not self.blocks:
            raise UserError("blocks is empty; a stage needs at least one block. Remove the stage instead.")
        slots = [block.slot for block in self.blocks if block.slot is not None]
        if slots and (len(slots) < len(self.blocks) or any(b <= a for a, b in pairwise(slots))):
            raise UserError(
                f"slots are {slots}; they must rise and be given for all blocks or none. Renumber them."
            )

    @property
    def slots(self) -> list[int]:
        """Place of each block in this stage of a Supernet."""
        return [index if block.slot is None else block.slot for index, block in enumerate(self.blocks)]


MOST = 1 << 24  # of any size: beyond it no machine holds a weight, and numbers of the counting would overflow


def at_least(least: Literal[0, 1], value: object, *names: str) -> None:
    """Raise UserError where a field of these names is no whole number, a lower one, or beyond all machines."""
    for name in names:
        number = getattr(value, name)
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            rule = " of at least 1" if least else ", and 0 means none"
            raise UserError(f"{name} is {number!r}; it must be a whole number{rule}.")
        if number > MOST:
            raise UserError(f"{name} is {number}; it must be at most {MOST}. Correct it.")
