"""DynamicViT's loss of how much is kept: its value, what it moves, and that it is finite whatever is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitnas.arch import Arch, Block, Stage
from vitnas.data import Augment
from vitnas.errors import UserError
from vitnas.layers.choose import PredictorSelection
from vitnas.model import Model, build
from vitnas.model.selections import with_selections
from vitnas.sample import Fixed
from vitnas.testing import randomize_
from vitnas.train import KeepRatio, KeepRatioConfig, TaskGiven, TrainConfig, fit
from vitnas.train.losses.keep_ratio import ratio_loss
from vitnas.train.task import Batch

BLOCK = Block(num_heads=2, head_dim=8, mlp_hidden=32)
IMAGES = torch.randn(6, 3, 16, 24, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
NETWORKS: dict[str, dict[str, Any]] = {
    "token": {},
    "avg": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "global_pool": "avg", "fc_norm": True},
    "distilled": {"distill_token": True},
    "performer": {"class_token": False, "global_pool": "avg", "mixer": "performer"},
}


def network(keep: Any = 0.7, places: Any = None, mixer: str = "softmax", **fields: Any) -> Model:
    """On a grid of 4 x 6 patches."""
    arch = Arch(
        image_size=(16, 24),
        patch_size=4,
        num_classes=3,
        stages=(Stage(embed_dim=16, blocks=(replace(BLOCK, mixer=mixer),) * 4),),
        **fields,
    )
    model = build(arch)
    randomize_(model, torch.Generator().manual_seed(0))
    return with_selections(model, keep, places, generator=torch.Generator().manual_seed(0))


def losses(model: nn.Module, task: KeepRatio) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return task(
        model(IMAGES, want=[name.removesuffix("?") for name in task.wants]), Batch((IMAGES,), LABELS), {}
    )


def push(model: Model, bias: float) -> None:
    """Let every predictor keep all (or with a negative bias none), whatever it is drawn."""
    with torch.no_grad():
        for selection in model.selections.values():
            assert isinstance(selection, PredictorSelection)
            selection.decision.bias.copy_(torch.tensor([bias, 0.0]))


def test_the_value() -> None:
    keep_BSP = torch.tensor([[[1.0, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]])
    shares_BS = torch.tensor([[0.75, 0.5]]).expand(2, -1)
    each = (0.25**2 + 0.25**2 + 0.25**2 + 0.5**2) / 4
    assert ratio_loss(keep_BSP, shares_BS).item() == pytest.approx(each)
    together = (0 + 0.375**2) / 2
    assert ratio_loss(keep_BSP, shares_BS, "batch").item() == pytest.approx(together)


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("places", [(1,), (0, 1, 2, 3)])
def test_any_network(fields: dict[str, Any], places: tuple[int, ...]) -> None:
    """The shares are those of evaluation; the term is what it says, and its gradient reaches every predictor."""
    model, task = network(0.7, places, **fields), KeepRatio()
    found = model.eval()(IMAGES, want=("keep", "shares"))
    torch.testing.assert_close(found["keep"].mean(2), found["shares"])
    drawn = model.train()(IMAGES, want=("keep",))["keep"]
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    found = losses(model, task)
    torch.testing.assert_close(found["loss"], found["ce"] + 2 * found["ratio"])
    found["ratio"].backward()
    for selection in model.selections.values():
        assert isinstance(selection, PredictorSelection)
        assert selection.decision.weight.grad is not None
        assert selection.decision.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("bias", [-1e4, -30.0, 30.0])
def test_nothing_or_all_is_kept(fields: dict[str, Any], bias: float) -> None:
    model = network(0.3, (1, 2), **fields)
    push(model, bias)
    found = losses(model.train(), KeepRatio())
    shares = (7 / 24, 2 / 24)
    want = sum((share if bias < 0 else 1 - share) ** 2 for share in shares) / 2
    assert found["ratio"].item() == pytest.approx(want, abs=0.02)
    found["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_a_training_at_few_patches_stays_finite_and_meets_the_share() -> None:
    """At a share of 0.3, without clipping, from predictors that keep next to nothing."""
    model = network(0.3, (1, 2))
    push(model, -3.0)
    config = TrainConfig(
        epochs=60, lr=0.02, warmup_epochs=0, clip_grad=None, monitor_every=0, schedule="none"
    )
    before = losses(model, KeepRatio())["ratio"]
    fit(model, KeepRatio(ratio_weight=10.0), Fixed(), [(IMAGES, LABELS)], config=config)
    assert losses(model, KeepRatio())["ratio"] < 0.5 * before
    assert bool(model.eval()(IMAGES).isfinite().all())


def test_without_selections_it_is_the_labels() -> None:
    model = build(network().arch)
    plain = with_selections(model, {})
    found = KeepRatio()(plain(IMAGES, want=("logits",)) | {}, Batch((IMAGES,), LABELS), {})
    assert [*found] == ["loss", "ce"]
    torch.testing.assert_close(found["loss"], nn.functional.cross_entropy(plain(IMAGES), LABELS))


def test_without_labels_it_is_the_share() -> None:
    found = losses(network().train(), KeepRatio(labels=False, ratio_weight=3.0))
    assert [*found] == ["loss", "ratio"]
    torch.testing.assert_close(found["loss"], 3 * found["ratio"])


def test_shares_of_ones_own() -> None:
    model = network(0.7, (1, 2)).train()
    torch.manual_seed(0)
    drawn = model(IMAGES, want=("keep",))["keep"].mean(2)
    found = losses(model, KeepRatio(shares=(0.2, 0.1)))["ratio"]
    torch.testing.assert_close(found, (drawn - torch.tensor([0.2, 0.1])).square().mean())
    with pytest.raises(UserError, match=r"shares is \[0\.2\] and the network has 2 selections"):
        losses(model, KeepRatio(shares=(0.2,)))


def test_what_a_run_gives() -> None:
    given = TaskGiven(augment=Augment(label_smoothing=0.1), num_classes=3, grid=(4, 6))
    want = KeepRatio(ratio_weight=5.0, per="batch", label_smoothing=0.1)
    assert KeepRatioConfig(ratio_weight=5.0, per="batch").build(given) == want
    with pytest.raises(UserError, match=r"task\.ratio_weight is -1; it cannot be negative"):
        KeepRatioConfig(ratio_weight=-1)
    with pytest.raises(UserError, match=r"task\.per is 'pixel'"):
        KeepRatioConfig(per="pixel")  # type: ignore[arg-type]
