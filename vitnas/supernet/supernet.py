"""Supernet: a table of shared tensors that can act as every Arch of a Space.

    forward(images, arch) = skeleton(arch) run on select(supernet, arch)

The Arch is an argument, never a state. Nothing here knows what a layer computes.

Without gradients an answer is bit for bit that of the extracted Model. With them it runs on views, for which libraries
may choose other kernels, and may differ from it in the last bits (`supernet/borrow.py`).

Gradients appear in `parameter.grad` after `backward()`, as usual, but one node puts them there and not autograd's own
for each leaf. So `torch.autograd.grad` with respect to the shared tensors does not see them (use `select` for that),
and hooks on parameters are called for whole tensors only, not for those that an Arch cuts. torch's DDP works by such
hooks and would leave each process its own gradients, without a word; `Engine.average_gradients` averages all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vitnas.arch import Arch, Block
from vitnas.grids import Grid, sides_of
from vitnas.layers.axes import Axes, merge_axes, named_axes, named_tensors
from vitnas.model import Model
from vitnas.model.blocks import drop_path_rates, make_block
from vitnas.model.build import storage_free
from vitnas.model.outputs import output_names
from vitnas.model.sizes import see
from vitnas.space import Space
from vitnas.supernet.borrow import Loan, home_of, lend_when_run
from vitnas.supernet.sharing import Entries, Piece, Place, Sharing
from vitnas.supernet.tensors import base_name, fill, option_of, shared_axes, shared_name

CACHE_SIZE = 1024  # skeletons and blocks kept; each is some hundred small Python objects and no storage
# What a block may depend on, besides.
FIXED = tuple(field.name for field in fields(Arch) if field.name != "stages")

Key = TypeVar("Key")
Value = TypeVar("Value")


class Supernet(nn.Module):
    """Shared weights for all of `space`.

    Args:
        space: the Archs it can act as.
        sharing: which entries an Arch uses; prefix sharing by default.
        drop_path: stochastic depth at the last block of the deepest Arch; rates follow a block's slot.
        generator: source of the initial weights.

    The state dict has the names of the largest Arch's Model (timm's names), and `private.<by>_<option>.<name>` for
    tensors that only one option uses. Buffers (running statistics) are shared too: what a forward pass in training mode
    updates are the shared ones.

    One Supernet is not for several threads at once: while an Arch runs, its weights are lent to a Model that is kept,
    and to blocks that other Archs run on too. Give each thread a copy.
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
        self.sharing = sharing or Sharing(private=space.private)
        self.drop_path = drop_path
        self.dynamic_img_size = False  # take smaller images too (`model/sizes.py`)
        self._cache: _Cache[tuple[Arch, int, Grid | None], _Subnet] = _Cache()
        self._blocks: _Cache[Hashable, _Subnet] = _Cache()
        self._changes = 0
        self.axes, lives = shared_axes(space, self.sharing)
        parameters, buffers = fill(space, self.axes, lives, generator)
        for name, parameter in parameters.items():
            path, last = _home(self, name)
            path.register_parameter(last, parameter)
        for name, (buffer, is_persistent) in buffers.items():
            path, last = _home(self, name)
            path.register_buffer(last, buffer, persistent=is_persistent)
        self._homes = [home_of(self, name) for name in (*parameters, *buffers)]
        self._storages = self._find_storages()

    @property
    def sides(self) -> int:
        """Weight sets of one Arch that train together (2 for bilateral sharing); extraction gives the first."""
        return self.sharing.sides

    @property
    def output_names(self) -> list[str]:
        """What `want` can name, of some Arch at least: `blocks.11` of deep ones alone, for example."""
        skeletons = [self.subnet(arch).skeleton for arch in self.space.representatives()]
        return list(dict.fromkeys(name for skeleton in skeletons for name in output_names(skeleton)))

    def forward(
        self, images_BCHW: Tensor, arch: Arch, *, want: Sequence[str] | None = None, side: int = 0
    ) -> Any:
        """(B, C, H, W) images to (B, Y) logits of `arch`; with `want` to the outputs of these names.

        Args:
            want: names as in `model/outputs.py`.
            side: which of its `sides` weight sets; 0 is the one that is extracted.

        Raises:
            UserError: `arch` is not in the Space (all reasons are given), or has no such output.
        """
        self._forget_if_moved()
        size = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        other = self.dynamic_img_size and size != sides_of(arch.image_size)
        return self.subnet(arch, side, size if other else None).skeleton(images_BCHW, want=want)

    def train(self, mode: bool = True) -> Supernet:
        """Training or evaluation mode; what is kept follows when it is next used, as going through it takes long."""
        self._changes += mode != self.training
        return super().train(mode)

    def set_drop_path(self, rate: float) -> None:
        """Change the rate of stochastic depth at the last block of the deepest Arch."""
        if rate != self.drop_path:
            self.drop_path = rate
            self._cache, self._blocks = _Cache(), _Cache()

    def _forget_if_moved(self) -> None:
        """What is kept holds views of the shared tensors; after `.to()` and the like these are others."""
        storages = self._find_storages()
        if storages != self._storages:
            self._storages, self._cache, self._blocks = storages, _Cache(), _Cache()

    def _find_storages(self) -> list[int]:
        return [tensors[name].data_ptr() for tensors, name in self._homes]

    def no_weight_decay(self) -> set[str]:
        """Parameters besides biases and norms that are not decayed; optimizers ask for it."""
        skeleton = self.subnet(self.space.largest()).skeleton
        assert isinstance(skeleton, Model)
        kept = skeleton.no_weight_decay()
        return {name for name, _ in self.named_parameters() if base_name(name) in kept}

    def subnet(self, arch: Arch, side: int = 0, size: Grid | None = None) -> _Subnet:
        """The storage-free Model of `arch` and where its parameters lie; kept, as making it costs milliseconds.

        Args:
            size: of the images, where it is not the Arch's.
        """
        found = self._cache.get((arch, side, size))
        if found is None:
            found = self._cache.put((arch, side, size), self._make_subnet(arch, side, size))
        # Not the skeleton's own mode, as other Archs set that of shared blocks.
        if found.changes != self._changes:
            found.skeleton.train(self.training)
            found.changes = self._changes
        return found

    def _make_subnet(self, arch: Arch, side: int, size: Grid | None) -> _Subnet:
        self.space.check(arch)
        place = self.sharing.place(arch, side)
        slots = self.space.slots(arch)
        rates = drop_path_rates(self.drop_path, self.space.largest().depth)
        stages = [index for index, stage in enumerate(arch.stages) for _ in stage.blocks]
        blocks = [
            self._block(arch, stage, block, slot, rates[slot], place, size)
            for stage, block, slot in zip(stages, arch.blocks, slots, strict=True)
        ]
        with storage_free():
            skeleton = Model(arch, blocks=[block.skeleton for block in blocks])
            if size is not None:
                see(skeleton, size)
        axes = named_axes(skeleton, without="blocks")
        inner = [name for name, _ in skeleton.named_buffers() if not name.startswith("blocks.")]
        option = partial(option_of, arch, None)
        loans = self._loans(skeleton, axes, inner, lambda name: shared_name(name, slots)[0], option, place)
        for index, block in enumerate(blocks):
            loans |= {f"blocks.{index}.{name}": loan for name, loan in block.loans.items()}
        lend_when_run(skeleton, tuple(loans.values()))
        return _Subnet(skeleton.train(self.training), loans)

    def _block(
        self,
        arch: Arch,
        stage: int,
        block: Block,
        slot: int,
        drop_path: float,
        place: Place,
        size: Grid | None,
    ) -> _Subnet:
        """A block of `arch` without storage. Archs that agree in a slot share it: a fresh Arch is mostly known ones."""
        fixed = (*(getattr(arch, name) for name in FIXED), arch.prefix_tokens[stage])
        dim, grid = arch.stages[stage].embed_dim, arch.grids[stage]
        key = (slot, dim, grid, replace(block, slot=None, keep=None), fixed, place, size)
        found = self._blocks.get(key)
        if found is None:
            with storage_free():
                made = make_block(arch, stage, block, drop_path).train(self.training)
            inner = [name for name, _ in made.named_buffers()]
            option = partial(option_of, arch, block)
            loans = self._loans(made, named_axes(made), inner, f"blocks.{slot}.".__add__, option, place)
            found = self._blocks.put(key, _Subnet(made, loans))
        return found

    def _loans(
        self,
        module: nn.Module,
        axes: dict[str, Axes],
        buffers: list[str],
        called: Callable[[str], str],
        option: Callable[[str], object],
        place: Place,
    ) -> dict[str, Loan]:
        """Where parameters and buffers of `module` lie; `called` gives the shared tensors' names."""
        tensors: dict[str, Tensor] = {
            name: module.get_parameter(name) for name in axes if name not in buffers
        }
        tensors |= {name: module.get_buffer(name) for name in buffers}
        loans = {}
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            if name in axes:
                homes = self.sharing.homes(called(name), merge_axes(axes[name], self.space.merged), option)
                piece = self.sharing.piece(name, homes, self.axes, shape, place)
            else:
                piece = self._whole(name, called(name), shape)
            loans[name] = Loan(module, self, piece)
        return loans

    def _whole(self, name: str, shared: str, shape: tuple[int, ...]) -> Piece:
        """A buffer without named axes: every Arch uses all of it."""
        if (given := tuple(self.get_buffer(shared).shape)) != shape:
            raise LookupError(
                f"buffer {name} is {shape}, {shared} is {given}; its module must list it in axes()"
            )
        return Piece(name, shape, shape, (Entries(shared, shape, (), ()),))


def select(supernet: Supernet, arch: Arch, side: int = 0) -> dict[str, Tensor]:
    """The weights of `arch`: for every parameter and buffer of `build(arch)`, by its name, a view of a shared tensor.

    Where entries do not lie evenly spaced in one tensor (fewer heads of a fused qkv) the view is a differentiable copy.

    Raises:
        UserError: `arch` is not in the Space.
    """
    table = named_tensors(supernet)
    return {name: loan.piece.take(table) for name, loan in supernet.subnet(arch, side).loans.items()}


@dataclass(slots=True, eq=False)
class _Subnet:
    """A skeleton, and by the names of its tensors where these lie in the shared ones."""

    skeleton: nn.Module
    loans: dict[str, Loan]
    changes: int = -1  # how often the Supernet had changed its mode when the skeleton took it over


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


def _home(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module inside `root` that a dotted name belongs to (plain ones are made on the way), and its last word."""
    *path, last = name.split(".")
    for step in path:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    return root, last
