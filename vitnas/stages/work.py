"""Work and RunImages: what every stage is given beside its own parts of a Run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vitnas.data import Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.data.augment import seed_from
from vitnas.data.folds import fold
from vitnas.errors import UserError
from vitnas.exporting.precision import Judged
from vitnas.grids import ImageSize
from vitnas.measure.latency import LatencyMeter
from vitnas.records import Manifest
from vitnas.runs import load_tensors, save_tensors
from vitnas.train import Engine, Progress

EVAL_BATCH = 512
VERIFY_IMAGES = 64


@dataclass(frozen=True)
class Work:
    """Where a stage works: the run folder, the processes, who is told how it goes, and the run's seed."""

    folder: Path
    engine: Engine
    progress: Progress
    seed: int

    def once(self, path: Path, make: Callable[[], object]) -> None:
        """Make a result unless it is there; other processes wait for the first."""
        self.engine.from_first(lambda: None if path.exists() else make())

    def generator(self, purpose: str) -> torch.Generator:
        """A source of random weights that depends on the run's seed and `purpose` only."""
        return torch.Generator().manual_seed(seed_from(self.seed, purpose))


class RunImages:
    """A run's images as its stages take them; opened when first looked at.

    `pretrained` names the model that the run starts from, whose mean and std they get unless `config` says others.
    """

    def __init__(self, config: DataConfig, work: Work, pretrained: str | None = None) -> None:
        self.config, self.work, self.pretrained = config, work, pretrained

    @cached_property
    def data(self) -> Data:
        """The images.

        Raises:
            UserError: they are not those that the run began with (manifest.json).
        """
        data, folder = self.open(), self.work.folder
        if Manifest.exists(folder) and Manifest.read(folder).data.sha256 != data.fingerprint().sha256:
            raise UserError(
                f"{self.config.dataset} has other images than when {folder} was begun (their sha256 differs from "
                f"{Manifest.FILE}'s). Restore the images, or give another folder=PATH."
            )
        return data

    def open(self) -> Data:
        """The images, opened."""
        return open_data(self.config, pretrained=self.pretrained)

    def resized(self, image_size: ImageSize) -> RunImages:
        """The same images at another size."""
        resized = RunImages(replace(self.config, image_size=image_size), self.work, self.pretrained)
        resized.data = self.data.resized(image_size)
        return resized

    def fold(self, number: int) -> RunImages:
        """The same images with another part of train held out (`vitnas.data.folds`)."""
        if not number:
            return self
        other = RunImages(self.config, self.work, self.pretrained)
        other.data = fold(self.data, number)
        return other

    @cached_property
    def holdout(self) -> EvalBatches:
        """What a search and a sampler look at."""
        return self.batches(self.data.holdout)

    def batches(self, images: Any) -> EvalBatches:
        """`images` of this run, in order."""
        return EvalBatches(images, batch_size=EVAL_BATCH, workers=self.config.workers)

    def train_batches(self, stage: str, epoch_views: int | None = None) -> TrainBatches:
        """Varied train images, in an order of the stage's own; `epoch_views` as TrainBatches has them."""
        return TrainBatches(
            self.data.train,
            self.data.augment,
            batch_size=self.config.batch_size,
            seed=seed_from(self.work.seed, stage),
            rank=self.work.engine.rank,
            world=self.work.engine.world,
            workers=self.config.workers,
            epoch_views=epoch_views,
            balance=self.config.balance,
        )

    def some(self) -> Tensor:
        """A few held-out images, as the models take them: of the first batch, which has enough."""
        images_BCHW, _ = next(iter(self.holdout))
        return images_BCHW[:VERIFY_IMAGES]

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.work.folder

    @property
    def has_labels(self) -> bool:
        """Whether the images have the network's classes."""
        return bool(self.data.class_names)

    @cached_property
    def judged(self) -> Judged:
        """The held-out images, by which files of another precision are made and judged."""
        return Judged(list(self.holdout), self.has_labels)

    @property
    def about(self) -> dict[str, Any]:
        """What is written beside a model: its classes, and what a user must do to an image."""
        return {
            "class_names": self.data.class_names or None,
            "data_config": self.data.holdout.form.cfg,
        }


def quick_meter(target: str) -> LatencyMeter:
    """A meter that is quick enough to time every Arch of a search, each once."""
    return LatencyMeter(target, runs=30, seconds=0.5, cache={})


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's weights as safetensors, in one step."""
    save_tensors(path, network.state_dict())


def load_weights(network: nn.Module, path: Path, command: str) -> None:
    """Read weights that `save_weights` wrote.

    Raises:
        UserError: no such file (naming the command that writes it), a damaged one, or weights of another network.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; `{command}` writes it. Run that first.")
    try:
        network.load_state_dict(load_tensors(path)[0])
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run `{command}` again.") from error
