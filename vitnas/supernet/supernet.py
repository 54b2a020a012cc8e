"""Supernet: a table of shared tensors that can act as every Arch of a Space.

    forward(images, arch) = skeleton(arch) run on select(supernet, arch)

The Arch is an argument, never a state. Nothing here knows what a layer computes.

Gradients. The obvious way, autograd through views of the shared tensors, allocates and adds a full-size zero tensor
per parameter and use. Instead each forward runs on detached views whose gradients go straight into the matching
entries of the shared tensor's `.grad`, so that backward touches only what the Arch uses. Gradients therefore appear
in `parameter.grad` after `backward()`, as usual, but `torch.autograd.grad` with respect to the shared tensors does
not see them; use `select` for that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitnas.arch import Arch, Block
from vitnas.layers.axes import Axes, named_axes
from vitnas.model import Model, build
from vitnas.model.vit import drop_path_rates, make_block
from vitnas.space import Space
from vitnas.supernet.sharing import Piece, Sharing

CACHE_SIZE = 1024  # skeletons and blocks kept; each is some hundred small Python objects and no storage

Key = TypeVar("Key")
Value = TypeVar("Value")


class Supernet(nn.Module):
    """Shared weights for all of `space`.

    Args:
        space: the Archs it can act as.
        sharing: which entries an Arch uses; prefix sharing by default.
        drop_path: stochastic depth at the last block of the deepest Arch; rates follow a block's slot.
        generator: source of the initial weights.

    The state dict has the names of the largest Arch's Model (timm's names).
    """

    def __init__(
        self,
        space: Space,
        *,
        sharing: Sharing | None = None,
        drop_path: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        self.sharing = sharing or Sharing()
        self.drop_path = drop_path
        self._cache: _Cache[Arch, _Subnet] = _Cache()
        self._blocks: _Cache[Hashable, _Subnet] = _Cache()
        self.axes: dict[str, Axes] = {}
        largest = build(space.largest(), generator=generator)
        for name, axes in named_axes(largest).items():
            _register(self, name, largest.get_parameter(name))
            self.axes[name] = axes

    def forward(self, images_BCHW: Tensor, arch: Arch) -> Tensor:
        """(B, C, H, W) images to (B, Y) logits of `arch`.

        Raises:
            UserError: `arch` is not in the Space (all reasons are given).
        """
        subnet = self.subnet(arch)
        weights, ties = self._borrow(subnet, with_grad=torch.is_grad_enabled())
        logits: Tensor = functional_call(subnet.skeleton, weights, (images_BCHW,), tie_weights=False)
        if ties and logits.requires_grad:
            # Only when backward starts: the usual zero_grad() between forward and backward must not undo it.
            logits.register_hook(lambda grad: _share_grads(ties))
        return logits

    def train(self, mode: bool = True) -> Supernet:
        """Training or evaluation mode, for all that is kept too."""
        if mode != self.training:
            for kept in (*self._cache.values(), *self._blocks.values()):
                kept.skeleton.train(mode)
        return super().train(mode)

    def no_weight_decay(self) -> set[str]:
        """Parameters besides biases and norms that are not decayed; optimizers ask for it."""
        skeleton = self.subnet(self.space.largest()).skeleton
        assert isinstance(skeleton, Model)
        return skeleton.no_weight_decay()

    def subnet(self, arch: Arch) -> _Subnet:
        """The storage-free Model of `arch` and where its parameters lie; kept, as making it costs milliseconds."""
        found = self._cache.get(arch)
        if found is None:
            found = self._cache.put(arch, self._make_subnet(arch))
        return found

    def _make_subnet(self, arch: Arch) -> _Subnet:
        self.space.check(arch)
        slots = self.space.slots(arch)
        rates = drop_path_rates(self.drop_path, self.space.largest().depth)
        dims = [stage.embed_dim for stage in arch.stages for _ in stage.blocks]
        blocks = [
            self._block(arch, dim, block, slot, rates[slot])
            for dim, block, slot in zip(dims, arch.blocks, slots, strict=True)
        ]
        with torch.device("meta"):
            skeleton = Model(arch, blocks=[block.skeleton for block in blocks])
        ends = _Subnet(skeleton.train(self.training), self._pieces(skeleton, skeleton.axes(), ""))
        return ends.joined([(f"blocks.{index}.", block) for index, block in enumerate(blocks)])

    def _block(self, arch: Arch, dim: int, block: Block, slot: int, drop_path: float) -> _Subnet:
        """A block of `arch` without storage. Archs that agree in a slot share it: a fresh Arch is mostly known ones."""
        fixed = (arch.grid_size, arch.num_prefix_tokens, arch.relative_position, arch.qkv_bias, arch.norm_eps)
        key = (slot, dim, replace(block, slot=None), fixed)
        found = self._blocks.get(key)
        if found is None:
            with torch.device("meta"):
                made = make_block(arch, dim, block, drop_path).train(self.training)
            pieces = self._pieces(made, named_axes(made), f"blocks.{slot}.")
            found = self._blocks.put(key, _Subnet(made, pieces))
        return found

    def _pieces(self, module: nn.Module, axes: dict[str, Axes], prefix: str) -> tuple[Piece, ...]:
        """Where the parameters of `module` lie; the shared tensors' names begin with `prefix`."""
        return tuple(
            self.sharing.piece(
                name, prefix + name, found, self.axes[prefix + name], tuple(module.get_parameter(name).shape)
            )
            for name, found in axes.items()
        )

    def _borrow(self, subnet: _Subnet, *, with_grad: bool) -> tuple[dict[str, Tensor], list[_Tie]]:
        """The weights of `subnet` as leaves on shared storage, and what their gradients belong to."""
        table = dict(self.named_parameters())
        weights: dict[str, Tensor] = {}
        ties: list[_Tie] = []
        for piece, is_run in zip(subnet.pieces, subnet.is_run, strict=True):
            shared = table[piece.shared]
            leaf = piece.take(shared.detach())
            if with_grad and shared.requires_grad:
                leaf.requires_grad_()
                if not is_run:
                    _add_strided(leaf, shared, piece)
                ties.append((leaf, shared, piece, is_run))
            weights[piece.name] = leaf
        return weights, ties


_Tie = tuple[Tensor, nn.Parameter, Piece, bool]


def select(supernet: Supernet, arch: Arch) -> dict[str, Tensor]:
    """The weights of `arch`: for every parameter of `build(arch)`, by its name, a view of a shared tensor.

    Where entries do not lie evenly spaced (fewer heads of a fused qkv) the view is a differentiable copy.

    Raises:
        UserError: `arch` is not in the Space.
    """
    table = dict(supernet.named_parameters())
    return {piece.name: piece.take(table[piece.shared]) for piece in supernet.subnet(arch).pieces}


class _Subnet:
    """A skeleton, the pieces of the shared tensors that it runs on, and which of them are one contiguous run."""

    __slots__ = ("is_run", "pieces", "skeleton")

    def __init__(
        self, skeleton: nn.Module, pieces: tuple[Piece, ...], is_run: tuple[bool, ...] | None = None
    ) -> None:
        self.skeleton, self.pieces = skeleton, pieces
        self.is_run = tuple(_is_run(piece) for piece in pieces) if is_run is None else is_run

    def joined(self, parts: list[tuple[str, _Subnet]]) -> _Subnet:
        """This skeleton with the pieces of its parts, whose names get a prefix each."""
        pieces, is_run = list(self.pieces), list(self.is_run)
        for prefix, part in parts:
            pieces += [piece.renamed(prefix + piece.name) for piece in part.pieces]
            is_run += part.is_run
        return _Subnet(self.skeleton, tuple(pieces), tuple(is_run))


class _Cache(Generic[Key, Value]):
    """What was used last. A copy of a Supernet starts with an empty one, as skeletons are cheap to make."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, Value] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Cache[Key, Value]:
        return _Cache()

    def get(self, key: Key) -> Value | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Key, value: Value) -> Value:
        self._kept[key] = value
        if len(self._kept) > CACHE_SIZE:
            self._kept.popitem(last=False)
        return value

    def values(self) -> list[Value]:
        return list(self._kept.values())


def _is_run(piece: Piece) -> bool:
    size = 1
    for length in piece.view:
        size *= length
    return piece.cut(torch.empty(size, device="meta")).is_contiguous()


def _share_grads(ties: list[_Tie]) -> None:
    """As backward begins: let the gradients of the leaves add into the right entries of the shared ones."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a Supernet's forward cannot be differentiated twice; call its Model on select(...) instead"
        )
    for leaf, shared, piece, is_run in ties:
        if shared.grad is None:
            shared.grad = torch.zeros_like(shared)
        if is_run:
            leaf.grad = piece.take(shared.grad)  # autograd adds to a gradient that exists in place


def _add_strided(leaf: Tensor, shared: nn.Parameter, piece: Piece) -> None:
    """The same for entries that are not one run: autograd could, but warns that they break its layout contract."""

    def add(leaf: Tensor) -> None:
        assert leaf.grad is not None
        assert shared.grad is not None
        entries = piece.cut(shared.grad)
        entries.add_(leaf.grad.view(entries.shape))
        leaf.grad = None

    leaf.register_post_accumulate_grad_hook(add)


def _register(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register `parameter` under a dotted name, making plain modules on the way."""
    *path, last = name.split(".")
    for step in path:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    root.register_parameter(last, parameter)
