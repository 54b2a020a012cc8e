"""Vision X-formers (Jeevan and Sethi, arXiv 2107.02239), with each block's mixer searched instead of fixed.

Its parts: `mixers/` (performer, linformer, nystrom, fourier, token_mlp, long_short beside softmax), `layers/stem.py`,
`layers/rotary.py`, `layers/pool.py`, `space/mixers.py` (mixers as genes), `model/vision_xformers.py` (the paper's
networks by name). The paper itself searches nothing. Deviations: PAPERS.md.
"""

from __future__ import annotations

from dataclasses import replace

from vitnas.data import AUGMENTS, DataConfig
from vitnas.recipes.tour import on_digits
from vitnas.sample import UniformConfig
from vitnas.space import MixerConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig
from vitnas.train import TrainConfig


def vision_xformers() -> Run:
    """Mixers as genes on CIFAR-10, 256 tokens, within a latency measured in ONNX Runtime; a GPU, or patience."""
    train = TrainConfig(epochs=150, lr=1e-3, warmup_epochs=5, drop_path=0.1, monitor_every=15)
    return Run(
        recipe="vision_xformers",
        budget="latency<=8ms@onnxruntime,batch=1",
        data=DataConfig(dataset="torch/cifar10", batch_size=256, augment=AUGMENTS["mixed"], holdout=5000),
        space=MixerConfig(size="small", patch_size=2),
        sampler=UniformConfig(),
        supernet=train,
        search=SearchConfig(
            searcher="evolution", num_trials=400, objectives=("accuracy", "latency@onnxruntime,batch=1")
        ),
        retrain=RetrainConfig(train=train, rank_archs=8, rank_epochs=30),
    )


def vision_xformers_tour() -> Run:
    """The same in minutes on the handwritten digits: 64 tokens of one pixel, five mixers."""
    base = on_digits()
    return replace(
        base,
        recipe="vision_xformers_tour",
        budget="latency<=2ms@onnxruntime,batch=1",
        space=MixerConfig(
            size="micro",
            patch_size=1,
            embed_dims=(32, 48),
            depths=(2, 3),
            num_heads=(1, 2),
            mlp_ratios=(1.0, 2.0),
            mixers=("fourier", "linformer", "nystrom", "performer", "softmax"),
        ),
        supernet=replace(base.supernet, epochs=20, warmup_epochs=2),
        search=SearchConfig(
            searcher="evolution", num_trials=24, objectives=("accuracy", "latency@onnxruntime,batch=1")
        ),
        retrain=RetrainConfig(train=replace(base.retrain.train, epochs=20, warmup_epochs=2), rank_archs=0),
    )
