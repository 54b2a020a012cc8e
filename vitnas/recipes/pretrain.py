"""pretrain: a network that has learned from images without labels; as a recipe, and as the call of a library's user."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from vitnas.data import DataConfig
from vitnas.data.given import Given, as_data
from vitnas.probing import Pretrained
from vitnas.space import AutoFormerConfig
from vitnas.stages.claim import go_through
from vitnas.stages.pretrain.context import PretrainContext
from vitnas.stages.run import ExportConfig, PretrainConfig, RetrainConfig, Run, SearchConfig
from vitnas.train import Progress, Silent, TrainConfig

SPACE = AutoFormerConfig(
    size="micro",
    embed_dims=(96, 128, 160),
    depths=(4, 5, 6),
    num_heads=(3, 4, 5),
    mlp_ratios=(2.0, 3.0, 4.0),
    head_dim=32,
)


def pretrain() -> Run:
    """A small ViT, a Supernet or a timm network learns without labels; `vitnas pretrain IMAGES` is the same."""
    return Run(
        recipe="pretrain",
        data=DataConfig(dataset="", batch_size=128, augment="none"),
        space=SPACE,
        supernet=TrainConfig(
            epochs=300,
            lr=5e-4,
            weight_decay=0.04,
            warmup_epochs=10,
            warmup_lr=0.0,
            min_lr=1e-6,
            clip_grad=3.0,
            clip_per_tensor=True,
            monitor_every=0,
        ),
        pretrain=PretrainConfig(),
        search=SearchConfig(),
        retrain=RetrainConfig(baselines=(), rank_archs=0),
        export=ExportConfig(formats=("onnx",), latency=()),
    )


@dataclass(frozen=True)
class Learned:
    """What a pretraining gives.

    Args:
        model: the averaged network, in evaluation mode, without a classifier; it has timm's interface.
        results: what its features are worth, before and after.
        folder: the run folder; `pretrained=FOLDER`, `vitnas slim FOLDER` and timm take it.
    """

    model: nn.Module
    results: Pretrained
    folder: Path


def pretrain_network(
    images: Given,
    *,
    model: str = "vit",
    time: str = "1h",
    epochs: float | None = None,
    folder: Path | str | None = None,
    run: Run | None = None,
    progress: Progress | None = None,
) -> Learned:
    """Let a network learn from images without labels (`vitnas.pretrain`).

    Args:
        images: labels are not needed; where there are some, nearest neighbours are watched by them. See `as_data`.
        model, time, epochs: see `PretrainConfig`.
        folder: the run folder; the same call goes on in it. None makes one among temporary files.
        run: all other fields; the recipe `pretrain` by default.
        progress: told how it goes; silent by default.

    Raises:
        UserError: images or a network that cannot be used, or too little time.
        CollapseError: the training has collapsed.

    >>> vitnas.pretrain("path/to/images", time="2h").model  # doctest: +SKIP
    """
    run, where = run or pretrain(), Path(folder or tempfile.mkdtemp(prefix="vitnas-pretrain-"))
    config = replace(run.pretrain or PretrainConfig(), model=model, time=time, epochs=epochs)
    data = None
    if isinstance(images, str | Path):
        run = replace(run, data=replace(run.data, dataset=str(images)))
    else:
        data = as_data(images, run.data)
        run = replace(run, data=data.config)
    run = replace(run, pretrain=config)
    context = PretrainContext(run, where, progress or Silent(), data)
    go_through(context)
    return Learned(context.result(), Pretrained.read(where), where)
