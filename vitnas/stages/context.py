"""Context: a run folder opened for work. Each thing is read once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vitnas.budget import Budget
from vitnas.data import Augment, Data, EvalBatches, TrainBatches, open_data
from vitnas.data.augment import seed_from
from vitnas.data.config import augment_for
from vitnas.errors import UserError
from vitnas.measure.latency import LatencyMeter
from vitnas.records import Manifest
from vitnas.runs import write_with
from vitnas.space import SPACES, Space, SpaceConfig
from vitnas.stages.run import Run
from vitnas.supernet import Supernet, make_sharing
from vitnas.train import Engine, Progress, Silent, TaskConfig

EVAL_BATCH = 512


class Context:
    """A Run, its folder, and what its stages share."""

    def __init__(self, run: Run, folder: Path, progress: Progress | None = None) -> None:
        self.run, self.folder = run, folder
        self._progress: Progress = progress or Silent()
        if run.threads is not None:
            torch.set_num_threads(run.threads)

    @cached_property
    def engine(self) -> Engine:
        return Engine(
            precision=self.run.supernet.precision,
            cpu=self.run.device == "cpu",
            trackers=self.run.trackers,
            folder=self.folder,
        )

    @cached_property
    def progress(self) -> Progress:
        """The first process tells; the others are silent."""
        return self._progress if self.engine.is_main else Silent()

    @cached_property
    def data(self) -> Data:
        """The run's images.

        Raises:
            UserError: they are not those that the run began with (manifest.json).
        """
        data = open_data(self.run.data)
        if Manifest.exists(self.folder):
            if Manifest.read(self.folder).data.sha256 != data.fingerprint().sha256:
                raise UserError(
                    f"{self.run.data.dataset} has other images than when {self.folder} was begun (their sha256 differs "
                    f"from {Manifest.FILE}'s). Restore the images, or give another folder=PATH."
                )
        return data

    @cached_property
    def augment(self) -> Augment:
        return augment_for(
            self.run.data.augment, image_size=self.data.image_size, in_chans=self.data.in_chans
        )

    @cached_property
    def space(self) -> Space:
        return make_space(self.run.space, self.data, self.run.task)

    @cached_property
    def budget(self) -> Budget:
        return Budget.parse(self.run.budget) if self.run.budget else Budget()

    @cached_property
    def holdout(self) -> EvalBatches:
        return EvalBatches(self.data.holdout, batch_size=EVAL_BATCH, workers=self.run.data.workers)

    def train_batches(self, stage: str) -> TrainBatches:
        """Varied train images, in an order of the stage's own."""
        return TrainBatches(
            self.data.train,
            self.augment,
            batch_size=self.run.data.batch_size,
            seed=seed_from(self.run.seed, stage),
            rank=self.engine.rank,
            world=self.engine.world,
            workers=self.run.data.workers,
        )

    def generator(self, purpose: str) -> torch.Generator:
        """A source of random weights that depends on the run's seed and `purpose` only."""
        return torch.Generator().manual_seed(seed_from(self.run.seed, purpose))

    def new_supernet(self) -> Supernet:
        sharing = self.run.sharing
        return Supernet(
            self.space,
            sharing=make_sharing(
                self.space,
                sharing.coupling,
                private_tokens=sharing.private_tokens,
                private_heads=sharing.private_heads,
            ),
            generator=self.generator("supernet"),
        )

    @cached_property
    def supernet(self) -> Supernet:
        """The trained supernet of this run."""
        supernet = self.new_supernet()
        load_weights(supernet, self.folder / "supernet.safetensors", "vitnas train")
        return supernet.to(self.engine.device).eval()

    @cached_property
    def meters(self) -> dict[str, LatencyMeter]:
        """One meter per latency target that the budget or the objectives name, quick enough for a search."""
        named = [name.partition("@")[2] for name in self.run.search.objectives if name.startswith("latency")]
        targets = dict.fromkeys((*self.budget.latency_targets, *filter(None, named)))
        return {target: LatencyMeter(target, runs=30, seconds=0.5, cache={}) for target in targets}

    @property
    def data_config(self) -> dict[str, Any]:
        """What a user of the model must do to an image."""
        return {
            "mean": self.data.mean,
            "std": self.data.std,
            "interpolation": self.run.data.interpolation,
            "crop_pct": self.data.holdout.form.crop_pct,
        }

    def once(self, path: Path, make: Callable[[], object]) -> None:
        """Run a stage unless its result is there; other processes wait for the first."""
        self.engine.from_first(lambda: None if path.exists() else make())


def make_space(config: SpaceConfig, data: Data, task: TaskConfig | None = None) -> Space:
    """The Space for these images, with the heads that the task learns by.

    Raises:
        UserError: the Space's Archs have no such head, or what the Space refuses.
    """
    heads = task.heads if task else ()
    has = [head for head in heads if head in SPACES[config.kind].space.__dataclass_fields__]
    if task and task.needs_heads and len(has) < len(heads):
        able = [word for word, kind in SPACES.items() if set(heads) <= set(kind.space.__dataclass_fields__)]
        raise UserError(
            f"task.kind is {task.kind!r}; it needs Archs with a {' and a '.join(heads)}, which space.kind "
            f"{config.kind!r} has not. Use {', '.join(able)}, or task.kind 'classification'."
        )
    return config.build(
        image_size=data.image_size,
        in_chans=data.in_chans,
        num_classes=data.num_classes,
        **dict.fromkeys(has, True),
    )


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's weights as safetensors, in one step."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_with(path, lambda file: save_file(state, file))


def load_weights(network: nn.Module, path: Path, command: str) -> None:
    """Read weights that `save_weights` wrote.

    Raises:
        UserError: no such file (naming the command that writes it), a damaged one, or weights of another network.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; `{command}` writes it. Run that first.")
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and run `{command}` again.") from error
