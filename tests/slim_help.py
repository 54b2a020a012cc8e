"""A small trained network and a run that slims it in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vitnas.arch import Arch, Block, Stage
from vitnas.data import Augment, Data, DataConfig, TrainBatches, open_data
from vitnas.exporting import save_timm
from vitnas.model import Model, build
from vitnas.sample import Fixed
from vitnas.train import Classification, TrainConfig, fit

DIGITS = {"dataset": "digits", "max_images": 360}
ARCH = Arch(
    image_size=8,
    patch_size=2,
    in_chans=1,
    num_classes=10,
    stages=(Stage(embed_dim=24, blocks=(Block(num_heads=3, head_dim=8, mlp_hidden=64),) * 3),),
)

# Everything small; nothing is exported, which takes seconds per file.
FIELDS = {
    "data.dataset": "digits",
    "data.max_images": "360",
    "budget": "macs<=180K",
    "effort": "fold",
    "images": "64",
    "search.num_trials": "20",
    "export.formats": "[]",
    "export.latency": "[]",
    "device": "cpu",
    "threads": "1",
}


def digits(**more: Any) -> Data:
    """Some of the digits."""
    return open_data(DataConfig(**{**DIGITS, **more}))


def trained(arch: Arch = ARCH, epochs: float = 10) -> Model:
    """A network that has learned the digits, a little."""
    data = digits()
    model = build(arch, generator=torch.Generator().manual_seed(0))
    batches = TrainBatches(data.train, Augment(), batch_size=32, seed=0)
    config = TrainConfig(epochs=epochs, lr=1e-2, warmup_epochs=1, monitor_every=0)
    fit(model, Classification(), Fixed(), batches, config=config)
    return model.eval()


def save(model: Model, folder: Path) -> Path:
    """As a user has it: a folder that timm loads, with the digits' mean and std."""
    data = digits()
    names = data.class_names if model.num_classes == data.num_classes else None
    about = {"mean": data.mean, "std": data.std, "crop_pct": 1.0}
    save_timm(model, folder, class_names=names, data_config=about)
    return folder


def slim_words(model: Path | str, folder: Path, **changes: str | None) -> list[str]:
    """`vitnas slim`; `data__labels="false"` changes `data.labels`, None leaves a field out."""
    fields = {**FIELDS, **{name.replace("__", "."): value for name, value in changes.items()}}
    given = (f"{name}={value}" for name, value in fields.items() if value is not None)
    return ["slim", str(model), f"folder={folder}", *given]
