"""Every optimizer of timm saves and resumes bit for bit, or is refused before any training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn
from train_help import Kill, Killed

from vitnas.errors import UserError
from vitnas.sample import Fixed
from vitnas.train import Classification, TrainConfig, fit
from vitnas.train.optim import make_optimizer

STEPS = 4
# One of each kind of state: tensors alone, a tensor in a group, dtypes, numbers, flags.
KINDS = {"adamw", "lamb", "adafactorbv", "nadamlegacy", "muon", "adahessian"}
GENERATOR = torch.Generator().manual_seed(0)
LOADER = [
    (torch.randn(6, 4, generator=GENERATOR), torch.randint(0, 3, (6,), generator=GENERATOR))
    for _ in range(STEPS)
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


class InOrder:
    """The batches from any step on."""

    steps_per_epoch = STEPS

    def from_step(self, step: int):  # type: ignore[no-untyped-def]
        yield from LOADER[step:]


def is_possible(name: str) -> bool:
    try:
        make_optimizer(network(), TrainConfig(optimizer=name))
    except UserError as error:
        if f"optimizer is {name!r}, which cannot train here (" not in str(error):
            raise
        return False
    return True


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in list_optimizers()],
)
def test_a_resumed_training_is_the_same(name: str, tmp_path: Path) -> None:
    if not is_possible(name):
        assert name == "adahessian" or name.startswith(("bnb", "fused", "kron"))
        return
    config = TrainConfig(
        epochs=1, optimizer=name, lr=0.01, warmup_epochs=0, checkpoint_minutes=0, monitor_every=0
    )
    whole, cut, resumed = network(), network(), network()
    fit(whole, Classification(), Fixed(), InOrder(), config=config)
    with pytest.raises(Killed):
        fit(cut, Classification(), Fixed(), InOrder(), config=config, folder=tmp_path, hooks=[Kill(at=2)])
    fit(resumed, Classification(), Fixed(), InOrder(), config=config, folder=tmp_path)
    before = network().state_dict()
    for key, value in whole.state_dict().items():
        assert not torch.equal(value, before[key]), f"{key} did not train"
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_what_cannot_take_a_step_says_why() -> None:
    with pytest.raises(UserError, match=r"'adahessian', which cannot train here \(.*grad.*\)\. Use adamw"):
        make_optimizer(network(), TrainConfig(optimizer="adahessian"))


def test_a_state_that_would_have_to_be_pickled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.optim.SGD.state_dict

    def odd(self: torch.optim.SGD) -> dict[str, object]:
        return {**real(self), "closure": object()}

    monkeypatch.setattr(torch.optim.SGD, "state_dict", odd)
    with pytest.raises(UserError, match=r"its state holds a object \(closure\), which cannot be saved"):
        make_optimizer(network(), TrainConfig(optimizer="momentum"))
