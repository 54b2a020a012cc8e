"""A Model as slimming goes through it: branches that are added to one stream, and the linear layers around them.

Every block has two branches, attention and MLP. What a branch adds ends in its writer, whose inputs are heads or hidden
units; it begins with its readers, which see the normed stream and give queries, keys and values or hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from vitnas.mixers.mixer import HeadMixer
from vitnas.model import Model
from vitnas.model.blocks import TransformerBlock
from vitnas.model.features import stage_starts

Axis = Literal["heads", "hidden"]


@dataclass(frozen=True, eq=False)
class Branch:
    """One branch of a block of a Model.

    Args:
        slot: the block's number in the largest Model of its Supernet.
        axis: what its writer sums over.
        entry: the reduction that stands in front of it, if any.
        norm, inner, scale: what it adds is scale(inner(norm(x))).
        norms_stream: it is added to norm(x), not to x.
        writer, readers: linear layers inside, the latter by their names in the Model; None and {} where a mixer has
            others.
    """

    slot: int
    axis: Axis
    entry: nn.Module | None
    norm: nn.Module
    inner: nn.Module
    scale: nn.Module
    norms_stream: bool
    writer: nn.Linear | None
    readers: Mapping[str, nn.Linear]

    def enter(self, x_BND: Tensor) -> Tensor:
        """The stream in front of it, from that behind the branch before."""
        entered: Tensor = x_BND if self.entry is None else self.entry(x_BND)
        return entered

    def seen(self, x_BND: Tensor) -> Tensor:
        """What its readers see."""
        normed_BND: Tensor = self.norm(x_BND)
        return normed_BND

    def base(self, x_BND: Tensor) -> Tensor:
        """What its result is added to."""
        return self.seen(x_BND) if self.norms_stream else x_BND

    def __call__(self, x_BND: Tensor) -> Tensor:
        """The stream behind it."""
        seen_BND = self.seen(x_BND)
        base_BND = seen_BND if self.norms_stream else x_BND
        behind_BND: Tensor = base_BND + self.scale(self.inner(seen_BND))
        return behind_BND


def branches(model: Model, slots: Sequence[int] | None = None) -> list[Branch]:
    """The branches of `model`, in order; `slots` are its blocks' numbers in the largest Model."""
    entries = dict(zip(stage_starts(model.arch)[1:], model.reductions, strict=True))
    found = []
    for index, block in enumerate(model.blocks):
        assert isinstance(block, TransformerBlock)
        slot = index if slots is None else slots[index]
        attn, mlp = block.attn, cast(Any, block.mlp)
        asks = {f"blocks.{index}.attn.qkv": attn.qkv} if isinstance(attn, HeadMixer) else {}
        opens = {
            f"blocks.{index}.mlp.{name}": getattr(mlp, name)
            for name in ("fc1", "fc1_g", "fc1_x")
            if hasattr(mlp, name)
        }
        writer = attn.proj if isinstance(attn, HeadMixer) else None
        found += [
            Branch(slot, "heads", entries.get(index), block.norm1, attn, block.ls1, False, writer, asks),
            Branch(slot, "hidden", None, block.norm2, mlp, block.ls2, block.norms_stream, mlp.fc2, opens),
        ]
    return found


@contextmanager
def inputs_of(linear: nn.Linear) -> Iterator[list[Tensor]]:
    """What the layer is given meanwhile."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
