"""Manifold distillation (Hao et al., arXiv 2107.01378): a teacher's logits and how its patches lie, without labels.

Its parts: `train/losses/manifold.py`, `train/losses/soft.py` and `train/losses/distillation.py`; weights, pairs of
blocks and the schedule are those of the published command. Deviations: PAPERS.md.
"""

from __future__ import annotations

from dataclasses import replace

from vitnas.data import DataConfig
from vitnas.recipes.tour import on_digits
from vitnas.space import AutoFormerConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig
from vitnas.train import TeacherConfig, TrainConfig


def manifold() -> Run:
    """ViTs of DeiT-Ti's cost that learn from CaiT-S24 on a folder of images at 224 pixels. Needs a GPU and days."""
    train = TrainConfig(
        epochs=300,
        lr=5e-4,
        warmup_epochs=5,
        min_lr=1e-5,
        drop_path=0.0,
        clip_grad=None,
        monitor_every=25,
        precision="bf16",
    )
    return Run(
        recipe="manifold",
        budget="macs<=1.3G",
        data=DataConfig(
            dataset="imagenet", image_size=224, batch_size=512, workers=16, augment="strong", holdout=10_000
        ),
        space=AutoFormerConfig(size="tiny", patch_size=16, relative_position=0),
        teacher=TeacherConfig(
            network="cait_s24_224", losses=("soft", "manifold"), label_weight=0.0, compare=True
        ),
        supernet=train,
        search=SearchConfig(searcher="evolution", num_trials=1000),
        retrain=RetrainConfig(train=replace(train, monitor_every=0), rank_archs=0),
    )


def manifold_tour() -> Run:
    """The digits again, at half the MACs and learned from the tour's chosen Model: `vitnas run tour` comes first."""
    run = on_digits()
    return replace(
        run,
        recipe="manifold_tour",
        teacher=TeacherConfig(
            network="runs/tour/models/chosen", losses=("soft", "manifold"), label_weight=0.0, compare=True
        ),
        budget="macs<=700K",
        supernet=replace(run.supernet, epochs=30),
        search=replace(run.search, num_trials=40),
        retrain=replace(run.retrain, baselines=("hand_scaled",), rank_archs=0),
    )
