"""Learning to tell numbers: the loss, mixing, what is scored, and what a network says of itself afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vitnas
from vitnas.arch import Arch, Block, Stage
from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches
from vitnas.errors import UserError
from vitnas.model.scale import Scale, scale_of
from vitnas.train import Batch, Classification, Engine, TrainConfig
from vitnas.train.evaluate import evaluate_each, interval_of, paired_mean, t95
from vitnas.train.feed import Feed, endless
from vitnas.train.losses import Hard, Soft

ARCH = Arch(
    image_size=8,
    patch_size=4,
    num_classes=2,
    stages=(Stage(embed_dim=16, blocks=(Block(num_heads=2, head_dim=8, mlp_hidden=16),)),),
)


def bright(count: int = 96) -> Data:
    """Images whose two halves are so bright as two numbers say, in units far from 1."""
    rng = np.random.default_rng(0)
    numbers_N2 = rng.uniform(0, 1, (count, 2))
    pixels = np.zeros((count, 8, 8, 3), dtype=np.uint8)
    pixels[:, :4], pixels[:, 4:] = (255 * numbers_N2.T[:, :, None, None, None]).astype(np.uint8)
    config = DataConfig(label_kind="numbers", mean=(0.5,) * 3, std=(0.25,) * 3)
    told = numbers_N2 * [50, 4000] + [20, -1000]
    return Data.from_arrays(train=(pixels, told), class_names=("age", "income"), config=config)


def test_scores_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers_NT = torch.randn(40, 3, generator=generator)
    told_NT = numbers_NT + 0.3 * torch.randn(40, 3, generator=generator)
    scale = Scale((0.0,) * 3, (1.0, 10.0, 100.0))
    batches = list(zip(told_NT.split(16), numbers_NT.split(16), strict=True))
    score, explained_N = evaluate_each(nn.Identity(), batches, device="cpu", scale=scale)
    assert score.accuracy == pytest.approx(r2_score(numbers_NT.numpy(), told_NT.numpy()))
    assert explained_N.mean() == pytest.approx(score.accuracy)
    assert score.loss == pytest.approx(float((told_NT - numbers_NT).square().mean()))
    each = mean_absolute_error(numbers_NT.numpy(), told_NT.numpy(), multioutput="raw_values")
    assert score.mae == pytest.approx(each * [1, 10, 100])
    assert (score.n, score.top5, score.balanced) == (40, None, None)
    assert score.error == pytest.approx(float(explained_N.std()) / 40**0.5, rel=1e-4)
    assert score.loss_odd == pytest.approx(float((told_NT - numbers_NT)[1::2].square().mean()))
    means = [(numbers_NT.mean(0).expand(40, 3), numbers_NT)]
    assert evaluate_each(nn.Identity(), means, device="cpu")[0].accuracy == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="tells 3 numbers of an image and the labels 2"):
        evaluate_each(nn.Identity(), [(told_NT, numbers_NT[:, :2])], device="cpu")


def test_intervals_are_of_students_t() -> None:
    from scipy.stats import t

    for n in (5, 20, 1000):
        assert t95(n) == pytest.approx(t.ppf(0.975, n - 1), rel=0.005)
    low, high = interval_of(0.9, 20, 0.02)
    assert (low, high) == (pytest.approx(0.9 - 0.02 * t95(20)), pytest.approx(0.9 + 0.02 * t95(20)))
    assert interval_of(-0.4, 20, 0.5)[0] < -1, "worse than the mean is a score like others"
    first_N, second_N = torch.tensor([1.0, 0.5, 0.5, 0.9]), torch.tensor([0.8, 0.4, 0.6, 0.5])
    middle, (low, high) = paired_mean(first_N, second_N)
    half = t95(4) * float((first_N - second_N).std()) / 2
    assert (middle, low, high) == (
        pytest.approx(0.15),
        pytest.approx(0.15 - half),
        pytest.approx(0.15 + half),
    )


def test_a_network_learns_numbers_and_says_what_they_are() -> None:
    data, network = bright(), vitnas.build(ARCH, generator=torch.Generator().manual_seed(0))
    batches = TrainBatches(data.train, data.augment, batch_size=32, seed=0)
    held = EvalBatches(data.holdout, batch_size=64)
    before = vitnas.evaluate(network, held)
    config = TrainConfig(epochs=8, lr=1e-2, warmup_epochs=1, log_every=1000)
    vitnas.fit(network, Classification(), vitnas.Fixed(), batches, config=config)
    after = vitnas.evaluate(network, held)
    assert after.accuracy > before.accuracy
    assert after.loss < before.loss
    assert after.mae[1] == pytest.approx(80 * after.mae[0], rel=1), "in units of theirs"
    assert scale_of(network) == data.train.scale
    assert network.pretrained_cfg["label_names"] == ["age", "income"]


def feed(loader: Any, mixup: Mixup | None = None) -> Batch:
    given = Feed(batches=endless(loader), task=Classification(), mixup=mixup, seed=0, engine=Engine(cpu=True))
    return next(given.from_step(0))


def test_mixed_images_have_mixed_numbers() -> None:
    data = bright(24)
    loader = TrainBatches(data.train, Augment(), batch_size=8, seed=0)
    plain = feed(loader)
    mixed = feed(loader, Mixup(mixup_alpha=1.0, num_classes=2))
    assert (plain.kind, mixed.kind, mixed.targets.shape) == ("numbers", "numbers", (8, 2))
    share = (mixed.targets - plain.targets.flip(0)) / (plain.targets - plain.targets.flip(0))
    torch.testing.assert_close(share, share[:1, :1].expand_as(share), atol=1e-3, rtol=1e-3)
    share = float(share[0, 0])
    expected = share * plain.images_BCHW + (1 - share) * plain.images_BCHW.flip(0)
    torch.testing.assert_close(mixed.images_BCHW, expected, atol=1e-4, rtol=1e-4)
    assert 0 < share < 1


def test_anothers_loader_may_give_a_number_an_image() -> None:
    images, numbers_N = torch.randn(8, 3, 8, 8), torch.randn(8)
    batch = feed(DataLoader(TensorDataset(images, numbers_N), batch_size=4))
    assert (batch.kind, batch.targets.shape) == ("numbers", (4, 1))
    loss = Classification()({"logits": torch.zeros(4, 1)}, batch, {})["loss"]
    torch.testing.assert_close(loss, numbers_N[:4].square().mean())
    probabilities = feed(DataLoader(TensorDataset(images, torch.rand(8, 5)), batch_size=4))
    assert probabilities.kind == "class", "mixed by the loader"
    with pytest.raises(UserError, match="tells 3 numbers of an image and the labels 1"):
        Classification()({"logits": torch.zeros(4, 3)}, batch, {})


def test_archs_teach_each_other_numbers_as_they_are() -> None:
    batch = Batch((torch.zeros(2, 3, 8, 8),), torch.zeros(2, 2), kind="numbers")
    ours: Tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    taught = {"logits": ours + 1}
    losses = Classification(distill_weight=0.5)({"logits": ours}, batch, taught)
    assert float(losses["kd"]) == 1.0
    assert float(losses["ce"]) == 7.5
    assert float(losses["loss"]) == 4.25
    assert float(Soft(temperature=3.0)({"logits": ours}, batch, taught)["loss"]) == 1.0
    with pytest.raises(UserError, match="hard learns a teacher's first choices"):
        Hard()({"logits": ours}, batch, taught)


def test_balance_needs_classes() -> None:
    with pytest.raises(UserError, match=r"balance is 0\.5 and these images have numbers"):
        TrainBatches(bright(24).train, Augment(), batch_size=8, seed=0, balance=0.5)
