"""tour: every stage on the handwritten digits that come with scikit-learn, in minutes on two CPU cores."""

from __future__ import annotations

from vitnas.data import Augment, DataConfig
from vitnas.space import AutoFormerConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig
from vitnas.train import TrainConfig


def tour() -> Run:
    """Handwritten digits (8x8 pixels, 10 classes), the AutoFormer space in miniature, at most 1.2 M MACs."""
    supernet = TrainConfig(epochs=45, lr=4e-3, warmup_epochs=4, monitor_every=10, log_every=10)
    return Run(
        recipe="tour",
        budget="macs<=1.2M",
        # The digits are centred in their 8x8 pixels: turning and zooming helps, shifting by a whole pixel hurts.
        data=DataConfig(
            dataset="digits", holdout=0.15, batch_size=64, augment=Augment(rotate=10, zoom=(0.9, 1.1))
        ),
        space=AutoFormerConfig(
            size="micro",
            patch_size=2,
            embed_dims=(48, 64, 80),
            depths=(2, 3, 4),
            num_heads=(1, 2, 3),
            mlp_ratios=(1.0, 2.0, 3.0),
        ),
        supernet=supernet,
        search=SearchConfig(searcher="evolution", num_trials=60),
        retrain=RetrainConfig(
            train=TrainConfig(epochs=50, lr=4e-3, warmup_epochs=4, monitor_every=0, log_every=10),
            rank_archs=4,
            rank_epochs=6,
        ),
    )
