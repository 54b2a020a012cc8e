"""AutoFormer (Chen et al., arXiv 2107.00651): uniform sampling in an elastic ViT space, evolution on inherited weights.

Its parts: `space/autoformer.py` (genes, 2-D relative positions), `supernet/` with prefix sharing ("weight
entanglement"), `sample/uniform.py`, `searching/evolution.py` with the paper's settings (`searcher="autoformer"`).
Deviations: PAPERS.md.
"""

from __future__ import annotations

from vitnas.data import AUGMENTS, DataConfig
from vitnas.sample import UniformConfig
from vitnas.space import AutoFormerConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig
from vitnas.train import TrainConfig


def autoformer() -> Run:
    """AutoFormer-T on a folder of images at 224 pixels: 500 epochs, the paper's search. Needs a GPU and days."""
    train = TrainConfig(
        epochs=500,
        lr=1e-3,
        warmup_epochs=20,
        min_lr=1e-5,
        drop_path=0.1,
        clip_grad=None,
        monitor_every=25,
        precision="bf16",
    )
    return Run(
        recipe="autoformer",
        budget="params<=6M",
        data=DataConfig(
            dataset="imagenet", image_size=224, batch_size=1024, workers=16, augment="strong", holdout=10_000
        ),
        space=AutoFormerConfig(size="tiny", patch_size=16),
        sampler=UniformConfig(),
        supernet=train,
        search=SearchConfig(
            searcher="autoformer", score="accuracy", num_trials=1000, objectives=("accuracy",)
        ),
        retrain=RetrainConfig(train=train, start="inherited", rank_archs=0),
    )


def autoformer_cifar() -> Run:
    """The AutoFormer space scaled to 32-pixel colour images (patch 4, 64 tokens); a GPU, or patience."""
    train = TrainConfig(epochs=300, lr=1e-3, warmup_epochs=10, drop_path=0.1, monitor_every=15)
    return Run(
        recipe="autoformer_cifar",
        budget="macs<=60M",
        data=DataConfig(dataset="torch/cifar10", batch_size=256, augment=AUGMENTS["mixed"], holdout=5000),
        space=AutoFormerConfig(
            size="micro",
            patch_size=4,
            embed_dims=(96, 128, 160),
            depths=(5, 6, 7),
            num_heads=(3, 4, 5),
            mlp_ratios=(2.0, 3.0, 4.0),
            head_dim=32,
        ),
        sampler=UniformConfig(),
        supernet=train,
        search=SearchConfig(searcher="autoformer", score="accuracy", num_trials=500),
        retrain=RetrainConfig(train=train, rank_archs=8, rank_epochs=30),
    )
