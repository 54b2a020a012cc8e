"""Recovery wins back what a network lost, or leaves it as it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from train_help import Kill, Killed

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.model import Model, build
from vitnas.slimming.recovery import Recovery, Streams, recover, same_places, step_seconds
from vitnas.train import Batch, TrainConfig

CONFIG = TrainConfig(epochs=4, lr=4e-3, warmup_epochs=1, weight_decay=0, monitor_every=0, log_every=1)


def arch(num_classes: int, dim: int = 16) -> Arch:
    block = Block(num_heads=2, head_dim=8, mlp_hidden=32)
    stage = Stage(embed_dim=dim, blocks=(block,) * 2)
    return Arch(image_size=8, patch_size=4, in_chans=3, num_classes=num_classes, stages=(stage,))


def images(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """`n` batches of 16; labels that no network here knows of."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 10, (16,), generator=generator))
        for _ in range(n)
    ]


TRAIN, HELD = images(8, seed=1), images(4, seed=2)


@torch.no_grad()
def damaged(original: Model, seed: int = 3) -> Model:
    model, generator = copy.deepcopy(original), torch.Generator().manual_seed(seed)
    for parameter in model.blocks.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def wakened(num_classes: int, dim: int = 16) -> Model:
    """An original whose answers differ from image to image."""
    model, generator = (
        build(arch(num_classes, dim), generator=torch.Generator().manual_seed(0)),
        torch.Generator(),
    )
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator.manual_seed(parameter.numel()))
    return model.eval()


@pytest.mark.parametrize("num_classes", [0, 10])
def test_a_damaged_network_is_recovered_without_labels(num_classes: int, tmp_path: Path) -> None:
    original = wakened(num_classes)
    model, kept = damaged(original), copy.deepcopy(original.state_dict())
    found = recover(model, original, TRAIN, HELD, config=CONFIG)
    assert found.is_better
    assert found.steps == 32
    before, after = found.before.agreement, found.after.agreement
    assert before.tokens is not None
    assert after.tokens is not None
    assert 1 - after.tokens < 0.5 * (1 - before.tokens)
    assert (after.top1 is None) == (num_classes == 0)
    assert not model.training
    torch.testing.assert_close(original.state_dict(), kept, rtol=0, atol=0)
    found.write(tmp_path)
    assert Recovery.read(tmp_path) == found
    assert str(found).startswith("recovery: ")


@pytest.mark.parametrize(("lr", "fails"), [(3.0, False), (1e30, True)])
def test_never_worse_than_before(lr: float, fails: bool) -> None:
    original = wakened(0)
    model = damaged(original)
    known = copy.deepcopy(model.state_dict())
    found = recover(model, original, TRAIN, HELD, config=replace(CONFIG, lr=lr, clip_grad=None, min_lr=lr))
    assert not found.is_better
    assert "the network from before it is kept" in str(found)
    assert bool(found.problem) == fails
    if not fails:
        assert found.after.key < found.before.key
    torch.testing.assert_close(model.state_dict(), known, rtol=0, atol=0)


def test_labels_judge_where_there_are_some() -> None:
    original = wakened(10)
    model = damaged(original)
    labelled = [(images_BCHW, original(images_BCHW).argmax(-1)) for images_BCHW, _ in HELD]
    found = recover(model, original, TRAIN, labelled, config=CONFIG, labels=True)
    assert found.before.accuracy is not None
    assert found.before.accuracy == found.before.agreement.top1
    assert str(found.before).startswith("accuracy")


def test_a_narrower_network_learns_through_a_lift_that_is_dropped() -> None:
    original = wakened(0)
    model = build(arch(0, dim=8), generator=torch.Generator().manual_seed(1))
    names = set(model.state_dict())
    found = recover(model, original, TRAIN, HELD, config=CONFIG)
    assert found.before.agreement.lifted
    assert found.is_better
    assert set(model.state_dict()) == names


def test_killed_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    original, config = wakened(0), replace(CONFIG, epochs=2, checkpoint_minutes=0)
    whole, cut = damaged(original), damaged(original)
    expected = recover(whole, original, TRAIN, HELD, config=config)
    with pytest.raises(Killed):
        recover(cut, original, TRAIN, HELD, config=config, folder=tmp_path, hooks=[Kill(8)])
    again = damaged(original)  # as read from disk
    found = recover(again, original, TRAIN, HELD, config=config, folder=tmp_path)
    assert replace(found, seconds=0) == replace(expected, seconds=0)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_what_a_step_takes_is_measured_on_a_copy() -> None:
    class Loader(list[tuple[Tensor, Tensor]]):
        steps_per_epoch = len(TRAIN)

    original = wakened(0)
    model = damaged(original)
    known = copy.deepcopy(model.state_dict())
    assert 0 < step_seconds(model, original, Loader(TRAIN), config=CONFIG) < 1
    torch.testing.assert_close(model.state_dict(), known, rtol=0, atol=0)


def test_streams_are_compared_behind_the_blocks_that_are_gone() -> None:
    block = Block(num_heads=2, head_dim=8, mlp_hidden=32)
    stages = [
        Stage(embed_dim=16, blocks=tuple(replace(block, slot=i) for i in n)) for n in ((0, 2), (0, 1, 2, 3))
    ]
    slim, original = (build(replace(arch(0), stages=(stage,))).eval() for stage in stages)
    assert same_places(slim, original) == ((0, 1), (1, 3))
    task, (pictures, _) = Streams(same_places(slim, original)), HELD[0]
    mine, theirs = slim(pictures, want=task.wants), original(pictures, want=task.wants_taught)
    losses = task(mine, Batch((pictures,), torch.zeros(16)), theirs)
    shares = [
        (mine[f"blocks.{a}"] - theirs[f"blocks.{b}"]).square().mean()
        / theirs[f"blocks.{b}"].flatten(0, 1).var(0, correction=0).mean()
        for a, b in ((0, 1), (1, 3))
    ]
    torch.testing.assert_close(losses["blocks"], sum(shares) / 2)
    cosine = torch.cosine_similarity(mine["tokens"], theirs["tokens"], dim=-1).mean()
    torch.testing.assert_close(losses["loss"], losses["blocks"] + 1 - cosine)


def test_patches_that_were_dropped_are_not_compared() -> None:
    tokens, taught = torch.ones(2, 5, 4), torch.ones(2, 5, 4)
    keep_BSP = torch.ones(2, 1, 4)
    keep_BSP[:, :, 2] = 0
    taught[:, 3] = -1  # the third patch
    batch = Batch((HELD[0][0][:2],), torch.zeros(2))
    given = {"tokens": tokens, "keep": keep_BSP}
    assert Streams(())(given, batch, {"tokens": taught})["loss"] == pytest.approx(0)
    assert Streams(())({"tokens": tokens}, batch, {"tokens": taught})["loss"] == pytest.approx(2 / 5)


def test_other_classes_are_refused() -> None:
    with pytest.raises(UserError, match="have 3 and 10 classes"):
        recover(build(arch(3)), wakened(10), TRAIN, HELD)
