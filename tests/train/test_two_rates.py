"""Two learning rates: what is slow, what waits, what never moves; the same on a resumed training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_help import Kill, Killed

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.model import Model, build
from vitnas.sample import Fixed, Moment
from vitnas.train import Classification, TrainConfig, fit
from vitnas.train.optim import make_optimizer

EPOCH = 3
GENERATOR = torch.Generator().manual_seed(0)
LOADER = [
    (torch.randn(4, 1, 8, 8, generator=GENERATOR), torch.randint(0, 3, (4,), generator=GENERATOR))
    for _ in range(EPOCH)
]
TWO: dict[str, Any] = {"slow_names": r"^(?!head\.)", "slow_lr_scale": 0.01, "slow_frozen_epochs": 1}


class InOrder:
    """The batches from any step on."""

    steps_per_epoch = EPOCH

    def from_step(self, step: int):  # type: ignore[no-untyped-def]
        while True:
            yield LOADER[step % EPOCH]
            step += 1


class Watch:
    """A Hook that notes the rates of every step by parameter, and the weights before it."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.weights: list[dict[str, Tensor]] = []

    def before(self, moment: Moment) -> None:
        names = {id(parameter): name for name, parameter in moment.network.named_parameters()}
        self.rates.append(
            {names[id(p)]: group["lr"] for group in moment.optimizer.param_groups for p in group["params"]}
        )
        self.weights.append({name: p.detach().clone() for name, p in moment.network.named_parameters()})

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """There is nothing to take back."""


def network() -> Model:
    block = Block(num_heads=2, head_dim=8, mlp_hidden=16)
    arch = Arch(
        image_size=8, patch_size=4, in_chans=1, num_classes=3, stages=(Stage(embed_dim=16, blocks=(block,)),)
    )
    return build(arch, generator=torch.Generator().manual_seed(0))


def config_of(**fields: Any) -> TrainConfig:
    given = {
        "epochs": 3,
        "lr": 0.01,
        "warmup_epochs": 0,
        "monitor_every": 0,
        "checkpoint_minutes": 0,
        **fields,
    }
    return TrainConfig(**given)


def trained(model: nn.Module, config: TrainConfig) -> Watch:
    watch = Watch()
    fit(model, Classification(), Fixed(), InOrder(), config=config, hooks=[watch])
    return watch


@pytest.mark.parametrize("schedule", ["cosine", "none"])
def test_the_backbone_waits_and_then_learns_slowly(schedule: str) -> None:
    model, plain = network(), network()
    watch = trained(model, config_of(schedule=schedule, **TWO))
    usual = trained(plain, config_of(schedule=schedule)).rates
    for step, (rates, whole) in enumerate(zip(watch.rates, usual, strict=True)):
        assert set(rates) == {name for name, _ in model.named_parameters()}
        for name, rate in rates.items():
            scale = 1 if name.startswith("head.") else 0.01 if step >= EPOCH else 0
            assert rate == pytest.approx(whole[name] * scale, rel=1e-9), (step, name)
    slow = "blocks.0.attn.qkv.weight"
    for step in range(1, EPOCH + 1):
        torch.testing.assert_close(watch.weights[step][slow], watch.weights[0][slow], rtol=0, atol=0)
    assert not torch.equal(watch.weights[EPOCH + 1][slow], watch.weights[0][slow])


def test_what_is_frozen_never_moves() -> None:
    model = network()
    watch = trained(model, config_of(frozen_names=r"^(cls_token|pos_embed)$", **TWO))
    for name, first in watch.weights[0].items():
        stays = name in ("cls_token", "pos_embed")
        assert torch.equal(model.get_parameter(name), first) == stays, name


def test_weight_decay_is_the_same() -> None:
    """Groups are parted further, and nothing is decayed that was not."""

    def decayed(config: TrainConfig) -> dict[int, float]:
        return {
            number: group["weight_decay"]
            for group in make_optimizer(model, config).param_groups
            for parameter in group["params"]
            for number in [numbers[parameter]]
        }

    model = network()
    numbers = {parameter: number for number, parameter in enumerate(model.parameters())}
    assert decayed(config_of(frozen_names="pos_embed", **TWO)) == decayed(config_of())


def test_a_resumed_training_is_the_same(tmp_path: Path) -> None:
    """Killed while the backbone waits, and again behind it."""
    whole, config = network(), config_of(frozen_names="pos_embed", **TWO)
    trained(whole, config)
    for at in (2, 5):
        with pytest.raises(Killed):
            fit(
                network(),
                Classification(),
                Fixed(),
                InOrder(),
                config=config,
                folder=tmp_path,
                hooks=[Kill(at=at)],
            )
    resumed = network()
    fit(resumed, Classification(), Fixed(), InOrder(), config=config, folder=tmp_path)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slow_names": "("}, "slow_names is '[(]', no regular expression"),
        ({"slow_names": "block", "slow_lr_scale": -1}, "slow_lr_scale is -1; it cannot be negative"),
        ({"slow_names": "selections"}, "no parameter's name has 'selections' in it"),
        ({"frozen_names": "dist_token"}, "no parameter's name has 'dist_token' in it"),
    ],
)
def test_what_cannot_be_grouped(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_optimizer(network(), config_of(**fields))
