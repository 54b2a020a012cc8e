"""tour: every stage on the handwritten digits that come with scikit-learn, in minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from vitnas.data import Augment, DataConfig
from vitnas.space import AutoFormerConfig, ViTResNASConfig
from vitnas.stages.run import FinalsConfig, RetrainConfig, Run, SearchConfig
from vitnas.train import TrainConfig


def tour() -> Run:
    """Handwritten digits (8x8 pixels, 10 classes): ViTs in stages behind a convolutional stem, at most 1.2 M MACs.

    A Space in which there is something to find: plain ViTs of that size lack what images of so few pixels need.
    """
    base = on_digits()
    return replace(
        base,
        recipe="tour",
        space=ViTResNASConfig(size="micro", patch_size=2),
        supernet=replace(base.supernet, epochs=40),
        finals=FinalsConfig(archs=8),
        retrain=replace(base.retrain, train=replace(base.retrain.train, epochs=40)),
    )


def on_digits() -> Run:
    """What the tours of papers begin with: the digits, the AutoFormer space in miniature, at most 1.2 M MACs."""
    supernet = TrainConfig(epochs=45, lr=4e-3, warmup_epochs=4, monitor_every=10, log_every=10)
    return Run(
        recipe="autoformer_tour",
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
            rank_archs=6,
            rank_epochs=5,
        ),
    )
