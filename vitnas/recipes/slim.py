"""slim: a trained network made smaller, to a budget."""

from __future__ import annotations

from vitnas.data import AUGMENTS, DataConfig
from vitnas.space import AroundConfig
from vitnas.stages.run import ExportConfig, RetrainConfig, Run, SearchConfig, SlimConfig
from vitnas.train import TrainConfig


def slim() -> Run:
    """A trained ViT (pretrained=NAME) made smaller to a budget, on any images; `vitnas slim NAME` is the same."""
    train = TrainConfig(epochs=10, lr=1e-4, warmup_epochs=0.5, monitor_every=0)
    return Run(
        recipe="slim",
        data=DataConfig(dataset="", batch_size=64, augment=AUGMENTS["weak"]),
        space=AroundConfig(),
        supernet=train,
        slim=SlimConfig(),
        search=SearchConfig(searcher="evolution", num_trials=400),
        retrain=RetrainConfig(train=train, baselines=(), rank_archs=0),
        export=ExportConfig(formats=("onnx",), latency=("onnxruntime,batch=1",)),
    )
