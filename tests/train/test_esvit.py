"""Self-distillation: students of all kinds, crops of two sizes, stages, what is refused, a killed training."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from train_help import Kill, Killed

from vitnas.arch import Arch, Block, Stage
from vitnas.data import Data, synthetic
from vitnas.errors import UserError
from vitnas.model import build
from vitnas.sample import Fixed, Sampler, Sandwich, Uniform
from vitnas.space import autoformer
from vitnas.supernet import Supernet
from vitnas.train import Classification, EsViTConfig, SelfTeacher, TrainConfig, fit
from vitnas.train.losses import esvit
from vitnas.train.losses.esvit import Mixing, Taught, alike, cross_entropy, entropies, region_loss, view_loss
from vitnas.train.metrics import Step, read_lines

CONFIG = EsViTConfig(
    out_dim=16,
    hidden_dim=16,
    bottleneck_dim=8,
    local_crops_number=2,
    freeze_last_layer=0,
    momentum_teacher=0.5,
)
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
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 3,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (1, 2),
}


@pytest.fixture(scope="module")
def data() -> Data:
    return synthetic(num_classes=4, image_size=16, n=80, seed=0)


def of_timm(name: str, **options: Any) -> nn.Module:
    network: nn.Module = timm.create_model(name, num_classes=0, **options)
    return network


def plain() -> nn.Module:
    return build(SPACE.largest(), generator=torch.Generator().manual_seed(0))


def learn(
    network: nn.Module,
    data: Data,
    config: EsViTConfig = CONFIG,
    sampler: Sampler | None = None,
    *,
    train: TrainConfig = TRAIN,
    batch_size: int = 32,
    start: dict[str, Tensor] | None = None,
    **options: Any,
) -> SelfTeacher:
    loader = config.views(data.train, network, batch_size=batch_size, seed=0)
    teacher = config.teacher(network, start=start)
    fit(network, config.task(0.04), sampler or Fixed(), loader, config=train, teacher=teacher, **options)
    return teacher


KINDS: dict[str, Any] = {
    "plain": plain,
    "stages": lambda: build(STAGES),
    "supernet": lambda: Supernet(SPACE),
    "swin": lambda: of_timm("swin_tiny_patch4_window7_224", **{**SWIN, "img_size": 16}),
    "vit": lambda: of_timm("test_vit", img_size=16, patch_size=4),
    "convolutions": lambda: of_timm("test_resnet"),
}


SLOW = ("vit", "convolutions")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS]
)
def test_students_of_all_kinds_learn_from_their_average(data: Data, kind: str) -> None:
    network = KINDS[kind]()
    config = replace(CONFIG, region=False) if kind == "convolutions" else CONFIG  # a grid of 1 x 1
    before = copy.deepcopy(network)
    teacher = learn(network, data, config, Uniform(SPACE) if kind == "supernet" else None)
    changed = [
        name
        for (name, new), old in zip(network.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert any(
        "pos_embed" in name or "position" in name or "stem" in name or "conv1" in name for name in changed
    )
    assert any("blocks" in name or "layer" in name or "stages" in name for name in changed)
    for new, old, average in zip(
        network.parameters(), before.parameters(), teacher.network.parameters(), strict=True
    ):
        assert torch.equal(new, old) or not torch.equal(average, new), "the average lags behind"
    assert float(teacher.centre("view").norm()) > 0


def test_regions_begin_with_their_stage(data: Data, tmp_path: Path) -> None:
    """Within a training at an epoch; last layers stay in the epoch in which their loss begins."""
    config = replace(CONFIG, region_from=1.0, freeze_last_layer=1.0)
    last: list[list[Tensor]] = []

    class Looking(Kill):
        def before(self, moment: Any) -> None:
            own = [group["params"] for group in moment.optimizer.param_groups[-2:]]
            last.append([p.detach().clone() for params in own for p in params if p.shape == (16, 8)])

    learn(
        plain(),
        data,
        config,
        train=replace(TRAIN, epochs=3),
        folder=tmp_path,
        hooks=[Looking(-1)],
        batch_size=30,
    )
    lines = [line for line in read_lines(tmp_path) if isinstance(line, Step)]
    assert ["region" in line.losses for line in lines] == [False, False, True, True, True, True]
    assert {"teacher_entropy", "winner_entropy", "center_norm", "view"} <= lines[0].losses.keys()
    moved = [
        [not torch.equal(new, old) for new, old in zip(after, before, strict=True)]
        for before, after in pairwise(last)
    ]
    assert moved == [[False, False]] * 2 + [[True, False]] * 2 + [[True, True]]


def test_a_second_training_goes_on_with_heads_and_centres(data: Data) -> None:
    """First views alone, then regions too."""
    network = plain()
    first = learn(network, data, replace(CONFIG, region=False))
    start = {name: tensor.clone() for name, tensor in first.handover().items()}
    assert not any("region" in name for name in start)
    no_steps = replace(TRAIN, epochs=1e-9, lr=1e-12, weight_decay=0.0)
    second = learn(
        network, data, replace(CONFIG, momentum_teacher=1.0, center_momentum=1.0), train=no_steps, start=start
    )
    found = second.handover()
    for name, tensor in start.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)
    assert any("heads.region" in name for name in found)
    with pytest.raises(UserError, match="other heads"):
        learn(network, data, replace(CONFIG, out_dim=8), start=start)


@pytest.mark.parametrize("kind", ["plain", pytest.param("supernet", marks=pytest.mark.slow)])
def test_a_killed_training_ends_with_the_same_bits(data: Data, tmp_path: Path, kind: str) -> None:
    """Killed behind the step at which regions began; centres, heads, average and rates are those of before."""
    config = replace(CONFIG, region_from=0.5, mixup=0.5)
    options: dict[str, Any] = {"batch_size": 12, "train": replace(TRAIN, checkpoint_minutes=0)}
    options["sampler"] = Sandwich(SPACE) if kind == "supernet" else Fixed()
    whole = KINDS[kind]() if kind == "plain" else Supernet(SPACE, generator=torch.Generator().manual_seed(0))
    killed, again = copy.deepcopy(whole), copy.deepcopy(whole)
    want = learn(whole, data, config, folder=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        learn(killed, data, config, folder=tmp_path / "killed", hooks=[Kill(4)], **options)
    found = learn(again, data, config, folder=tmp_path / "killed", hooks=[Kill(-1)], **options)
    left = found.handover()
    for name, tensor in want.handover().items():
        assert torch.equal(tensor, left[name]), name
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))


def straightforward(logits: Tensor, taught: list[Taught], temperature: float) -> Tensor:
    log = functional.log_softmax(logits / temperature, dim=-1)
    found = torch.zeros(())
    for rows, index, weight in taught:
        loss = -(rows[index] * log).sum(-1)
        found = found + (loss if weight is None else loss * weight).sum()
    return found


def test_pieces_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(esvit, "PIECE", 3 * 7)  # three rows at once
    torch.manual_seed(0)
    logits, taught = torch.randn(10, 7, requires_grad=True), []
    for weight in (None, torch.rand(10)):
        taught.append(Taught(torch.randn(5, 7).softmax(-1), torch.randint(0, 5, (10,)), weight))
    want = straightforward(logits, taught, 0.1)
    (gradient,) = torch.autograd.grad(3 * want, logits)
    found = cross_entropy(logits, taught, 0.1)
    (3 * found).backward()
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(logits.grad, gradient)


def test_mixed_regions_learn_of_both_images() -> None:
    """A crop that is wholly another image learns what that image alone would teach it; half and half is the mean."""
    torch.manual_seed(0)
    students, teachers = (
        [torch.randn(4, 3, 8) for _ in range(2)],
        [torch.randn(4, 5, 8).softmax(-1) for _ in range(2)],
    )
    mine, theirs = [torch.randn(4, 3, 6) for _ in range(2)], [torch.randn(4, 5, 6) for _ in range(2)]
    partner = torch.arange(4).flip(0)

    def loss(share: float) -> Tensor:
        return region_loss(
            students, mine, teachers, theirs, 0.1, [Mixing(partner, torch.full((4,), share))] * 2
        )

    own = region_loss(students, mine, teachers, theirs, 0.1)
    others = region_loss(students, mine, [t.flip(0) for t in teachers], [t.flip(0) for t in theirs], 0.1)
    torch.testing.assert_close(loss(1.0), own)
    torch.testing.assert_close(loss(0.0), others)
    torch.testing.assert_close(loss(0.5), (own + others) / 2)


def test_no_small_crops_and_one_region_each() -> None:
    """Both crash the authors' code."""
    torch.manual_seed(0)
    features = [torch.randn(2, 1, 6) for _ in range(2)]
    logits, said = (
        [torch.randn(2, 1, 8) for _ in range(2)],
        [torch.randn(2, 1, 8).softmax(-1) for _ in range(2)],
    )
    regions = region_loss(logits, features, said, features, 0.1)
    torch.testing.assert_close(regions, view_loss([x[:, 0] for x in logits], [x[:, 0] for x in said], 0.1))
    assert alike(features[0], features[0]).tolist() == [0, 1]


def test_collapses_show_in_the_entropies() -> None:
    even, same = torch.full((6, 16), 1 / 16), torch.eye(16)[[3] * 6]
    assert float(entropies(even)["teacher_entropy"]) == pytest.approx(2.7726, abs=1e-4)
    assert float(entropies(same)["winner_entropy"]) == pytest.approx(0, abs=1e-6)
    varied = entropies(torch.eye(16))
    assert float(varied["teacher_entropy"]) == pytest.approx(0, abs=1e-6)
    assert float(varied["winner_entropy"]) == pytest.approx(2.7726, abs=1e-4)


def test_a_warm_up_longer_than_the_training_and_none() -> None:
    temperatures = [replace(CONFIG, warmup_teacher_temp_epochs=n).teacher_temp_at(3) for n in (0, 1, 100)]
    assert temperatures[:2] == [0.02, 0.02]
    assert 0.01 < temperatures[2] < 0.011


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"student_temp": 0.0}, "student_temp is 0.0"),
        ({"teacher_temp": -0.1}, "teacher_temp"),
        ({"warmup_teacher_temp": 2.0}, "warmup_teacher_temp"),
        ({"center_momentum": 1.1}, "center_momentum"),
        ({"momentum_teacher": -0.1}, "momentum_teacher"),
        ({"local_crops_number": -1}, "local_crops_number"),
        ({"global_crops_scale": (0.5, 0.2)}, "global_scale"),
        ({"weight_decay_end": 0.0}, "weight_decay_end"),
        ({"out_dim": 1}, "out_dim"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(CONFIG, **wrong)


def no_features() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))


@pytest.mark.parametrize(
    ("make", "config", "said"),
    [
        (plain, replace(CONFIG, local_crops_size=2), "local_crops_size=4 or more"),
        (KINDS["stages"], replace(CONFIG, local_crops_size=2), "local_crops_size=4 or more"),
        (KINDS["stages"], replace(CONFIG, local_crops_size=6), "6"),
        (plain, replace(CONFIG, local_crops_size=32), "larger than the network's"),
        (KINDS["convolutions"], CONFIG, "has one for an image"),
        (no_features, CONFIG, "cannot take images of 7"),
        (no_features, replace(CONFIG, local_crops_number=0), "pooled"),
    ],
)
def test_networks_and_crops_that_do_not_fit_are_refused(
    data: Data, make: Any, config: EsViTConfig, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        learn(make(), data, config)


def test_too_few_images_are_refused(data: Data) -> None:
    with pytest.raises(UserError, match="100"):
        learn(plain(), data, batch_size=100)
    with pytest.raises(UserError, match="1 train images"):
        CONFIG.views(data.train.subset([0]), plain(), batch_size=2)


def test_a_teacher_and_a_task_of_other_kinds_are_refused(data: Data) -> None:
    network = plain()
    loader = CONFIG.views(data.train, network, batch_size=16)
    with pytest.raises(UserError, match="Classification"):
        fit(network, Classification(), Fixed(), loader, config=TRAIN, teacher=CONFIG.teacher(network))
    with pytest.raises(UserError, match="there is none"):
        fit(network, CONFIG.task(), Fixed(), loader, config=TRAIN)
