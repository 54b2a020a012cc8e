"""ViT-ResNAS (Liao, Karaman, Sze, arXiv 2109.00642): multi-stage transformers, several Archs per step, token mixup.

Its parts: `space/vit_resnas.py` (stages, blocks that may go), `layers/reduction.py`, `layers/stem.py` (the networks),
`sample/spread.py` (values dealt out, widths that open), `train/rewiring.py` with `supernet/rewire.py`,
`train/losses/token_mixup.py`, and `searching/evolution.py` with `searching/shrinking.py` (`searcher="vit_resnas"`).
Deviations: PAPERS.md.
"""

from __future__ import annotations

from dataclasses import replace

from vitnas.data import Augment, DataConfig
from vitnas.sample import SpreadConfig
from vitnas.space import ViTResNASConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig
from vitnas.train import TokenMixupConfig, TrainConfig


def vit_resnas() -> Run:
    """ViT-ResNAS-Tiny on a folder of images at 224 pixels, at the MACs of ViT-Res-Tiny. Needs a GPU and days."""
    train = TrainConfig(
        epochs=120,
        lr=1e-3,
        warmup_epochs=5,
        min_lr=1e-5,
        drop_path=0.2,
        clip_grad=None,
        monitor_every=10,
        precision="bf16",
    )
    augment = Augment(
        hflip=0.5, scale=(0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, label_smoothing=0.1
    )
    return Run(
        recipe="vit_resnas",
        budget="1.7495G<=macs<=1.7944G",
        data=DataConfig(
            dataset="imagenet", image_size=224, batch_size=1024, workers=16, augment=augment, holdout=25_000
        ),
        space=ViTResNASConfig(size="sr_tiny_mh", patch_size=14),
        sampler=SpreadConfig(num_archs=16, warmup_epochs=30, rewire=True),
        task=TokenMixupConfig(),
        supernet=train,
        search=SearchConfig(
            searcher="vit_resnas", score="accuracy", num_trials=3350, objectives=("accuracy",)
        ),
        retrain=RetrainConfig(train=replace(train, epochs=300, ema=0.99996, monitor_every=0), rank_archs=0),
    )


def vit_resnas_cifar() -> Run:
    """The space scaled to 32-pixel colour images (patch 2; 16, 8 and 4 patches along a side); a GPU, or patience."""
    train = TrainConfig(epochs=120, lr=1e-3, warmup_epochs=5, drop_path=0.1, monitor_every=10)
    return Run(
        recipe="vit_resnas_cifar",
        budget="78M<=macs<=80M",
        data=DataConfig(
            dataset="torch/cifar10",
            batch_size=256,
            augment=Augment(shift=0.125, hflip=0.5, re_prob=0.25, label_smoothing=0.1),
            holdout=5000,
        ),
        space=ViTResNASConfig(
            size="micro",
            patch_size=2,
            embed_dims=(28, 32, 36, 40, 44),
            depths=(6, 6, 6),
            num_heads=(2, 3, 4),
            mlp_ratios=(1.5, 2.0, 2.5, 3.0),
            head_dim=16,
        ),
        sampler=SpreadConfig(num_archs=4, warmup_epochs=30, rewire=True),
        task=TokenMixupConfig(),
        supernet=train,
        search=SearchConfig(searcher="evolution", num_trials=500, objectives=("accuracy",)),
        retrain=RetrainConfig(train=replace(train, epochs=300), rank_archs=8, rank_epochs=30),
    )
