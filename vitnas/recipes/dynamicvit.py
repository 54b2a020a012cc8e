"""DynamicViT (Rao et al., arXiv 2106.02034): a trained ViT learns which patches it can do without, per image.

Its parts: `layers/select.py` (`selector="predictor"`), `train/losses/keep_ratio.py`, `soft.py` and `tokens.py`,
`train/optim.py` (two rates), `space/keeps.py`. The paper trains one network per keep ratio, as `vitnas tokens` does;
here one supernet learns all of them at once, and the search says how many patches to keep where within a budget.
Deviations: PAPERS.md.
"""

from __future__ import annotations

from dataclasses import replace

from vitnas.data import DataConfig
from vitnas.recipes.tour import on_digits
from vitnas.space import AroundConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig
from vitnas.train import KeepRatioConfig, TeacherConfig
from vitnas.train.fewer_tokens import dynamicvit_config

TEACHER = TeacherConfig(network="pretrained", losses=("soft", "tokens"), weights=(0.5, 0.5))


def dynamicvit() -> Run:
    """DeiT-S (or pretrained=NAME) at 65 % of its MACs on a folder of images at 224 pixels. Needs a GPU and days."""
    train = dynamicvit_config(30, 1e-3, clip_grad=None, ema=0.9999, monitor_every=5, precision="bf16")
    return Run(
        recipe="dynamicvit",
        budget="macs<=65%",
        data=DataConfig(
            dataset="imagenet", image_size=224, batch_size=1024, workers=16, augment="strong", holdout=10_000
        ),
        pretrained="deit_small_patch16_224",
        space=AroundConfig(
            heads=(1.0,), hidden=(1.0,), blocks=(), keep=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
        ),
        task=KeepRatioConfig(),
        teacher=TEACHER,
        supernet=train,
        search=SearchConfig(searcher="evolution", num_trials=200),
        retrain=RetrainConfig(
            train=replace(train, epochs=10, warmup_epochs=1, slow_frozen_epochs=0, monitor_every=0),
            start="inherited",
            baselines=(),
            rank_archs=0,
        ),
    )


def dynamicvit_tour() -> Run:
    """The digits with fewer patches, from the tour's chosen Model: `vitnas run tour` comes first."""
    run = on_digits()
    train = dynamicvit_config(20, 4e-3, slow_lr_scale=0.3, log_every=10)  # few steps: a faster backbone
    return replace(
        run,
        recipe="dynamicvit_tour",
        budget="macs<=70%",
        pretrained="runs/tour/models/chosen",
        space=AroundConfig(heads=(1.0,), hidden=(1.0,), blocks=(), keep=(1.0, 0.7, 0.5, 0.3)),
        task=KeepRatioConfig(ratio_weight=20.0),
        teacher=TEACHER,
        supernet=train,
        # One image of 16 patches is no sooner done with fewer; many at once are.
        search=replace(run.search, num_trials=12, objectives=("accuracy", "latency@onnxruntime,batch=64")),
        retrain=RetrainConfig(
            train=replace(train, epochs=10, warmup_epochs=1, slow_frozen_epochs=0),
            start="inherited",
            baselines=(),
            rank_archs=0,
        ),
    )
