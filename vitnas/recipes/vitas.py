"""ViTAS (Su et al., arXiv 2106.13700): patch size, heads, widths and depth searched together in one supernet.

Its parts: `space/vitas.py` (genes, the identity), `supernet/sharing.py` (bilateral and cyclic coupling, private tokens
and attention maps), `sample/identity.py` (how often a slot is skipped), `train/losses/combined_sides.py` (both
sides' logits), `searching/evolution.py` with the paper's settings (`searcher="vitas"`) and `model/net_id.py` (published
codes).
Deviations: PAPERS.md.
"""

from __future__ import annotations

from dataclasses import replace

from vitnas.data import AUGMENTS, DataConfig
from vitnas.recipes.tour import on_digits
from vitnas.sample import IdentityConfig
from vitnas.space import VitasConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig, SharingConfig
from vitnas.train import TrainConfig

SHARING = SharingConfig(coupling="bilateral", private_tokens=True, private_heads=True)


def vitas() -> Run:
    """ViTAS under 1 G MACs on a folder of images at 224 pixels: 300 epochs, the paper's search. A GPU and days."""
    train = TrainConfig(
        epochs=300,
        lr=1e-3,
        weight_decay=0.05,
        warmup_epochs=5,
        min_lr=0.0,
        clip_grad=None,
        monitor_every=25,
        precision="bf16",
    )
    return Run(
        recipe="vitas",
        budget="0.9G<=macs<=1G",
        data=DataConfig(
            dataset="imagenet",
            image_size=224,
            batch_size=1024,
            workers=16,
            augment=AUGMENTS["weak_crop"],
            holdout=10_000,
        ),
        space=VitasConfig(size="1g", patch_sizes=(14, 16, 32)),
        sampler=IdentityConfig(),
        sharing=SHARING,
        supernet=train,
        search=SearchConfig(searcher="vitas", score="accuracy", num_trials=2000, objectives=("accuracy",)),
        retrain=RetrainConfig(train=replace(train, drop_path=0.1, monitor_every=0), rank_archs=0),
    )


def vitas_tour() -> Run:
    """The same in miniature: handwritten digits, patches of 2 and 4 pixels, minutes on two CPU cores."""
    base = on_digits()
    return replace(
        base,
        recipe="vitas_tour",
        budget="300K<=macs<=450K",
        space=VitasConfig(size="micro", patch_sizes=(2, 4)),
        sampler=IdentityConfig(),
        sharing=SHARING,
        supernet=replace(base.supernet, epochs=30, lr=3e-3, warmup_epochs=3),
        search=replace(base.search, num_trials=48),
        retrain=replace(base.retrain, train=replace(base.retrain.train, epochs=40, lr=3e-3)),
    )
