"""Patch Slimming: the search and what it costs, tuning, budgets, predicted scores, and the paper's acceptance test."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

from vitnas.arch import Arch, Block, Stage
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.model import Model, build
from vitnas.model.blocks import TransformerBlock
from vitnas.model.selections import with_places
from vitnas.sample import Fixed
from vitnas.slimming import BlockTuning, Prediction, slim_patches
from vitnas.slimming.patch_scores import Blocks, Streams, mean_scores, patch_scores
from vitnas.slimming.patches import Layer, PatchSearch
from vitnas.testing import randomize_
from vitnas.testing.refusal import refusal
from vitnas.train import Classification, TrainConfig, fit
from vitnas.train.teacher import Teacher

BLOCK = Block(num_heads=2, head_dim=8, mlp_hidden=32)


def arch_of(depth: int = 4, **fields: Any) -> Arch:
    """Blocks on 5 x 4 patches."""
    options = {"image_size": (10, 8), "patch_size": 2, "num_classes": 5, **fields}
    stages = options.pop("stages", (Stage(embed_dim=16, blocks=(BLOCK,) * depth),))
    return Arch(stages=stages, **options)


def made(arch: Arch, seed: int = 0) -> Model:
    model = build(arch)
    randomize_(model, torch.Generator().manual_seed(seed))
    return model.eval()


def images_for(model: Model, batches: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, *model.arch.input_size, generator=generator) for _ in range(batches)]


def kept(model: Model) -> list[int]:
    """Patches that each block gives."""
    left, found = prod(model.arch.grids[-1]), []
    for block in model.arch.blocks:
        left = left if block.keep is None else block.keep
        found.append(left)
    return found


def test_the_search_ends_within_its_tolerance_and_leaves_the_network_alone() -> None:
    model = made(arch_of()).train().requires_grad_(False)
    before, images = copy.deepcopy(model.state_dict()), images_for(model)
    found = slim_patches(model, images, tolerance=0.02, step=3, tuning=BlockTuning(epochs=1))
    assert all(error <= 0.02 for error in found.errors)
    assert found.errors[-1] == 0
    counts = kept(found.model)
    assert counts == sorted(counts, reverse=True) == [len(places) for places in found.places]
    assert counts[-1] == 0
    assert 0 < counts[0] < 20
    for inner, outer in zip(found.places[1:], found.places, strict=False):
        assert {*inner.tolist()} <= {*outer.tolist()}
    for tried in found.tried:
        ends = tried.error <= 0.02 or tried.tokens == 21
        assert ends == (tried == [t for t in found.tried if t.block == tried.block][-1])
    assert model.training
    assert not any(p.requires_grad for p in found.model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_tolerance_0_gives_up_nothing_but_the_last_blocks_patches() -> None:
    model = made(arch_of())
    images = images_for(model)
    found = slim_patches(model, images, tolerance=0.0, step=7)
    assert kept(found.model) == [20, 20, 20, 0]
    assert count(found.model.arch).macs < count(model.arch).macs
    torch.testing.assert_close(found.model(images[0]), model(images[0]), rtol=1e-5, atol=1e-5)


def counting(counted: Counter[int]) -> Any:
    """A block's forward pass that notes its number, told by the width of its MLP."""
    forward = TransformerBlock.forward

    def noted(self: Any, *given: Any) -> Any:
        counted[(self.mlp.fc1.out_features - 32) // 4] += 1
        return forward(self, *given)

    return noted


def test_tuning_costs_two_blocks_a_step_and_not_the_network() -> None:
    """Calls of each block: more epochs cost calls of the block that is tuned and the one behind it alone."""
    blocks = tuple(replace(BLOCK, mlp_hidden=32 + 4 * index) for index in range(5))
    model, calls = made(arch_of(stages=(Stage(embed_dim=16, blocks=blocks),))), list[Counter[int]]()
    images = images_for(model)
    for epochs in (1, 4):
        counted: Counter[int] = Counter()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TransformerBlock, "forward", counting(counted))
            tuning = BlockTuning(epochs=epochs, lr=1e-9)
            found = slim_patches(model, images, tolerance=0.0, step=11, tuning=tuning)
        calls.append(counted)
    tried = Counter(t.block for t in found.tried)
    assert tried == {0: 1, 1: 1, 2: 1, 3: 3}
    more = {index: calls[1][index] - calls[0][index] for index in range(5)}
    # 3 more epochs of 2 batches, in the block itself and in the one behind.
    assert more == {index: 6 * (tried[index] + tried[index - 1]) for index in range(5)}


def test_tuning_lowers_the_error_of_its_block_and_changes_no_other() -> None:
    model = made(arch_of())
    slimming = PatchSearch(model, images_for(model), step=4)
    found = slimming.search(0.05)
    tuned = slimming.tuned(found, BlockTuning(epochs=20, lr=1e-3))
    assert [*map(len, tuned.places)] == [*map(len, found.places)]
    assert all(after < before for after, before in zip(tuned.errors[:-1], found.errors[:-1], strict=True))
    old, new = found.model.state_dict(), tuned.model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {int(name.split(".")[1]) for name in changed} == {0, 1, 2}
    assert all(name.startswith("blocks.") for name in changed)


def test_a_step_beyond_the_memory_is_computed_again() -> None:
    model = made(arch_of(depth=6))
    images = images_for(model)
    plenty, few = (Streams(Blocks(model), images, memory_bytes=n) for n in (1e9, 4 * 8 * 21 * 16 * 3))
    for index in (6, 5, 0, 3):
        torch.testing.assert_close(few.into(index), plenty.into(index), rtol=0, atol=0)
    assert len(few._known) == 3
    assert len(plenty._known) == 7


def test_scores_of_deep_networks_with_many_heads_stay_finite() -> None:
    """40 blocks of 16 heads: the sum over all combinations of heads is beyond float32."""
    block = Block(num_heads=16, head_dim=1, mlp_hidden=4)
    blocks = Blocks(made(arch_of(stages=(Stage(embed_dim=16, blocks=(block,) * 40),))))
    given = [*([blocks.all_tokens] * 38), blocks.before_patches]
    scores = patch_scores(blocks, 0, torch.randn(2, 21, 16), given)
    assert bool((scores > 1e38).all())
    assert bool(scores.isfinite().all())


QUICK = Prediction(steps=4)


def test_scores_are_learned_where_nobody_looks_at_some_patches() -> None:
    """Attention so sharp that squares of it are 0 in float32."""
    model = made(arch_of(depth=3))
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        block.attn.qkv.weight.data[:32] *= 40
    found = slim_patches(model, images_for(model), tolerance=0.1, step=5, dynamic=QUICK)
    assert all(bool(learned.isfinite().all()) for learned in found.model.selections.parameters())


@pytest.mark.parametrize("dynamic", [False, QUICK], ids=["fixed", "dynamic"])
def test_a_budget_is_met_and_used(dynamic: Any) -> None:
    model = made(arch_of(depth=3))
    limit = 0.6 * count(model.arch).macs
    found = slim_patches(model, images_for(model), budget="macs<=60%", step=1, dynamic=dynamic)
    assert 0.92 * limit < count(found.model.arch).macs <= limit


def test_with_a_budget_blocks_are_tuned_once_at_their_places() -> None:
    model = made(arch_of(depth=3))
    plain, tuned = (
        slim_patches(
            model, images_for(model), budget=f"macs<={0.6 * count(model.arch).macs}", step=4, tuning=tuning
        )
        for tuning in (None, BlockTuning(epochs=5))
    )
    assert [p.tolist() for p in plain.places] == [p.tolist() for p in tuned.places]
    assert sum(tuned.errors) < sum(plain.errors)


def test_a_budget_computes_nothing_twice() -> None:
    """The same patches behind a block come again from tolerance to tolerance; each is scored and tried once."""
    model, seen = made(arch_of(depth=3)), list[tuple[Any, ...]]()
    scores, error = Layer.scores, Layer.error

    def places(layer: Layer) -> tuple[Any, ...]:
        return layer.index, *(tuple(tokens_n.tolist()) for tokens_n in layer.given)

    def scored(layer: Layer) -> Tensor:
        seen.append(places(layer))
        return scores(layer)

    def tried(layer: Layer, tokens_n: Tensor) -> float:
        seen.append((*places(layer), "gives", tuple(tokens_n.tolist())))
        return error(layer, tokens_n)

    slimming, limit = PatchSearch(model, images_for(model), step=2), 0.6 * count(model.arch).macs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layer, "scores", scored)
        patch.setattr(Layer, "error", tried)
        found = slimming.within(Budget.parse(f"macs<={limit}"), "patch_slimming")
    assert Counter(seen).most_common(1)[0][1] == 1
    alone = PatchSearch(model, images_for(model), step=2).search(found.tolerance)
    assert alone.tried == found.tried
    assert [p.tolist() for p in alone.places] == [p.tolist() for p in found.places]


POOLED = {"class_token": False, "global_pool": "avg"}


@pytest.mark.parametrize(
    "fields",
    [
        POOLED,
        {"global_pool": "avg", "fc_norm": True, "reg_tokens": 2},
        {"distill_token": True, "position": "rotary_2d", "layer_scale": True},
        {"patch_head": True},
        {"global_pool": "map", "pool_num_heads": 2, "pool_mlp_hidden": 8, "qk_norm": True},
        {
            "image_size": (20, 16),
            "stages": (Stage(embed_dim=16, blocks=(BLOCK,)), Stage(embed_dim=16, blocks=(BLOCK,) * 4)),
        },
    ],
    ids=str,
)
def test_other_networks(fields: dict[str, Any]) -> None:
    model = made(arch_of(**{"depth": 3, **fields}))
    images = images_for(model)
    same = slim_patches(model, images, tolerance=0.0, step=7).model
    torch.testing.assert_close(same(images[0]), model(images[0]), rtol=1e-5, atol=1e-5)
    found = slim_patches(model, images, tolerance=0.1, step=3)
    assert all(error <= 0.1 for error in found.errors)
    assert count(found.model.arch).macs < count(same.arch).macs
    counts = kept(found.model)
    assert (counts[-1] > 0) == (model.patch_head is not None or model.global_pool != "token")
    dynamic = slim_patches(model, images, tolerance=0.1, step=3, dynamic=QUICK).model
    assert kept(dynamic) == counts
    assert bool(dynamic(images[0]).isfinite().all())


def test_a_network_of_timm() -> None:
    network = timm.create_model("test_vit", num_classes=3).eval()
    images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    found = slim_patches(network, [images], tolerance=0.0, step=100)
    torch.testing.assert_close(found.model(images), network(images), rtol=1e-4, atol=1e-4)
    assert found.model.arch.blocks[-1].keep == 0


def test_predicted_scores_follow_each_images_own() -> None:
    """Images differ in what matters, so a prediction finds it and fixed places cannot."""
    model = made(arch_of(depth=3, position="none"))
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(16, 3, 10, 8, generator=generator) for _ in range(5)]
    mark = 2 * torch.randn(3, 2, 2, generator=generator)
    for batch in images:
        for image in batch:
            for place in torch.randperm(20, generator=generator)[:5].tolist():
                row, column = 2 * (place // 4), 2 * (place % 4)
                image[:, row : row + 2, column : column + 2] += mark
    slimming = PatchSearch(model, images[:4], step=3)
    found = slimming.predicting(slimming.search(0.08), Prediction(steps=200))
    keep = len(found.places[0])
    assert 5 <= keep <= 12
    blocks, held = Blocks(model), images[4]
    given = [torch.cat([torch.zeros(1).long(), places + 1]) for places in found.places[1:]]
    own = patch_scores(blocks, 0, model.embed(held), given)[:, 1:].topk(keep).indices
    predicted = found.model(held, want=("keep",))["keep"][:, 0]
    fixed = torch.zeros(20).index_fill(0, found.places[0], 1.0).expand(16, -1)
    hits, without = (float(which.gather(1, own).mean()) for which in (predicted, fixed))
    assert hits > 0.7
    assert hits > without + 0.15


def test_the_ordinary_loop_trains_the_whole_network_afterwards() -> None:
    """With the whole network as its teacher, which it comes nearer to; the places stay."""
    model = made(arch_of(depth=3))
    loader = [(images, torch.zeros(4).long()) for images in images_for(model)]
    slimmed = slim_patches(model, loader, tolerance=0.2, step=4)

    @torch.no_grad()
    def off(network: Any) -> float:
        return sum(float(functional.mse_loss(network(x), model(x))) for x, _ in loader)

    before, config = off(slimmed.model), TrainConfig(epochs=40, lr=1e-3, warmup_epochs=0, monitor_every=0)
    task = Classification(distill_weight=1.0)
    fitted = fit(slimmed.model, task, Fixed(), loader, config=config, teacher=Teacher(model)).network.eval()
    assert off(fitted) < 0.7 * before
    kept_now, selecting = (
        fitted(loader[0][0], want=("keep",))["keep"],
        sorted(map(int, slimmed.model.selections)),
    )
    for number, index in enumerate(selecting):
        want = torch.zeros(20).index_fill(0, slimmed.places[index], 1.0)
        torch.testing.assert_close(kept_now[:, number], want.expand(4, -1))


@pytest.mark.gpu
def test_on_a_gpu_the_same_places_are_found() -> None:
    model = made(arch_of(depth=3))
    images = images_for(model)
    here = slim_patches(model, images, budget="macs<=60%", step=2, tuning=BlockTuning(), dynamic=QUICK)
    there = slim_patches(
        model.cuda(), images, budget="macs<=60%", step=2, tuning=BlockTuning(), dynamic=QUICK
    )
    assert [p.tolist() for p in there.places] == [p.tolist() for p in here.places]
    assert next(there.model.parameters()).is_cuda
    assert bool(there.model(images[0].cuda()).isfinite().all())


def test_what_cannot_be_is_refused() -> None:
    model = made(arch_of())
    images = images_for(model)
    slimmed = slim_patches(model, images, tolerance=0.1)
    for network, options, message in (
        (model, {}, "one of them says how far patches are slimmed"),
        (model, {"tolerance": 0.1, "budget": "macs<=50%"}, "one of them says how far"),
        (model, {"tolerance": -1.0}, "tolerance is -1.0; an error is at least 0"),
        (model, {"tolerance": 0.1, "step": 0}, "step is 0"),
        (model, {"tolerance": 0.1, "error": "mes"}, "error is 'mes'; it must be one of relative, mse, sum"),
        (model, {"budget": "macs<=1K"}, "with the fewest patches the network still misses the budget"),
        (slimmed.model, {"tolerance": 0.1}, "keeps fewer patches already, chosen by 'patch_slimming'"),
        (made(arch_of(relative_position=2)), {"tolerance": 0.1}, "distances change it"),
        (
            made(arch_of(stages=(Stage(embed_dim=16, blocks=(BLOCK, replace(BLOCK, mixer="performer"))),))),
            {"tolerance": 0.1},
            "block 1 mixes by 'performer'",
        ),
    ):
        assert message in refusal(lambda n=network, o=options: slim_patches(n, images, **o))
    assert "there are no images" in refusal(lambda: slim_patches(model, [], tolerance=0.1))
    assert "tuning.lr is 0" in refusal(lambda: BlockTuning(lr=0))
    outside = [torch.tensor([1, 2]), torch.tensor([2, 3]), None, None]
    assert "block 1 gives patches that the block before does not" in refusal(
        lambda: with_places(model, outside)
    )


def trained_on_digits(seed: int, depth: int, epochs: int) -> tuple[Model, Tensor, Tensor]:
    """A small network, images to score by, and images that it has not seen."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 6 - 1
    targets, generator = torch.tensor(bunch.target), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    images, targets = images[order], targets[order]
    blocks = (Block(num_heads=2, head_dim=12, mlp_hidden=48),) * depth
    arch = Arch(
        image_size=8, patch_size=2, in_chans=1, num_classes=10, stages=(Stage(embed_dim=24, blocks=blocks),)
    )
    model, steps = build(arch, generator=generator), 10 * epochs
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    for _ in range(steps):
        batch = torch.randint(1400, (64,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[batch]), targets[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval(), images[:256], images[1400:]


@torch.no_grad()
def losses(model: Model, seen: Tensor, unseen: Tensor, index: int, keep: int) -> dict[str, float]:
    """Divergence from the whole network where patches leave at one block, chosen in three ways."""
    blocks = Blocks(model)
    into = Streams(blocks, [seen], 1e9).into(index)
    given = [*([blocks.all_tokens] * (blocks.depth - 2 - index)), blocks.before_patches]
    looked_at = blocks.attention(index, into[0], blocks.all_tokens, blocks.all_tokens).square().sum((0, 1, 2))
    generator = torch.Generator().manual_seed(0)
    chosen: dict[str, Sequence[Tensor]] = {
        "score": [mean_scores(blocks, index, into, given)[1:].topk(keep).indices],
        "attention": [looked_at[1:].topk(keep).indices],
        "random": [torch.randperm(16, generator=generator)[:keep] for _ in range(10)],
    }
    whole = model(unseen).log_softmax(-1)

    def loss(places: Tensor) -> float:
        left = places.sort().values
        last = [*([left] * (blocks.depth - 1 - index)), left[:0]]
        answers = with_places(model, [*([None] * index), *last])(unseen).log_softmax(-1)
        return float(functional.kl_div(answers, whole, log_target=True, reduction="batchmean"))

    return {name: sum(map(loss, draws)) / len(draws) for name, draws in chosen.items()}


def test_pruning_one_layer_by_the_score_loses_less_than_by_attention_or_at_random() -> None:
    """Figure 7 of the paper, in small: one block of a trained network gives fewer patches, and nothing is tuned."""
    model, seen, unseen = trained_on_digits(seed=2, depth=3, epochs=16)
    for index, keep in ((0, 8), (0, 4), (1, 8), (1, 4)):
        found = losses(model, seen, unseen, index, keep)
        assert found["score"] < 0.8 * min(found["attention"], found["random"]), (index, keep, found)


@pytest.mark.slow
def test_so_it_does_in_the_second_half_of_deeper_networks_in_every_training() -> None:
    """In the first half attention is as good (LOG.md)."""
    for seed in range(4):
        trained = trained_on_digits(seed, depth=4, epochs=30)
        for keep in (4, 8):
            found = losses(*trained, 2, keep)
            assert found["score"] < min(found["attention"], found["random"]), (seed, keep, found)
