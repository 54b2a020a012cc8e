"""Engine: what it refuses before anything is made, and what the first process tells the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from vitnas.data import Augment, TrainBatches, synthetic
from vitnas.errors import UserError
from vitnas.sample import Fixed
from vitnas.train import Classification, Engine, TrainConfig, fit


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="precision is 'fp16'; it needs an accelerator"):
        Engine(precision="fp16", cpu=True)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="precision is 'int8'; it must be one of fp32, bf16, fp16"):
        Engine(precision="int8")


def test_a_second_precision_in_one_process_is_refused() -> None:
    first = Engine(cpu=True)
    assert AcceleratorState().mixed_precision == "no"
    with pytest.raises(UserError, match="precision is 'bf16'; this process already runs in 'fp32'"):
        Engine(precision="bf16", cpu=True)
    assert Engine(cpu=True).device == first.device


def test_fit_refuses_an_engine_of_another_precision() -> None:
    network = torch.nn.Linear(2, 2)
    config = TrainConfig(precision="bf16")
    with pytest.raises(UserError, match=r"config\.precision is 'bf16', engine's is 'fp32'"):
        fit(network, Classification(), Fixed(), [], config=config, engine=Engine(cpu=True))


def test_an_odd_batch_cannot_be_mixed() -> None:
    data = synthetic(n=40)
    batches = TrainBatches(data.train, Augment(), batch_size=7, seed=0)
    options: dict[str, Any] = {"augment": Augment(mixup=0.2), "num_classes": data.num_classes}
    with pytest.raises(UserError, match=r"batch_size is 7; .* so it must be even\. Use 6"):
        fit(torch.nn.Linear(2, 2), Classification(), Fixed(), batches, **options)


def test_what_the_first_process_finds_reaches_the_caller() -> None:
    engine = Engine(cpu=True)
    assert engine.from_first(lambda: [1, 2]) == [1, 2]

    def wrong() -> None:
        raise UserError("the budget cannot be met")

    with pytest.raises(UserError, match="the budget cannot be met"):
        engine.from_first(wrong)
