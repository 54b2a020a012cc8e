"""Selections in a Model: what they keep, how they train, and what follows a change of image, blocks or mixers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.layers.choose import even_worth, straight_through
from vitnas.layers.select import MASK_EPS, Kept, masked_softmax
from vitnas.layers.selectors import SELECTIONS
from vitnas.model import Model, build
from vitnas.model.swap import swap_attention
from vitnas.testing import randomize_

BLOCK = Block(num_heads=2, head_dim=16, mlp_hidden=48)


def arch_of(*keeps: int | None, **fields: Any) -> Arch:
    """Blocks on a grid of 6 x 4 patches, one per number of patches kept."""
    blocks = tuple(replace(BLOCK, keep=keep) for keep in keeps)
    options = {"selector": "predictor", "num_classes": 5, "image_size": (24, 16), "patch_size": 4, **fields}
    return Arch(stages=(Stage(embed_dim=32, blocks=blocks),), **options)


def made(arch: Arch) -> Model:
    model = build(arch)
    randomize_(model, torch.Generator().manual_seed(0))
    return model.eval()


def images_for(model: Model, n: int = 3) -> Tensor:
    return torch.randn(n, *model.arch.input_size, generator=torch.Generator().manual_seed(1))


def test_the_best_scores_are_kept_in_the_order_of_the_patches() -> None:
    model = made(arch_of(None, 11, None, 5))
    found = model(images_for(model), want=("keep", "scores", "places.1", "places.3", "blocks.3"))
    for index, (keep, name) in enumerate(((11, "places.1"), (5, "places.3"))):
        best = found["scores"][:, index].topk(keep).indices.sort().values
        torch.testing.assert_close(found[name], best)
        torch.testing.assert_close(found["keep"][:, index].nonzero()[:, 1].view(3, keep), best)
    assert bool((found["keep"][:, 1] <= found["keep"][:, 0]).all())
    gone = found["keep"][:, 0] == 0
    assert bool((found["scores"][:, 1][gone] == -torch.inf).all())
    assert bool(found["scores"][:, 1][~gone].isfinite().all())
    assert found["blocks.3"].shape[1] == 6
    assert not torch.equal(found["places.1"][0], found["places.1"][1])  # per image


def test_what_a_dropped_patch_holds_changes_nothing() -> None:
    model = made(arch_of(9, None, selector="fixed"))
    images = images_for(model)
    keep = model(images, want=("keep",))["keep"][0, 0].view(6, 4)
    row, column = (int(number) for number in (keep == 0).nonzero()[0])
    other = images.clone()
    other[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    torch.testing.assert_close(model(other), model(images), rtol=0, atol=0)
    row, column = (int(number) for number in (keep == 1).nonzero()[0])
    other[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    assert not torch.equal(model(other), model(images))


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("position", ["learned", "rotary_2d"])
def test_attention_is_that_of_the_block_before(class_token: bool, position: str) -> None:
    pool = "token" if class_token else "avg"
    model = made(
        arch_of(None, 9, selector="attention", class_token=class_token, global_pool=pool, position=position)
    )
    images = images_for(model)
    attn = model.blocks[0].attn
    q, k, _ = attn.split(model.blocks[0].norm1(model.embed(images)))
    q, k = attn.rotary(q, k)
    weights = (q @ k.transpose(2, 3) * attn.scale).softmax(-1).mean(1)
    want = weights[:, 0, 1:] if class_token else weights.mean(1)
    scores = model(images, want=("scores",))["scores"][:, 0]
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-6)


def test_training_carries_all_tokens_and_the_predictor_learns() -> None:
    model = made(arch_of(None, 9, 4)).train()
    images = images_for(model)
    torch.manual_seed(0)
    first = model(images, want=("keep", "tokens", "logits"))
    second = model(images, want=("keep",))["keep"]
    assert first["tokens"].shape[1] == 25
    keep = first["keep"].detach().round()
    torch.testing.assert_close(keep, first["keep"].detach(), rtol=0, atol=1e-6)
    assert bool((keep[:, 1] <= keep[:, 0]).all())
    assert not torch.equal(keep, second.detach().round())  # drawn anew
    first["logits"].square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("selections."):
            assert parameter.grad is not None
            assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("pool", ["token", "avg", "seq"])
def test_a_draw_that_drops_all_patches_stays_finite(pool: str) -> None:
    model = made(arch_of(None, 9, 4, global_pool=pool)).train()
    with torch.no_grad():
        for selection in model.selections.values():
            assert isinstance(selection, SELECTIONS["predictor"])
            selection.decision.bias.copy_(torch.tensor([-1000.0, 1000.0]))  # type: ignore[operator]
    found = model(images_for(model), want=("keep", "logits"))
    assert not bool(found["keep"].any())
    found["logits"].sum().backward()
    assert bool(found["logits"].isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_the_other_kinds_keep_as_many_in_training() -> None:
    for selector in ("fixed", "attention"):
        model = made(arch_of(None, 9, 4, selector=selector))
        images = images_for(model)
        trained = model.train()(images, want=("keep", "tokens"))
        assert trained["tokens"].shape[1] == 25
        torch.testing.assert_close(trained["keep"], model.eval()(images, want=("keep",))["keep"])


def test_straight_through() -> None:
    odds = torch.tensor([[-2.0, 0.5, 3.0]], requires_grad=True)
    noise = torch.tensor([[0.0, -1.0, 1.0]])
    decisions = straight_through(odds, noise)
    torch.testing.assert_close(decisions.detach(), torch.tensor([[0.0, 0.0, 1.0]]))
    decisions.sum().backward()
    soft = (odds + noise).detach().sigmoid()
    torch.testing.assert_close(odds.grad, soft * (1 - soft))


def test_masked_softmax_of_nothing_is_uniform() -> None:
    scores = torch.tensor([[1.0, 5.0, -2.0, 0.0]])
    found = masked_softmax(scores, torch.zeros(1, 4))
    torch.testing.assert_close(found, torch.full((1, 4), 0.25))
    whole = masked_softmax(scores, torch.ones(1, 4))
    torch.testing.assert_close(whole, scores.softmax(-1), rtol=0, atol=2 * MASK_EPS)


def test_fixed_places_begin_spread_over_the_grid() -> None:
    for keep in (4, 16, 49):
        rows, columns = (
            even_worth((14, 14)).topk(keep).indices // 14,
            even_worth((14, 14)).topk(keep).indices % 14,
        )
        quarters = torch.stack([(rows < 7) & (columns < 7), (rows < 7) & (columns >= 7)]).sum(1)
        assert int((quarters - keep / 4).abs().max()) <= max(1, keep // 10)
    assert len(set(even_worth((14, 14)).tolist())) == 196  # no ties


def test_forward_head_cannot_tell_dropped_patches_in_training() -> None:
    model = made(arch_of(None, 9, global_pool="avg"))
    images = images_for(model)
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), model(images))
    features = model.train().forward_features(images)
    with pytest.raises(UserError, match=r"hold dropped patches, as in training, and global_pool 'avg' must"):
        model.forward_head(features)
    model.masks_tokens = False
    assert model.forward_head(model.forward_features(images)).shape == (3, 5)


@pytest.mark.parametrize("indices", [(0, 1), (1, 0), (1, 1)], ids=str)
def test_maps_where_patches_are_gone_are_refused_in_any_order(indices: tuple[int, ...]) -> None:
    model = made(arch_of(None, 9))
    with pytest.raises(UserError, match=r"a map of block 1 is asked for, but 9 of 24 patches come out of it"):
        model.forward_intermediates(images_for(model), indices)
    tokens = model.forward_intermediates(
        images_for(model), indices, output_fmt="NLC", intermediates_only=True
    )
    assert [item.shape[1] for item in tokens] == [24, 9][-len({*indices}) :]


def test_another_image_size_keeps_the_share() -> None:
    model = made(arch_of(None, 12, 3, selector="fixed"))
    model.set_input_size(img_size=(48, 32))
    assert [block.keep for block in model.arch.blocks] == [None, 48, 12]
    assert model(images_for(model), want=("blocks.2",))["blocks.2"].shape[1] == 13
    state = model.state_dict()
    assert state["selections.1.worth"].shape == (96,)
    with pytest.raises(UserError, match=r"block 1: keep is 1, but 1 patches come to it"):
        model.set_input_size(img_size=4)
    assert [block.keep for block in model.arch.blocks] == [None, 48, 12]


def test_blocks_that_go_take_their_selections_along() -> None:
    model = made(arch_of(None, 9, None, 4))
    model.prune_intermediate_layers([2])
    assert [*model.selections] == ["1"]
    assert model.arch.selector == "predictor"
    model.prune_intermediate_layers([0])
    assert model.arch.selector is None
    assert not len(model.selections)


def test_swapping_in_a_mixer_that_cannot_do_without_patches_is_refused() -> None:
    model = made(arch_of(None, 9, None))
    before = model.state_dict()
    with pytest.raises(UserError, match=r"mixer is 'nystrom' behind a selection; only performer, softmax"):
        swap_attention(model, "nystrom")
    assert {name for name in model.state_dict()} == {*before}
    swap_attention(model, "performer")
    assert model(images_for(model)).shape == (3, 5)
    assert [block.mixer for block in model.arch.blocks] == ["performer"] * 3


def test_a_mask_in_half_precision() -> None:
    model = made(arch_of(None, 9, 4)).train()
    images = images_for(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images, want=("logits", "keep"))
    assert bool(found["logits"].isfinite().all())
    assert set(found["keep"].detach().round().unique().tolist()) == {0.0, 1.0}
    found["logits"].float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_every_kind_scores_what_is_left() -> None:
    """By itself, with and without a mask: what was dropped before is never taken up again."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 13, 8, generator=generator)
    attention = torch.rand(2, 12, generator=generator)
    mask = torch.tensor([True] * 7 + [False] * 6).expand(2, -1)
    for kind in [kind for kind in SELECTIONS.values() if kind.has_mask]:
        selection = kind(8, 4, grid=(4, 3), num_prefix_tokens=1).eval()
        found = selection(x, Kept(mask_BN=mask), attention, masked=True)
        kept = found.after.mask_BN
        assert kept is not None
        assert kept.sum(1).tolist() == [5, 5]
        assert not bool((kept & ~mask).any())


@pytest.mark.parametrize("selector", ["patch_slimming", "dynamic_patch_slimming"])
def test_what_patch_slimming_drops_is_gone_in_training_too(selector: str) -> None:
    """Which patches go has no gradient, so nothing is carried along; unless by hand."""
    model = made(arch_of(11, None, 5, 0, selector=selector))
    images = images_for(model)
    logits = model(images)
    found = model.train()(images, want=("tokens", "logits", "blocks.2"))
    assert found["tokens"].shape[1] == 1
    assert found["blocks.2"].shape[1] == 6
    torch.testing.assert_close(found["logits"], logits)
    model.masks_tokens = True
    found = model(images, want=("tokens", "logits"))
    assert found["tokens"].shape[1] == 25
    torch.testing.assert_close(found["logits"], logits)


def test_what_leaves_in_front_of_a_block_still_gives_it_keys() -> None:
    """A patch that block 0 does not give changes what it gives of the others."""
    model = made(arch_of(20, 12, 5, selector="patch_slimming"))
    images = images_for(model)
    places = model(images, want=("places.0", "places.1", "places.2"))
    gone = set(range(24)) - {*places["places.0"][0].tolist()}
    x = model.embed(images)
    y = model.blocks[0](x, None, "none", model.selections["0"](x).picked)
    x[:, 1 + min(gone)] += 1
    assert not torch.allclose(model.blocks[0](x, None, "none", model.selections["0"](x).picked), y)
    assert y.shape[1] == 21
