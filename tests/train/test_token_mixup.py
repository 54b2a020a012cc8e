"""Token mixup and hard distillation: labels per cell, boxes, losses, and their place in the loop."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.errors import UserError
from vitnas.model import build
from vitnas.sample import Fixed, Spread
from vitnas.space import vit_resnas
from vitnas.supernet import Supernet
from vitnas.train import Batch, Classification, Distillation, Hard, Teacher, TokenMixup, TrainConfig, fit
from vitnas.train.losses.token_mixup import as_fine, random_box
from vitnas.train.task import Outputs

SPACE = vit_resnas(
    "micro", image_size=16, patch_size=2, num_classes=5, depths=(2, 2), embed_dims=(8, 12), patch_head=True
)
TASK = TokenMixup(num_classes=5, grid=(4, 4), label_smoothing=0.1)


def numbered(n: int = 8) -> Batch:
    """Image i holds i + 1 everywhere; its class is i modulo 5."""
    images = torch.arange(1.0, n + 1)[:, None, None, None].expand(n, 1, 16, 16).clone()
    return Batch((images,), torch.arange(n) % 5)


def smoothed(targets: Tensor) -> Tensor:
    return functional.one_hot(targets, 5) * 0.9 + 0.02


@pytest.mark.parametrize("seed", range(12))
def test_cells_show_whose_label_they_have(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    before = numbered()
    batch = TASK.mix(before)
    torch.testing.assert_close(before.images_BCHW, numbered().images_BCHW, rtol=0, atol=0)  # a copy was mixed
    assert batch.targets.shape == (8, 5)
    assert batch.patch_targets is not None
    assert batch.patch_targets.shape == (8, 16, 5)
    torch.testing.assert_close(batch.patch_targets.sum(-1), torch.ones(8, 16))
    labels = smoothed(before.targets)
    cells = batch.images_BCHW[:, 0, ::4, ::4].flatten(1)  # one pixel of each cell
    for index in range(0, 8, 2):  # by cells
        owners = cells[index].long() - 1
        torch.testing.assert_close(batch.patch_targets[index], labels[owners])
        torch.testing.assert_close(batch.targets[index], labels[owners].mean(0))
        assert set(owners.tolist()) <= {0, 2, 4, 6}
        assert len(set(owners.tolist())) <= 2
        blocks = batch.images_BCHW[index, 0].unflatten(0, (4, 4)).unflatten(2, (4, 4))
        assert torch.equal(blocks, blocks[:, :1, :, :1].expand_as(blocks))  # cells are whole
    for index in range(1, 8, 2):  # as a whole
        assert len(set(cells[index].tolist())) == 1
        torch.testing.assert_close(
            batch.patch_targets[index], batch.targets[index].expand(16, -1), rtol=0, atol=0
        )
    share = [(cells[i, 0] - 1) for i in range(1, 8, 2)]
    assert all(1 <= value <= 7 for value in share)


def test_boxes_have_the_area_asked_for_and_reach_every_cell() -> None:
    random.seed(0)
    reached: Counter[tuple[int, int]] = Counter()
    for _ in range(2000):
        share = random.random()
        top, left, height, width = random_box((4, 4), share)
        assert 0 <= top <= top + height <= 4
        assert 0 <= left <= left + width <= 4
        assert height * width <= 16 * share
        assert height * width > 16 * share - 4  # whole rows of at most four cells are rounded away
        reached.update((y, x) for y in range(top, top + height) for x in range(left, left + width))
    assert len(reached) == 16
    assert random_box((4, 4), 0.01)[2:] == (1, 0)


def test_the_loss_is_that_of_both_heads() -> None:
    model = build(SPACE.largest()).eval()
    random.seed(0)
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    batch = replace(TASK, grid=(4, 4)).mix(Batch((images,), torch.tensor([0, 1, 2, 3])))
    heads = model(batch.images_BCHW, want=TASK.wants)
    losses = replace(TASK, patch_weight=0.5)(heads, batch, {})
    ce = -(heads["head"].log_softmax(-1) * batch.targets).sum(-1).mean()
    patch = -(heads["patch_head"].log_softmax(-1) * batch.patch_targets).sum(-1).mean()
    torch.testing.assert_close(losses["loss"], ce + 0.5 * patch)
    torch.testing.assert_close((losses["ce"], losses["patch"]), (ce, patch))


def test_a_network_without_a_patch_head_learns_the_images_labels() -> None:
    model = build(replace(SPACE.largest(), patch_head=False)).eval()
    batch = TASK.mix(Batch((torch.randn(4, 3, 16, 16),), torch.arange(4)))
    losses = TASK(model(batch.images_BCHW, want=TASK.wants), batch, {})
    assert set(losses) == {"loss"}


def test_cells_are_repeated_on_a_finer_grid() -> None:
    cells = torch.arange(4.0)[None, :, None]  # 2 x 2 cells
    want = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3.0]])
    torch.testing.assert_close(as_fine(cells, (2, 2), 16)[0, :, 0].view(4, 4), want)
    assert as_fine(cells, (2, 2), 4) is cells
    with pytest.raises(UserError, match=r"has 9 patches and the labels 2 x 2 cells"):
        as_fine(cells, (2, 2), 9)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"labels are mixed already; .* mixup and cutmix of the augmentation to 0"
    ):
        TASK.mix(Batch((torch.zeros(2, 1, 16, 16),), torch.ones(2, 5)))
    with pytest.raises(UserError, match=r"images have 18 x 18 pixels and the final grid 4 x 4 cells"):
        TASK.mix(Batch((torch.zeros(2, 1, 18, 18),), torch.zeros(2, dtype=torch.long)))


class Recording(TokenMixup):
    """Notes what every Arch of a step was given."""

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        SEEN.append(batch)
        return super().__call__(outputs, batch, taught)


SEEN: list[Batch] = []


def test_a_batch_is_mixed_once_and_then_shared() -> None:
    SEEN.clear()
    supernet = Supernet(SPACE)
    loader = [(torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,)))]
    config = TrainConfig(epochs=1, warmup_epochs=0, monitor_every=0)
    fit(supernet, Recording(num_classes=5, grid=(4, 4)), Spread(SPACE, 2), loader, config=config)
    assert [len(batch.images_BCHW) for batch in SEEN] == [4, 4]
    for batch in SEEN:
        assert batch.patch_targets is not None
        assert batch.patch_targets.shape == (4, 16, 5)
        whole = (batch.patch_targets == batch.patch_targets[:, :1]).all(-1).all(-1)
        assert whole[1::2].all()
    assert not torch.equal(supernet.get_parameter("patch_head.bias"), torch.zeros(5))


def test_the_teachers_choice_is_learned_by_the_distillation_token() -> None:
    arch = replace(SPACE.largest(), patch_head=False, distill_token=True)
    torch.manual_seed(0)
    model = build(arch).eval()
    task = Distillation(losses={"hard": (Hard(), 0.25)}, labels=Classification(), label_weight=0.75)
    images, targets = torch.randn(6, 3, 16, 16), torch.arange(6) % 5
    taught = {"logits": torch.randn(6, 5)}
    heads = model(images, want=task.wants)
    losses = task(heads, Batch((images,), targets), taught)
    ce = functional.cross_entropy(heads["head"], targets)
    kd = functional.cross_entropy(heads["head_dist"], taught["logits"].argmax(-1))
    torch.testing.assert_close(losses["loss"], 0.75 * ce + 0.25 * kd)
    plain = build(replace(arch, distill_token=False)).eval()
    losses = task(plain(images, want=task.wants), Batch((images,), targets), taught)
    choice = taught["logits"].argmax(-1)
    torch.testing.assert_close(losses["hard"], functional.cross_entropy(plain(images), choice))
    with pytest.raises(UserError, match="the teacher has 4 classes, the network 5"):
        task(heads, Batch((images,), targets), {"logits": torch.randn(6, 4)})


def test_both_train_a_model() -> None:
    torch.manual_seed(0)
    prototypes = torch.randn(5, 3, 16, 16)
    targets = torch.arange(40) % 5
    loader = [(prototypes[targets] + 0.1 * torch.randn(40, 3, 16, 16), targets)]
    config = TrainConfig(epochs=45, lr=8e-3, warmup_epochs=0, monitor_every=0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    with torch.no_grad():
        teacher[1].weight.copy_(prototypes.flatten(1))
    distilled = replace(SPACE.smallest(), patch_head=False, distill_token=True)
    for arch, task, taught_by in (
        (SPACE.smallest(), TASK, None),
        (distilled, Distillation(losses={"hard": (Hard(), 1.0)}, labels=Classification()), Teacher(teacher)),
    ):
        model = build(arch, generator=torch.Generator().manual_seed(0))
        fit(model, task, Fixed(), loader, config=config, teacher=taught_by)
        assert (model.eval()(loader[0][0]).argmax(-1) == targets).float().mean() > 0.9
