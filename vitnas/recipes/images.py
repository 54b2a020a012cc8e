"""images: your own folder of images, on one machine. Sane defaults for a few thousand to a hundred thousand images."""

from __future__ import annotations

from vitnas.data import AUGMENTS, DataConfig
from vitnas.space import AutoFormerConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig
from vitnas.train import TrainConfig


def images() -> Run:
    """Any images (data.dataset=...), at 64 pixels in patches of 8: flips, shifts, mixing; 40 M MACs, 30 minutes."""
    train = TrainConfig(epochs=100, lr=1e-3, warmup_epochs=5, drop_path=0.1, monitor_every=10)
    return Run(
        recipe="images",
        time="30m",
        budget="macs<=40M",
        data=DataConfig(dataset="", image_size=64, in_chans=3, batch_size=128, augment=AUGMENTS["mixed"]),
        space=AutoFormerConfig(
            size="micro",
            patch_size=8,
            embed_dims=(96, 128, 160),
            depths=(4, 5, 6),
            num_heads=(3, 4, 5),
            mlp_ratios=(2.0, 3.0, 4.0),
            head_dim=32,
        ),
        supernet=train,
        search=SearchConfig(searcher="evolution", num_trials=200),
        retrain=RetrainConfig(train=train, rank_archs=6, rank_epochs=10),
    )
