"""Tasks: pure functions from a network's outputs, the batch and what a teacher says to losses by name.

A Task runs no network. It names the outputs that it wants, and `fit` reads them. Beside the names of `model/outputs.py`
it may say of which view of the batch, and that a Supernet's weight sets are added up:

    head                    of the first view
    views.3.head            of the fourth view (views of one size run together)
    sides.sum.head          the sum over all weight sets of the Arch; sides.mean.head their mean
    views.3.sides.sum.head  both
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.data import Augment
from vitnas.data.config import LabelKind
from vitnas.errors import UserError
from vitnas.grids import Grid
from vitnas.model.outputs import read_outputs
from vitnas.train.gives import Gives

Outputs = Mapping[str, Tensor]


class At(NamedTuple):
    """Which batch it is: where `place` is the same, so are the images, if they can still be read. `mark`, never 0, is
    of their pixels before mixing."""

    place: int
    mark: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Images and what to learn from them.

    Attributes:
        views: (B, C, H, W) float images, one tensor per view of the same B pictures; most batches have one.
        targets: (B,) class numbers, or (B, Y) probabilities after mixing; (B, 0) where images have no labels.
        kind: of `classes` targets are (B, Y), how much each image has of each class, of any number of which it may be;
            of `numbers` (B, T), which are to be told.
        patch_targets: (B, N, Y) probabilities per patch, or None.
        at: which of the batches that come again, where one does.
    """

    views: tuple[Tensor, ...]
    targets: Tensor
    patch_targets: Tensor | None = None
    at: At | None = None
    kind: LabelKind = "class"

    @property
    def images_BCHW(self) -> Tensor:
        """The first view."""
        return self.views[0]

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, rows: slice) -> Batch:
        """Some of the pictures, in all views."""
        patches = None if self.patch_targets is None else self.patch_targets[rows]
        views = tuple(view[rows] for view in self.views)
        return Batch(views, self.targets[rows], patches, kind=self.kind)


class Task:
    """Base of all Tasks. `loss` is what is minimised, the other losses are only logged.

    Attributes:
        wants: outputs of the network that learns.
        wants_taught: outputs of the teacher, which is the Teacher of `fit`, or where there is none and the Sampler says
            `distill` the first Draw of the step. A name that ends in "?" may be left untaught.
        own: what the Task trains itself beside the network (a projection of its features). `fit` moves, trains and
            checkpoints it; it is in no result.
    """

    wants: tuple[str, ...] = ("logits",)
    wants_taught: tuple[str, ...] = ()
    own: nn.Module | None = None

    def meet(self, student: Gives, teacher: Gives) -> Task:
        """The Task between these two networks, with its `own`. Called once, before training, where there is a teacher;
        may draw from the global generators.

        Raises:
            UserError: the one cannot learn this from the other.
        """
        return self

    def mix(self, batch: Batch) -> Batch:
        """Called once per batch, before the Archs of a step share it; may draw from the global generators."""
        return batch

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        """Losses by name; pure. `taught` is empty where nobody teaches."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TaskGiven:
    """What a run gives a Task.

    Attributes:
        augment: of the images, which may mix them.
        num_classes: of the labels.
        grid: rows and columns of patches in the last stage of what trains.
    """

    augment: Augment
    num_classes: int
    grid: Grid


@dataclass(frozen=True, kw_only=True)
class TaskConfig(ABC):
    """What is learned: a kind of Task and its fields, from which it is built."""

    kind: ClassVar[str]
    learns_from_archs: ClassVar[bool] = False  # takes another Arch's logits beside the labels
    heads: ClassVar[tuple[str, ...]] = ()  # fields of the Archs that learn this, which are then True
    needs_heads: ClassVar[bool] = False  # cannot do without them
    needs_selections: ClassVar[bool] = False  # learns how many patches are kept
    needs_labels: ClassVar[bool] = True  # images without labels are refused

    @abstractmethod
    def build(self, given: TaskGiven) -> Task:
        """The Task.

        Raises:
            UserError: it does not go with the rest of the run.
        """


def read_views(
    network: nn.Module,
    views: Sequence[Tensor],
    want: Sequence[str],
    *,
    arch: Arch | None = None,
    convert: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The outputs that a Task wants, by the names that it gave them (without "?").

    Args:
        convert: makes the images of a view what this network was made for.

    Raises:
        UserError: an output that the network has not, or a view that the batch has not.
    """
    found: dict[str, Tensor] = {}
    for combine, asked in _plan(tuple(want)).items():
        together: dict[tuple[torch.Size, tuple[str, ...]], list[int]] = {}
        for view, names in asked.items():
            if view >= len(views):
                raise UserError(
                    f"the task wants an output of view {view}; the batches have {len(views)}, counted from 0. Use a "
                    "loader that gives more views."
                )
            together.setdefault((views[view].shape, tuple(names)), []).append(view)
        for (_, wants), numbers in together.items():
            images_BCHW = views[numbers[0]] if len(numbers) == 1 else torch.cat([views[i] for i in numbers])
            outputs = _read_sides(
                network, images_BCHW if convert is None else convert(images_BCHW), wants, arch, combine
            )
            for name, output in outputs.items():
                for number, part in zip(numbers, output.chunk(len(numbers)), strict=True):
                    found |= {
                        full: part for full in asked[number].get(name, asked[number].get(f"{name}?", []))
                    }
    return found


def bare_names(want: Sequence[str]) -> list[str]:
    """The network's own names among those that a Task gives, with the "?"."""
    return [name for views in _plan(tuple(want)).values() for names in views.values() for name in names]


@cache
def _plan(want: tuple[str, ...]) -> dict[str | None, dict[int, dict[str, list[str]]]]:
    """How sides are combined -> view -> the network's own name -> the names that were asked for."""
    plan: dict[str | None, dict[int, dict[str, list[str]]]] = {}
    for full in want:
        match = re.fullmatch(r"(?:views\.(\d+)\.)?(?:sides\.(sum|mean)\.)?(.+)", full)
        assert match is not None
        view, combine, name = match.groups()
        asked = plan.setdefault(combine, {}).setdefault(int(view or 0), {})
        asked.setdefault(name, []).append(full.removesuffix("?"))
    return plan


def _read_sides(
    network: nn.Module, images_BCHW: Tensor, names: Sequence[str], arch: Arch | None, combine: str | None
) -> dict[str, Tensor]:
    sides = 1 if arch is None or combine is None else int(getattr(network, "sides", 1))
    outputs = read_outputs(network, images_BCHW, names, arch=arch)
    for side in range(1, sides):
        more = read_outputs(network, images_BCHW, names, arch=arch, side=side)
        outputs = {name: output + more[name] for name, output in outputs.items()}
    if combine == "mean" and sides > 1:
        outputs = {name: output / sides for name, output in outputs.items()}
    return outputs
