"""Self-distillation: students of all kinds, crops of two sizes, stages, what is refused, a killed training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
from torch import nn

from vitnas.arch import Arch, Block, Stage
from vitnas.data import Data, synthetic
from vitnas.model import build
from vitnas.sample import Fixed, Sampler, Uniform
from vitnas.space import autoformer
from vitnas.supernet import Supernet
from vitnas.train import EsViTConfig, Fitted, TrainConfig, fit

CONFIG = EsViTConfig(out_dim=16, hidden_dim=16, bottleneck_dim=8, local_crops_number=2)
TRAIN = TrainConfig(epochs=1, lr=1e-3, warmup_epochs=0, monitor_every=0, log_every=1)
SPACE = autoformer(
    "micro", image_size=16, patch_size=4, num_classes=0, embed_dims=(16, 32), depths=(1, 2), head_dim=8
)
BLOCK = Block(num_heads=2, head_dim=8, mlp_hidden=32)
STAGES = Arch(
    image_size=16,
    patch_size=2,
    num_classes=0,
    class_token=False,
    global_pool="avg",
    stages=(Stage(embed_dim=16, blocks=(BLOCK,)), Stage(embed_dim=32, blocks=(BLOCK,))),
)


@pytest.fixture(scope="module")
def data() -> Data:
    return synthetic(num_classes=4, image_size=16, n=80, seed=0)


def swin() -> nn.Module:
    network: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=3,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(1, 2),
        num_classes=0,
    )
    return network


def learn(
    network: nn.Module, data: Data, config: EsViTConfig = CONFIG, sampler: Sampler | None = None
) -> Fitted:
    loader = config.views(data.train, network, batch_size=16, seed=0)
    return fit(
        network, config.task(0.04), sampler or Fixed(), loader, config=TRAIN, teacher=config.teacher(network)
    )


def test_plain(data: Data) -> None:
    learn(build(SPACE.largest()), data)


def test_stages(data: Data) -> None:
    learn(build(STAGES), data)


def test_supernet(data: Data) -> None:
    learn(Supernet(SPACE), data, sampler=Uniform(SPACE))


def test_swin(data: Data) -> None:
    learn(swin(), data)


def test_any(data: Data) -> None:
    learn(timm.create_model("test_vit", img_size=16, patch_size=4, num_classes=0), data)
    learn(
        timm.create_model("test_resnet", num_classes=0),
        data,
        replace(CONFIG, region=False, local_crops_size=8),
    )
