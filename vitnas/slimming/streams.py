"""Tokens of many images at one place of a network, changed in place as slimming goes through it.

They are all that grows with the number of images. Beyond `RAM_BYTES` they lie in a file without a name, so that memory
stays that of one layer's sums.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

RAM_BYTES = 2 << 30


class Streams:
    """A batch of tokens each.

    Args:
        given: (B, N, D) each.
        ram_bytes: how much is kept in memory; what is more lies in a file. Tensors on an accelerator stay there.
    """

    def __init__(self, given: Iterable[Tensor], ram_bytes: int = RAM_BYTES) -> None:
        self._left = ram_bytes
        self._kept = [self._keep(tensor) for tensor in given]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def move(self, step: Callable[[Tensor], Tensor]) -> None:
        """Replace each batch by what `step` makes of it."""
        for number, tensor in enumerate(self._kept):
            moved = step(tensor)
            if moved is tensor:
                continue
            if moved.shape == tensor.shape:
                tensor.copy_(moved)
            else:
                self._kept[number] = self._keep(moved)

    def _keep(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or size <= self._left:
            self._left -= size
            return tensor.clone()
        with tempfile.TemporaryFile() as file:  # gone with the last tensor that shows it
            shown = np.memmap(file, dtype=np.uint8, mode="w+", shape=(size,))
        there = torch.from_numpy(shown).view(tensor.dtype).view(tensor.shape)
        return there.copy_(tensor)
