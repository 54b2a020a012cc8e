"""Slimming without training: orders, compensation, sensitivity and allocation, on tiny networks of timm."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.extraction import extract
from vitnas.model import build
from vitnas.model.timm_keys import from_timm
from vitnas.slimming import (
    IMPORTANCE,
    PredictedDamage,
    agreement,
    allocate,
    fold,
    ordered,
    sensitivity,
    standings,
)
from vitnas.space import around
from vitnas.testing.random import randomize_
from vitnas.train import evaluate

TINY: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 5,
}
NETWORKS: dict[str, Any] = {
    "plain": partial(VisionTransformer),
    "registers": partial(
        VisionTransformer, reg_tokens=2, init_values=0.1, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU
    ),
    "pooled": partial(VisionTransformer, class_token=False, global_pool="map", qk_norm=True),
    "swiglu": partial(
        VisionTransformer, mlp_layer=SwiGLU, act_layer=nn.SiLU, scale_mlp_norm=True, pre_norm=True
    ),
    "distilled": VisionTransformerDistilled,
    "eva": partial(
        Eva, swiglu_mlp=True, scale_mlp=True, qkv_fused=True, use_rot_pos_emb=True, global_pool="avg"
    ),
    "beit": partial(Beit, use_rel_pos_bias=True, init_values=0.1, global_pool="avg"),
    "relative": partial(VisionTransformerRelPos, class_token=True, global_pool="avg"),
}


def network(kind: str = "plain") -> nn.Module:
    made: nn.Module = NETWORKS[kind](**{**TINY, **NETWORKS_OWN.get(kind, {})})
    randomize_(made, torch.Generator().manual_seed(0))
    return made.eval()


NETWORKS_OWN: dict[str, Any] = {"registers": {"num_classes": 0}}


def images(n: int = 48, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).split(16))


def scored(model: nn.Module, word: str = "activation") -> Any:
    return IMPORTANCE[word](from_timm(model), images(), torch.Generator().manual_seed(0))


def everything(model: nn.Module, **options: Any) -> Any:
    """A space in which everything may go."""
    return around(model, **{"heads": (0.5, 1.0), "hidden": (0.5, 1.0), "embed_dim": (0.5, 1.0), **options})


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_ordered_network_is_the_network_with_the_best_units_first(kind: str) -> None:
    given = network(kind)
    space, scores = everything(given), scored(given)
    supernet = ordered(given, space, scores)
    whole = extract(supernet, space.largest())
    pixels = images()[0]
    theirs, ours = given(pixels), whole(pixels)
    if whole.num_classes == 0:  # features, in the channels' order
        ours = ours[:, scores.width[0].argsort(descending=True).argsort()]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    again = IMPORTANCE["activation"](whole, images(), torch.Generator())
    for found in (*again.heads, *again.hidden, *again.width):
        torch.testing.assert_close(found, found.sort(descending=True).values, rtol=1e-4, atol=1e-6)


def test_of_one_width_features_stay_where_they_were() -> None:
    given = network("registers")
    space = everything(given, embed_dim=(1.0,))
    whole = extract(ordered(given, space, scored(given)), space.largest())
    torch.testing.assert_close(whole(images()[0]), given(images()[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("word", IMPORTANCE)
@pytest.mark.parametrize("kind", ["plain", "registers"])
def test_every_importance_scores_every_unit(kind: str, word: str) -> None:
    given = network(kind)
    scores, arch = scored(given, word), from_timm(given).arch
    assert [len(found) for found in scores.heads] == [block.num_heads for block in arch.blocks]
    assert [len(found) for found in scores.hidden] == [block.mlp_hidden for block in arch.blocks]
    assert [len(found) for found in scores.width] == [arch.embed_dim]
    assert len(scores.blocks) == arch.depth
    for found in (*scores.heads, *scores.hidden, *scores.width, scores.blocks):
        assert bool((found > 0).all())
        assert len(found.unique()) > 1
    assert all(parameter.requires_grad and parameter.grad is None for parameter in given.parameters())


def test_taylor_sees_what_no_label_asks_for() -> None:
    """Labels decide: a unit that only moves the logit of a class that never is looked for is worth less."""
    given = network()
    model = from_timm(given)
    batches = [(x, torch.zeros(len(x), dtype=torch.long)) for x in images()]
    labelled = IMPORTANCE["taylor"](model, batches, torch.Generator().manual_seed(0))
    drawn = IMPORTANCE["taylor"](model, images(), torch.Generator().manual_seed(0))
    assert not torch.equal(labelled.hidden[0].argsort(), drawn.hidden[0].argsort())


def doubled() -> nn.Module:
    """Every hidden unit and every head twice, the second half behind the first."""
    made = network()
    with torch.no_grad():
        for block in made.blocks:  # type: ignore[union-attr]
            fc1 = block.mlp.fc1
            half = fc1.out_features // 2
            fc1.weight[half:], fc1.bias[half:] = fc1.weight[:half], fc1.bias[:half]
            rows = block.attn.qkv.weight.view(3, 2, 16, 32), block.attn.qkv.bias.view(3, 2, 16)
            for tensor in rows:
                tensor[:, 1] = tensor[:, 0]
    return made


def front_first(model: nn.Module) -> Any:
    scores = scored(model)
    falling = [torch.arange(len(x), 0, -1, dtype=torch.float64) for x in (*scores.heads, *scores.hidden)]
    depth = len(scores.blocks)
    return replace(scores, heads=tuple(falling[:depth]), hidden=tuple(falling[depth:]))


def halved(space: Any) -> Arch:
    return space.largest().with_blocks(
        replace(block, num_heads=block.num_heads // 2, mlp_hidden=block.mlp_hidden // 2)
        for block in space.largest().blocks
    )


def test_what_the_others_can_say_is_made_up_for() -> None:
    """Copies of units and heads go without a trace; with constants alone, or nothing, they leave one."""
    given = doubled()
    space = everything(given)
    supernet = ordered(given, space, front_first(given))
    held = images(16, seed=2)
    found = {
        how: agreement(
            fold(supernet, halved(space), images(), compensation=how),
            extract(supernet, space.largest()),
            held,
        )
        for how in ("ridge", "mean", "none")
    }
    assert found["ridge"].tokens > 0.99999
    assert found["ridge"].tokens > found["mean"].tokens + 0.01
    assert found["mean"].tokens > found["none"].tokens


@pytest.mark.parametrize("kind", ["registers", "distilled"])
def test_folding_brings_every_kind_of_network_nearer(kind: str) -> None:
    given = network(kind)
    space = everything(given)
    supernet = ordered(given, space, scored(given))
    whole = extract(supernet, space.largest())
    for arch in (halved(space), space.smallest()):
        bare, folded = (
            agreement(fold(supernet, arch, images(96), compensation=how), whole, images(32, seed=2))
            for how in ("none", "ridge")
        )
        if whole.num_classes:
            assert folded.kl < 0.8 * bare.kl, arch
        else:
            assert folded.tokens > bare.tokens + 0.01, arch
    largest = fold(supernet, space.largest(), images())
    torch.testing.assert_close(largest(images()[0]), whole(images()[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("word", IMPORTANCE)
def test_a_network_of_stages_with_a_stem_of_convolutions_and_single_heads(word: str) -> None:
    """As a run makes them: a reduction reads the stream of the stage before it, one head is a head, and what follows
    the stem's convolutions reads their channels, not the image's."""
    block = Block(num_heads=1, head_dim=8, mlp_hidden=32)
    arch = Arch(
        image_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=5,
        stem="conv",
        stem_width=12,
        reduction="residual",
        stages=(
            Stage(embed_dim=16, blocks=(block,)),
            Stage(embed_dim=32, blocks=(replace(block, num_heads=2, mlp_hidden=64),) * 2),
        ),
    )
    given = build(arch)
    randomize_(given, torch.Generator().manual_seed(0))
    pixels = [each[:, :1] for each in images()]
    space = everything(given.eval(), embed_dim=(0.75, 1.0))
    scores = IMPORTANCE[word](given, pixels, torch.Generator().manual_seed(0))
    supernet = ordered(given, space, scores)
    whole = extract(supernet, space.largest())
    torch.testing.assert_close(whole(pixels[0]), given(pixels[0]), rtol=1e-4, atol=1e-4)
    bare, folded = (
        agreement(fold(supernet, space.smallest(), pixels, compensation=how), whole, pixels)
        for how in ("none", "ridge")
    )
    assert folded.kl < bare.kl


def test_folding_is_safe_with_fewer_tokens_than_units() -> None:
    """Two images are 10 tokens, for 64 units; and units that never speak divide nothing by 0."""
    given = network()
    with torch.no_grad():
        given.blocks[1].mlp.fc1.weight.zero_()  # type: ignore[index,union-attr]
        given.blocks[1].mlp.fc1.bias.fill_(-100)  # type: ignore[index,union-attr]
    space = everything(given)
    supernet = ordered(given, space, scored(given))
    whole = extract(supernet, space.largest())
    few = [images(16)[0][:2]]
    folded = fold(supernet, halved(space), few)
    held = images(32, seed=2)
    assert all(bool(tensor.isfinite().all()) for tensor in folded.state_dict().values())
    bare = extract(supernet, halved(space))
    assert agreement(folded, whole, held).tokens > agreement(bare, whole, held).tokens


def test_activations_that_are_not_finite_are_refused() -> None:
    given = network()
    space = everything(given)
    supernet = ordered(given, space, scored(given))
    with torch.no_grad():
        supernet.get_parameter("blocks.1.mlp.fc1.bias")[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        fold(supernet, halved(space), images())


def test_a_sensitivity_says_what_each_option_costs() -> None:
    given = network()
    with torch.no_grad():  # one block that says nothing, one head
        for name in ("attn.proj", "mlp.fc2"):
            given.get_submodule(f"blocks.1.{name}").weight.zero_()
    space = around(
        given,
        heads=(1, 2, 3, 4),
        hidden=(0.25, 0.5, 0.75, 1.0),
        embed_dim=(0.5, 1.0),
        head_dim=(0.5, 1.0),
        blocks=range(3),
        multiple=4,
    )
    supernet = ordered(given, space, scored(given))
    found = sensitivity(supernet, images(128))
    assert list(found.damage) == [gene.name for gene in space.genes]
    assert (found.n_fitted, found.n) == (96, 32)
    for gene in space.genes:
        costs = found.damage[gene.name]
        assert len(costs) == len(gene.options)
        assert costs[-1] == 0
        if ".1" in gene.name:
            assert max(costs) < 1e-5
        else:
            assert costs[0] > 0.003
    assert found.damage["num_heads.0"][0] > found.damage["num_heads.0"][2]


def test_an_allocation_spends_the_budget_where_it_tells() -> None:
    given = network()
    with torch.no_grad():
        for name in ("attn.proj", "mlp.fc2"):
            given.get_submodule(f"blocks.1.{name}").weight.zero_()
    space = around(given, heads=(1, 2, 3, 4), hidden=(0.25, 0.5, 0.75, 1.0), blocks=range(3))
    supernet = ordered(given, space, scored(given))
    damage = PredictedDamage(space, sensitivity(supernet, images(64)))
    whole = int(space.cost_table().costs([space.encode(space.largest())])["macs"][0])
    trials = allocate(damage, f"macs<={int(0.8 * whole)}", num_trials=40)
    best = trials[0]
    assert best.cost.macs <= 0.8 * whole
    # Leaving the silent block out, or its units, pays for all that must go.
    assert best.values["damage"] < 0.05
    assert [trial.values["damage"] for trial in trials] == sorted(trial.values["damage"] for trial in trials)


def test_agreement_counts_classes_and_lifts_narrower_features() -> None:
    given = network()
    same = agreement(given, given, images())
    assert (same.top1, same.lifted, same.n) == (1.0, False, 48)
    assert (same.tokens, same.pooled, same.kl) == pytest.approx((1, 1, 0), abs=1e-6)
    space = everything(given)
    narrow = extract(ordered(given, space, scored(given)), space.smallest())
    found = agreement(narrow, given, images())
    assert found.lifted
    assert found.top1 is not None
    assert found.top1 < 1
    with pytest.raises(UserError, match="5 and 0 classes"):
        agreement(given, network("registers"), images())


def test_several_networks_are_held_against_one_look_of_the_original() -> None:
    """Each as by itself; the original looks at every batch once for all of them, and at the first for their widths."""
    given = network()
    space = everything(given)
    supernet = ordered(given, space, scored(given))
    models = [given, fold(supernet, halved(space), images()), extract(supernet, space.smallest())]
    alone = [agreement(model, given, images()) for model in models]
    looks: list[int] = []
    handle = given.patch_embed.register_forward_hook(lambda *_: looks.append(1))
    labelled = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in images()]
    found = standings(models, given, labelled, labels=True)
    handle.remove()
    assert [each.agreement for each in found] == alone
    for model, each in zip(models, found, strict=True):
        assert each.accuracy == evaluate(model, labelled).accuracy
    narrow = sum(each.lifted for each in alone)
    assert len(looks) <= len(labelled) * (1 + bool(narrow))
    with pytest.raises(UserError, match="accuracy needs labels"):
        standings(models, given, images(), labels=True)


def test_images_must_last_for_several_passes() -> None:
    given = from_timm(network())
    with pytest.raises(UserError, match="several passes"):
        IMPORTANCE["activation"](given, iter(images()), torch.Generator())
    with pytest.raises(UserError, match="no images"):
        IMPORTANCE["activation"](given, [], torch.Generator())


def test_a_space_around_another_network_is_refused() -> None:
    given = network()
    with pytest.raises(UserError, match="stands around"):
        ordered(given, everything(network("swiglu")), scored(given))


def test_tokens_in_a_file_give_the_same_network() -> None:
    given = network("registers")
    space = everything(given)
    supernet = ordered(given, space, scored(given))
    kept, filed = (fold(supernet, halved(space), images(), ram_bytes=size) for size in (1 << 20, 0))
    for name, tensor in kept.state_dict().items():
        torch.testing.assert_close(filed.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "word"), [("plain", "magnitude"), ("registers", "activation"), ("beit", "activation")]
)
def test_heads_are_told_in_a_basis_whose_first_entries_say_most(kind: str, word: str) -> None:
    given = network(kind)
    space = around(given, heads=(1.0,), hidden=(1.0,), head_dim=(0.5, 1.0), blocks=(), multiple=2)
    scores = scored(given, word)
    supernet = ordered(given, space, scores)
    whole, narrow = extract(supernet, space.largest()), space.smallest()
    assert {block.head_dim for block in narrow.blocks} == {4}
    torch.testing.assert_close(whole(images()[0]), given(images()[0]), rtol=1e-3, atol=1e-3)
    plain = ordered(given, space, replace(scores, bases=(None,) * 3))
    turned, as_it_was = (
        agreement(fold(each, narrow, images(96), compensation="none"), given, images(32, seed=2)).tokens
        for each in (supernet, plain)
    )
    assert turned > as_it_was + 0.005
    folded = agreement(fold(supernet, narrow, images(96)), given, images(32, seed=2))
    assert folded.tokens > turned


def test_heads_that_need_all_their_entries_are_not_narrowed() -> None:
    with pytest.raises(UserError, match="no block has heads that can be narrower"):
        around(network("pooled"), head_dim=(0.5, 1.0), multiple=2)
    assert scored(network("pooled")).bases == (None, None, None)
