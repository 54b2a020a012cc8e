"""Lending: how a network without storage gets the entries of shared tensors that its Arch uses, and returns gradients.

In training the network runs on views of the shared tensors. The obvious way, autograd through such views, allocates
and adds a full-size zero tensor per parameter and use. Instead all views leave one autograd node, whose
backward adds all their gradients at once where the entries lie in the shared tensors' `.grad`. A parameter that is a
whole shared tensor is lent as it is.

Without gradients the network runs on copies, except where the entries already begin a tensor and lie without gaps: the
kernels that libraries choose depend on strides and alignment, and with those of a Model that owns its weights the
answers are that Model's bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitnas.supernet.sharing import Piece

ALIGNED_BYTES = 64  # what torch's allocators give any new tensor at least


class Layout(NamedTuple):
    """A view into a contiguous tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor) -> Layout:
        return cls(tuple(view.shape), view.stride(), int(view.storage_offset()))

    def cut(self, tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous(), "a Supernet's tensors lie in rows; channels_last is for its Models"
        # A gradient may be a part of a larger tensor: what a concatenation gives its inputs is.
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


class Loan:
    """One tensor of a network without storage, and where its entries lie.

    `layout` is None where the entries cannot be seen as one view; they are then copied together each time.
    """

    def __init__(self, network: nn.Module, root: nn.Module, piece: Piece) -> None:
        self.piece = piece
        self._into, self._key = home_of(network, piece.name)
        self._blank = self._into[self._key]
        self._sources = [home_of(root, part.shared) for part in piece.parts]
        self.is_buffer = not isinstance(self._blank, nn.Parameter)
        empty = [torch.empty(math.prod(part.view), device="meta") for part in piece.parts]
        cuts = [part.cut(tensor) for part, tensor in zip(piece.parts, empty, strict=True)]
        self.parts = [Layout.of(cut) for cut in cuts]
        self.layout: Layout | None = None
        self._view: Tensor | None = None
        if len(cuts) == 1:
            try:
                self.layout = Layout.of(cuts[0].view(piece.shape))
            except RuntimeError:  # its strides do not allow it
                if self.is_buffer:
                    raise LookupError(
                        f"buffer {piece.name} is updated in place; it cannot be a copy"
                    ) from None
        elif self.is_buffer:
            raise LookupError(f"buffer {piece.name} is updated in place; its axes cannot wrap around")
        starts = self.layout is not None and self.layout.offset == 0
        self.begins = starts and cuts[0].view(piece.shape).is_contiguous()
        self.is_whole = self.begins and math.prod(piece.parts[0].view) == math.prod(piece.shape)

    def sources(self) -> list[Tensor]:
        return [home[key] for home, key in self._sources]

    def view(self, sources: Sequence[Tensor]) -> Tensor:
        """The entries, without history, sharing storage where they can; that view is kept."""
        if self.layout is None:
            plain = {
                part.shared: tensor.detach() for part, tensor in zip(self.piece.parts, sources, strict=True)
            }
            return self.piece.take(plain)
        if self._view is None:
            self._view = self.layout.cut(sources[0].detach())
        return self._view.detach()

    def own(self, sources: Sequence[Tensor]) -> Tensor:
        """The entries as a Model that owns them has them: without gaps, from an aligned place on, and asking for a
        gradient, by which torch chooses between two ways to multiply."""
        view = self.view(sources)
        if not (self.layout is None or (self.begins and view.data_ptr() % ALIGNED_BYTES == 0)):
            view = view.clone(memory_format=torch.contiguous_format)
        return view if self.is_buffer else view.requires_grad_()

    def parts_of(self, grad: Tensor) -> Iterator[tuple[int, Layout, Tensor]]:
        """What a gradient of the entries is to the sources: (number of the source, where in it, gradient there)."""
        if self.layout is not None:
            return iter(((0, self.layout, grad),))
        whole = grad.reshape(self.piece.sizes)
        cut = (whole[part.at] for part in self.piece.parts)
        return zip(itertools.count(), self.parts, cut, strict=False)

    def lend(self, tensor: Tensor) -> None:
        self._into[self._key] = tensor

    def take_back(self) -> None:
        self._into[self._key] = self._blank


def lend_when_run(network: nn.Module, loans: Collection[Loan]) -> None:
    """From now on `network` has its weights while it runs, and none between: what is kept must not keep copies."""

    def before(network: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            _lend_views(loans)
            return
        for loan in loans:
            # Buffers of a network that trains are the shared ones, as it updates them.
            is_shared = loan.is_buffer and network.training
            loan.lend(loan.view(loan.sources()) if is_shared else loan.own(loan.sources()))

    def behind(network: nn.Module, inputs: Any, output: Any) -> None:
        for loan in loans:
            loan.take_back()

    network.register_forward_pre_hook(before)
    network.register_forward_hook(behind, always_call=True)


def _lend_views(loans: Collection[Loan]) -> None:
    cut: list[Loan] = []
    sources: list[list[Tensor]] = []
    made: list[Tensor] = []
    for loan in loans:
        found = loan.sources()
        if loan.is_whole:
            # Not the parameter itself: what a forward pass makes of it is summed up before it meets another pass's.
            loan.lend(found[0].view(loan.piece.shape))
        elif found[0].requires_grad or any(tensor.requires_grad for tensor in found):
            cut.append(loan)
            sources.append(found)
            made.append(loan.view(found))
        else:
            loan.lend(loan.view(found))
    if cut:
        views = _Views.apply(torch.empty(0, requires_grad=True), cut, sources, made)
        for loan, view in zip(cut, views, strict=True):
            loan.lend(view)


class _Views(torch.autograd.Function):
    """Views of shared tensors whose gradients are added where they belong."""

    @staticmethod
    def forward(
        ctx: Any, start: Tensor, loans: list[Loan], sources: list[list[Tensor]], views: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """`start` only makes autograd follow the views, which it does ten times faster where they come from outside."""
        ctx.set_materialize_grads(False)
        ctx.loans, ctx.sources = loans, sources
        return tuple(views)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a Supernet's forward cannot be differentiated twice; call its Model on select(...) instead"
            )
        fresh: list[Tensor] = []
        places: list[Tensor] = []
        given: list[Tensor] = []
        for loan, sources, grad in zip(ctx.loans, ctx.sources, grads, strict=True):
            for number, layout, part in () if grad is None else loan.parts_of(grad):
                source = sources[number]
                if not source.requires_grad:
                    continue
                if (whole := source.grad) is None:
                    source.grad = whole = torch.empty_like(source)
                    fresh.append(whole)
                places.append(layout.cut(whole))
                given.append(part)
        if fresh:
            torch._foreach_zero_(fresh)
        if places:
            torch._foreach_add_(places, given)
        return None, None, None, None


def home_of(root: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary in which a module inside `root` keeps the tensor of this dotted name, and its last word."""
    path, _, last = name.rpartition(".")
    module = root.get_submodule(path)
    return (module._parameters if last in module._parameters else module._buffers), last
