"""Networks folded out of the ordered supernet of a slim run, each held against the original."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.data import EvalBatches
from vitnas.exporting import save_timm
from vitnas.exporting.quick import export_quickly
from vitnas.layers.axes import named_axes, named_tensors
from vitnas.model import Model
from vitnas.model.named import ArchFile
from vitnas.records import Candidate, Forecast, Member, Order
from vitnas.runs import writing
from vitnas.slimming import Agreement, Standing, fold, standings
from vitnas.slimming.folding import Compensation
from vitnas.stages.results import export_files
from vitnas.stages.run import ExportConfig
from vitnas.stages.searching import Inherited
from vitnas.stages.slim.original import SlimImages, calibration
from vitnas.stages.work import Work
from vitnas.supernet import Supernet
from vitnas.train import Progress

BATCH = 64  # images at once while activations are kept


@torch.no_grad()
def restored(model: Model, order_D: Tensor) -> Model:
    """The channels of a network's stream in another order, in place; what it computes stays, up to rounding."""
    axes = named_axes(model)
    for name, tensor in named_tensors(model).items():
        sizes = axes.get(name, ())
        for place in (i for i, (axis, _) in enumerate(sizes) if axis == "dim"):
            by_axes = tensor.view([size for _, size in sizes])
            by_axes.copy_(by_axes.index_select(place, order_D))
    return model


def damage(found: Agreement) -> float:
    """In one number: how far the final tokens turned away."""
    return 1 - found.cosine


class Told:
    """Batches whose taking is told."""

    def __init__(self, batches: EvalBatches, progress: Progress, stage: str) -> None:
        self.batches, self.progress, self.stage = batches, progress, stage

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            self.progress.update(self.stage, number, len(self.batches))
            yield batch
        self.progress.update(self.stage, len(self.batches), len(self.batches))


class Folded(Inherited):
    """The ordered supernet of a slim run, and the networks that come out of it.

    Args:
        original: the network itself, as it was found.
        number: train images that activations are taken from.
    """

    def __init__(
        self,
        work: Work,
        images: SlimImages,
        make: Callable[[], Supernet],
        original: Model,
        number: int,
    ) -> None:
        super().__init__(work, images, make)
        self.images: SlimImages = images
        self.original, self.number = original, number

    @cached_property
    def calibration(self) -> EvalBatches:
        """What activations are taken from."""
        return self.batches(calibration(self.images, self.number))

    @cached_property
    def holdout(self) -> EvalBatches:
        """What members are held against the original on."""
        return self.batches(self.images.data.holdout)

    def batches(self, images: Any) -> EvalBatches:
        """`images` in order, few enough at once for their activations to be kept."""
        return EvalBatches(images, batch_size=BATCH, workers=self.images.config.workers)

    @property
    def has_learned(self) -> bool:
        """The supernet was trained."""
        return Forecast.read(self.work.folder).effort == "search"

    def made(self, arch: Arch, *, folded: bool = True) -> Model:
        """The network of `arch`, its channels in the order of the original's, and with what is removed made up for."""
        compensation: Compensation = "ridge" if folded else "none"
        model = fold(self.supernet, arch, self.calibration, compensation=compensation)
        order = Order.read(self.work.folder).width[: arch.embed_dim]
        return restored(model, torch.argsort(torch.tensor(order))) if order else model

    def best(
        self, candidates: Sequence[Candidate], archs: Mapping[str, Arch]
    ) -> tuple[Candidate, Model, Standing]:
        """Of several proposals the one that agrees best once it is folded, and how it does on the holdout; where the
        supernet has learned to be good at every size, or else as it comes out of it."""
        made = [
            (candidate, self.made(archs[candidate.arch_id], folded=folded))
            for candidate in candidates
            for folded in ((True, False) if self.has_learned else (True,))
        ]
        found = self.compared([model for _, model in made], self.holdout)
        pairs = [(candidate, model, each) for (candidate, model), each in zip(made, found, strict=True)]
        return min(pairs, key=lambda each: damage(each[2].agreement))

    def compared(self, models: Sequence[Model], batches: EvalBatches | Told) -> list[Standing]:
        """How networks agree with the original, and their accuracy where there are labels."""
        device = self.work.engine.device
        on_device = [model.to(device) for model in models]
        return standings(on_device, self.original.to(device), batches, labels=self.images.has_labels)

    def member(
        self,
        folder: Path,
        budget: str,
        candidate: Candidate,
        model: Model,
        found: Standing,
        files: ExportConfig,
    ) -> Member:
        """Write a network, which does as `found` says on the holdout, as a folder of timm's and as verified files."""
        start = time.monotonic()
        model = model.cpu()
        with writing(folder):
            save_timm(model, folder, **self.images.about)
        ArchFile(model.arch).write(folder)
        export_files(self.images, model, folder, files, export_quickly).write(folder)
        member = Member(
            folder=str(folder.relative_to(self.work.folder)),
            arch_id=model.arch.id,
            budget=budget,
            cost=count(model.arch),
            predicted=candidate.damage,
            measured=damage(found.agreement),
            agreement=found.agreement,
            accuracy=found.accuracy,
            seconds=time.monotonic() - start,
        )
        member.write(folder)
        return member
