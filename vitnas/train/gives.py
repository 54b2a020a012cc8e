"""What a network gives, by the names of its outputs: found out by one image, when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.grids import Grid
from vitnas.model.modes import evaluating
from vitnas.model.outputs import output_names, read_outputs


class Gives:
    """The sizes of a network's outputs. Nothing is run before one is asked for.

    Args:
        network: of ours or timm's; a Supernet is asked as its largest Arch, whose widths no other Arch exceeds.
        input_size: channels, height and width of the images of the training.
        arch: of a Supernet that is asked as one Arch.
        convert: makes those images what the network was made for.
    """

    def __init__(
        self,
        network: nn.Module,
        input_size: Callable[[], tuple[int, int, int]],
        *,
        arch: Arch | None = None,
        convert: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._network, self._input_size, self._convert = network, input_size, convert
        self.space = getattr(network, "space", None) if arch is None else None
        self._arch = self.space.largest() if self.space is not None else arch

    @cached_property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the network sees."""
        height, width = self._image.shape[-2:]
        return height, width

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches, where they are among the tokens."""
        known = self._network if self._arch is None else self._arch
        return int(getattr(known, "num_prefix_tokens", 0))

    @property
    def classes(self) -> int:
        """Width of the logits; 0 where the network has features in their place."""
        known = self._network if self._arch is None else self._arch
        said = getattr(known, "num_classes", None)
        return self.width("logits") if said is None else int(said)

    @cached_property
    def depth(self) -> int:
        """Number of blocks; of a Supernet the most that an Arch has."""
        return sum(map(is_block, output_names(self._network))) if self._arch is None else self._arch.depth

    @property
    def least_depth(self) -> int:
        """The fewest blocks that an Arch of a Supernet has; else as `depth`."""
        return self.depth if self.space is None else int(self.space.smallest().depth)

    @property
    def varies(self) -> bool:
        """Archs of a Supernet differ in the width of their last tokens."""
        ends = () if self.space is None else (self.space.smallest(), self.space.largest())
        return len({arch.stages[-1].embed_dim for arch in ends}) > 1

    def has(self, name: str) -> bool:
        """Whether there is such an output."""
        return name in output_names(self._network)

    def width(self, name: str) -> int:
        """Last dimension of an output; of tokens of a Supernet the largest that any Arch's have.

        Raises:
            UserError: the network has no such output.
        """
        if self.space is not None and (name == "tokens" or is_block(name)):
            return max(stage.embed_dim for stage in self.space.largest().stages)
        return self._shape(name)[-1]

    def split(self, name: str) -> tuple[int, Grid] | None:
        """As `split_tokens`, of the output `name`; None where patches were dropped on the way, too."""
        shape = self._shape(name)
        known: Any = getattr(self._network, "arch", None) if self._arch is None else self._arch
        whole = prod(known.grids[-1]) if getattr(known, "selector", None) else 0  # of the smallest grid
        return self.taken_apart(shape[1]) if len(shape) == 3 and shape[1] - self.prefix >= whole else None

    def taken_apart(self, tokens: int) -> tuple[int, Grid] | None:
        """As `split_tokens`, of so many. Blocks of some networks (CaiT) hold the patches alone, although a class token
        is among their last tokens."""
        found = split_tokens(tokens, self.prefix, self.image_size)
        if found is None and self.prefix and tokens == self._shape("tokens")[1] - self.prefix:
            found = split_tokens(tokens, 0, self.image_size)
        return found

    def _shape(self, name: str) -> torch.Size:
        if name not in self._shapes:
            # Of blocks all by one pass.
            others = filter(is_block, output_names(self._network)) if is_block(name) else ()
            want = (name, *(f"{other}?" for other in others))
            with torch.no_grad(), evaluating(self._network):
                found = read_outputs(self._network, self._image, want, arch=self._arch)
            self._shapes.update((each, output.shape) for each, output in found.items())
        return self._shapes[name]

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {}

    @cached_property
    def _image(self) -> Tensor:
        like = next((p for p in self._network.parameters()), torch.zeros(()))
        image_BCHW = torch.zeros(1, *self._input_size(), device=like.device)
        return image_BCHW if self._convert is None else self._convert(image_BCHW)


def is_block(name: str) -> bool:
    """The output of a block."""
    return name.startswith("blocks.")


def split_tokens(tokens: int, prefix: int, image_size: tuple[int, int]) -> tuple[int, Grid] | None:
    """How many of `tokens` stand in front of the patches, and the patches' grid; None where they make none.

    Args:
        prefix: tokens in front of the patches.
        image_size: height and width, which tell how many rows a grid has.
    """
    (height, width), patches = image_size, max(0, tokens - prefix)
    rows = round((patches * height / width) ** 0.5)
    if not rows or patches % rows:
        return None
    columns = patches // rows
    fits = abs(rows * width - columns * height) <= max(height, width) / 2
    return (prefix, (rows, columns)) if fits else None
