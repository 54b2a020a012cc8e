"""Transformer-LS (Zhu et al., arXiv 2107.02192): long-short attention on fine grids, full attention on coarse ones.

Its parts: `mixers/long_short.py`, `layers/reduction.py` (stages that begin with patches), `layers/position_bias.py`,
`model/transformer_ls.py` (the networks by name). The paper itself searches nothing. Deviations: PAPERS.md.
"""

from __future__ import annotations

from dataclasses import replace

from vitnas.data import AUGMENTS, DataConfig
from vitnas.recipes.tour import on_digits
from vitnas.space import AroundConfig, UnifiedConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig
from vitnas.train import TrainConfig


def transformer_ls() -> Run:
    """The Space around Transformer-LS-Medium at 224 pixels, trained by its schedule; needs GPUs and days."""
    train = TrainConfig(
        epochs=300,
        lr=8e-4,
        weight_decay=0.1,
        warmup_epochs=5,
        min_lr=1e-6,
        drop_path=0.3,
        clip_grad=None,
        monitor_every=10,
        precision="bf16",
    )
    return Run(
        recipe="transformer_ls",
        budget="macs<=70%",
        data=DataConfig(
            dataset="imagenet",
            image_size=224,
            batch_size=1024,
            workers=16,
            augment=AUGMENTS["strong"],
            holdout=25_000,
        ),
        space=AroundConfig(network="transformer_ls_medium"),
        supernet=replace(train, epochs=120, drop_path=0.1),
        search=SearchConfig(searcher="evolution", num_trials=500),
        retrain=RetrainConfig(train=replace(train, monitor_every=0), rank_archs=0),
    )


def transformer_ls_tour() -> Run:
    """Stages with windows and mixtures, or full attention, on the handwritten digits, in minutes."""
    base = on_digits()
    return replace(
        base,
        recipe="transformer_ls_tour",
        space=UnifiedConfig(
            size="micro",
            stems=("linear",),
            patch_sizes=(1, 2),
            reductions=("patch",),
            depths=(2, 2),
            embed_dims=((24, 32, 48), (48, 64, 80)),
            mixers=("long_short", "softmax"),
        ),
        supernet=replace(base.supernet, epochs=25, warmup_epochs=2),
        search=SearchConfig(searcher="evolution", num_trials=30),
        retrain=RetrainConfig(train=replace(base.retrain.train, epochs=25, warmup_epochs=2), rank_archs=0),
    )
