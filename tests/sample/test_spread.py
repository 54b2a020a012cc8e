"""Spread: options dealt out without replacement, opened over the epochs, and exact after a resume."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from train_help import Kill, Killed

from vitnas.data import Augment, Data, TrainBatches, synthetic
from vitnas.errors import UserError
from vitnas.sample import SAMPLERS, Given, Hook, Moment, Spread
from vitnas.sample.spread import entries, num_opened
from vitnas.space import Gene, Space, autoformer, vit_resnas
from vitnas.supernet import Supernet
from vitnas.train import Classification, Rewiring, TrainConfig, fit, metrics

SPACE = vit_resnas("sr_tiny_mh")


def genes_drawn(sampler: Spread, rng: random.Random) -> list[tuple[int, ...]]:
    return [sampler.space.encode(draw.arch) for draw in sampler.draw(rng) if draw.arch is not None]


def test_values_of_a_dimension_are_different_as_far_as_there_are_any() -> None:
    rng = random.Random(0)
    for num_archs in (2, 3, 5):
        sampler = Spread(SPACE, num_archs)
        for _ in range(10):
            rows = genes_drawn(sampler, rng)
            draws = sampler.draw(rng)
            assert [draw.part for draw in draws] == [(i, num_archs) for i in range(num_archs)]
            assert sum(draw.weight for draw in draws) == pytest.approx(1)
            for index, gene in enumerate(SPACE.genes):
                if gene.name.startswith("embed_dim"):  # always there, five options
                    assert len({row[index] for row in rows}) == num_archs, gene.name


def test_more_archs_than_options_use_each_about_equally_often() -> None:
    sampler = Spread(SPACE, 12)
    index = next(i for i, gene in enumerate(SPACE.genes) if gene.name == "num_heads.0.0")  # four options
    counts = Counter(row[index] for row in genes_drawn(sampler, random.Random(1)))
    assert set(counts.values()) == {3}


def test_chances_are_the_genes() -> None:
    rng, gone, n = random.Random(2), Counter(), 300
    space = vit_resnas("tiny", image_size=32, num_classes=3)
    sampler = Spread(space, 2)
    for _ in range(n):
        for row in genes_drawn(sampler, rng):
            gone.update(g.name for g, value in zip(space.genes, row, strict=True) if g.weights and not value)
    assert abs(gone["exists.0.3"] / (2 * n) - 1 / 3) < 0.06
    assert abs(gone["exists.0.4"] / (2 * n) - 2 / 3) < 0.06  # goes with the one before, or by its own half


@pytest.mark.parametrize(
    ("weights", "want"),
    [
        (None, [1, 0]),
        ((0.5, 0.5), [1, 1, 0, 0]),
        ((0.25, 0.75), [1, 1, 1, 0]),
        ((1 / 3, 2 / 3), [1, 1, 0]),
    ],
)
def test_chances_become_entries(weights: tuple[float, ...] | None, want: list[int]) -> None:
    assert entries(Gene("exists.0.1", (False, True), weights=weights)) == want


def test_options_open_from_the_largest() -> None:
    assert [num_opened(7, epoch, 30) for epoch in (0, 4.9, 5, 10, 29.9, 30, 99)] == [1, 1, 2, 3, 6, 7, 7]
    assert num_opened(4, 0, 0) == 4
    sampler = Spread(SPACE, 2, warmup_epochs=30)
    assert {draw.arch for draw in sampler.draw(random.Random(0))} == {SPACE.largest()}
    sampler.epoch = 15
    half = {i: len(entries(g)) for i, g in enumerate(SPACE.genes)}
    for _ in range(20):
        for row in genes_drawn(sampler, random.Random(_)):
            for index, gene in enumerate(SPACE.genes):
                if gene.name.startswith(("embed_dim", "mlp_hidden.0.0")):
                    assert row[index] >= len(gene.options) - num_opened(half[index], 15, 30)
    sampler.epoch = 30
    assert len({row for seed in range(20) for row in genes_drawn(sampler, random.Random(seed))}) == 40


def moment(epoch: float) -> Moment:
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters())
    return Moment(0, 1, epoch, 0, net, optimizer, lambda tensor: None)


def test_it_is_a_hook_that_takes_its_state_from_the_epoch() -> None:
    sampler = Spread(SPACE, 2, warmup_epochs=3)
    assert isinstance(sampler, Hook)
    assert sampler.tensors() == {}
    assert [sampler.before(moment(epoch)) for epoch in (0, 2.5, 3, 3.5)] == [
        None,
        None,
        {"all_open": True},
        None,
    ]


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match="num_archs is 0; it must be at least 1"):
        Spread(SPACE, 0)
    with pytest.raises(UserError, match="warmup_epochs is -1; it cannot be negative"):
        Spread(SPACE, 2, warmup_epochs=-1)
    assert SAMPLERS["spread"]().build(SPACE, Given()) == Spread(SPACE)


@pytest.fixture(scope="module")
def data() -> Data:
    return synthetic(num_classes=4, image_size=16, n=96, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit_resnas", "autoformer"])
def test_a_resumed_run_with_warm_up_and_rewiring_equals_an_uninterrupted_one(
    kind: str, data: Data, tmp_path: Path
) -> None:
    space: Space
    if kind == "vit_resnas":
        space = vit_resnas(
            "micro", image_size=16, patch_size=4, in_chans=3, num_classes=4, depths=(2, 2), embed_dims=(8, 12)
        )
    else:
        space = autoformer("micro", image_size=16, patch_size=4, in_chans=3, num_classes=4, depths=(1, 2))
    loader = TrainBatches(data.train, Augment(), batch_size=16, seed=3)
    config = TrainConfig(
        epochs=3, lr=1e-2, warmup_epochs=0, monitor_every=0, checkpoint_minutes=0, log_every=1
    )

    def run(folder: Path, *hooks: Kill, seed: int = 0) -> Supernet:
        net, sampler = Supernet(space, generator=torch.Generator().manual_seed(seed)), Spread(space, 2, 2)
        fit(net, Classification(), sampler, loader, config=config, folder=folder, hooks=[Rewiring(2), *hooks])
        return net

    whole = run(tmp_path / "whole")
    lines = [line for line in metrics.read_lines(tmp_path / "whole") if isinstance(line, metrics.Hooked)]
    moved = [line for line in lines if line.event == "rewiring"]
    assert [line.epoch for line in moved] == [0, 1, 2]
    assert sum(line.said["moved"] for line in moved[1:]) > 0
    with pytest.raises(Killed):
        run(tmp_path / "cut", Kill(at=loader.steps_per_epoch))  # at a rewiring
    again = run(tmp_path / "cut", seed=1)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=name)
