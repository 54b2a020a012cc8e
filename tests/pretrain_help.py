"""A pretraining that takes seconds."""

from __future__ import annotations

from pathlib import Path

FIELDS = {
    "data.max_images": "120",
    "data.batch_size": "32",
    "space.embed_dims": "[16,24]",
    "space.depths": "[1,2]",
    "space.num_heads": "[1,2]",
    "space.mlp_ratios": "[2.0]",
    "space.head_dim": "8",
    "out_dim": "32",
    "hidden_dim": "16",
    "bottleneck_dim": "8",
    "local_crops_number": "1",
    "epochs": "1",
    "looks": "2",
    "supernet.log_every": "1",
    "supernet.checkpoint_minutes": "0",
    "export.formats": "[]",
    "device": "cpu",
    "threads": "1",
}


def pretrain_words(folder: Path, images: str = "digits", **changes: str | None) -> list[str]:
    """`vitnas pretrain`, small; `data__labels="false"` changes `data.labels`, None leaves a field out."""
    fields = {**FIELDS, **{name.replace("__", "."): value for name, value in changes.items()}}
    given = (f"{name}={value}" for name, value in fields.items() if value is not None)
    return ["pretrain", images, f"folder={folder}", *given]
