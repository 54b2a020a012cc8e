"""The hand-scaled baseline is a DeiT whatever Space the winner comes from."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.model import build
from vitnas.model.published import PUBLISHED
from vitnas.space import autoformer, mixer_space, unified, vit_resnas, vitas
from vitnas.stages.hand_scaled import hand_scaled, num_heads, patch_sizes, plain_vit, three_shapes

DIGITS = {"image_size": 8, "in_chans": 1, "num_classes": 10}
SPACES = {
    "autoformer": autoformer("micro", patch_size=2, **DIGITS),
    "mixers": mixer_space("micro", patch_size=2, **DIGITS),
    "unified": unified("micro", **DIGITS),
    "vitas": vitas("micro", **DIGITS),
    "vit_resnas": vit_resnas("micro", patch_size=2, patch_head=True, **DIGITS),
}
OWN = {"stages", "patch_size", "patch_head", "distill_token", *DIGITS}  # not DeiT's to say


@pytest.mark.parametrize("name", SPACES)
def test_only_data_and_training_come_from_the_winner(name: str) -> None:
    space, deit = SPACES[name], plain_vit(PUBLISHED["vitas_a"], 192, 12)
    for seed in range(4):
        like = space.sample(random.Random(seed))
        arch = hand_scaled(like, Budget.parse("macs<=1M"))
        assert {f: getattr(arch, f) for f in OWN - {"stages"}} == {
            f: getattr(like, f) for f in OWN - {"stages"}
        }
        for field in set(Arch.__dataclass_fields__) - OWN:
            assert getattr(arch, field) == getattr(deit, field), field
        (stage,) = arch.stages
        (block,) = set(stage.blocks)
        assert block.num_heads * block.head_dim == stage.embed_dim
        assert (block.mlp_hidden, block.mixer, block.slot) == (4 * stage.embed_dim, "softmax", None)
        assert 0.9e6 < count(arch).macs <= 1e6


def test_the_winner_s_head_width_says_nothing() -> None:
    """ViTAS's heads are 3 to 160 wide; the budget alone decides how a DeiT looks."""
    space, budget = vitas("1g"), Budget.parse("0.9G<=macs<=1G")
    archs = [replace(space.sample(random.Random(seed)), patch_size=16) for seed in range(5)]
    found = {hand_scaled(arch, budget) for arch in archs}
    assert len(found) == 1
    (arch,) = found
    assert (arch.embed_dim, arch.depth, arch.blocks[0].num_heads) == (168, 12, 3)


def test_deit_itself_comes_out_at_its_own_cost() -> None:
    """DeiT-Ti: 5,717,416 parameters; S: 22,050,664 (the facts file of ViTAS rounds both)."""
    for width, depth, heads, params in ((192, 12, 3, 5_717_416), (384, 12, 6, 22_050_664)):
        arch = plain_vit(PUBLISHED["vitas_a"], width, depth)
        assert (arch.blocks[0].num_heads, arch.blocks[0].head_dim) == (heads, 64)
        assert sum(p.numel() for p in build(arch, device="meta").parameters()) == params
    tiny = plain_vit(PUBLISHED["vitas_a"], 192, 12)
    assert hand_scaled(PUBLISHED["vitas_a"], Budget.parse(f"macs<={count(tiny).macs}")) == tiny


def test_heads_are_at_most_64_wide_and_at_least_two() -> None:
    for width in range(8, 1025):
        if (heads := num_heads(width)) is not None:
            assert heads >= (2 if width < 48 else 3)
            assert width % heads == 0
            assert width / heads <= 64
            assert width < 192 or width / heads >= 48
            assert width < 32 or width / heads >= 8
    with pytest.raises(UserError, match="width is 390; it must divide into heads of an even width"):
        plain_vit(PUBLISHED["vitas_a"], 390, 12)


def test_of_several_patch_sizes_the_winner_s() -> None:
    """It has as many tokens as what it is compared with."""
    space = vitas("1g")
    for patch_size in space.patch_sizes:
        like = replace(space.smallest(), patch_size=patch_size)
        assert hand_scaled(like, Budget.parse("macs<=1G")).patch_size == patch_size


def test_a_budget_without_a_plain_vit_is_refused() -> None:
    with pytest.raises(UserError, match="no plain ViT meets the budget 'macs<=1K'"):
        hand_scaled(SPACES["vitas"].smallest(), Budget.parse("macs<=1K"))


def test_three_shapes_are_tried_within_the_same_limits() -> None:
    like = SPACES["autoformer"].middle()
    archs = three_shapes(like, Budget.parse("macs<=4M"))
    ratios = [arch.embed_dim / arch.depth for arch in archs]
    assert archs[0] == hand_scaled(like, Budget.parse("macs<=4M"))
    assert len(archs) == 3
    assert min(ratios) < 11 < ratios[0] < 23 < max(ratios)
    assert all(3.6e6 < count(arch).macs <= 4e6 for arch in archs)


def test_a_latency_limit_holds_the_baseline_too() -> None:
    """By a clock on which width costs nothing and every block a millisecond."""
    like, asked = SPACES["autoformer"].middle(), list[Arch]()

    def clock(arch: Arch) -> float:
        asked.append(arch)
        return float(arch.depth)

    budget = Budget.parse("macs<=4M and latency<=4.5ms@torch")
    archs = three_shapes(like, budget, {"torch": clock})
    assert all(arch.depth <= 4 for arch in archs)
    assert all(count(arch).macs <= 4e6 for arch in archs)
    assert len(asked) == len(set(asked)) < 40
    alone = hand_scaled(like, Budget.parse("latency<=4.5ms@torch"), {"torch": clock})
    assert alone.depth <= 4
    assert any(arch.depth > 4 for arch in three_shapes(like, budget)), "without a clock nothing is timed"
    with pytest.raises(UserError, match="no plain ViT meets the budget"):
        hand_scaled(like, Budget.parse("latency<=0.5ms@torch"), {"torch": clock})


def test_a_latency_limit_is_used_up_whatever_the_winner_s_macs() -> None:
    """A plain ViT that takes as long as the winner may do many times its multiplications."""
    like = SPACES["autoformer"].middle()
    many = 40 * count(like).macs

    def clock(arch: Arch) -> float:
        return count(arch).macs / many

    budget = Budget.parse("latency<=1ms@torch")
    for arch in three_shapes(like, budget, {"torch": clock}):
        assert 0.9 * many < count(arch).macs <= many
    assert hand_scaled(like, budget, {"torch": lambda arch: 0.5}).depth == 24, "where none is too slow, too"


@pytest.mark.parametrize("macs", ["450K", "0.6M", "1M", "1.2M", "3M"])
def test_the_three_shapes_are_three(macs: str) -> None:
    """Also where the best use of the budget is the first of two of them; a far-fetched one stands for none."""
    budget = Budget.parse(f"macs<={macs}")
    archs = three_shapes(SPACES["vit_resnas"].middle(), budget)
    ratios = [arch.embed_dim / arch.depth for arch in archs]
    assert len(set(archs)) == 3
    assert ratios[1] < ratios[2]
    assert all(4 < ratio < 46 for ratio in ratios)
    assert all(count(arch).macs > 0.6 * budget.limits[0].high for arch in archs)  # type: ignore[operator]


def test_every_patch_size_of_the_space_is_tried() -> None:
    like, budget = SPACES["vitas"].smallest(), Budget.parse("macs<=4M")
    sizes = patch_sizes(SPACES["vitas"])
    assert len(sizes) > 1
    assert patch_sizes(SPACES["autoformer"]) == ()
    archs = three_shapes(like, budget, patch_sizes=sizes)
    assert {arch.patch_size for arch in archs} == set(sizes)
    assert archs[0].patch_size == like.patch_size
    assert all(count(arch).macs <= 4e6 for arch in archs)
    tight = Budget.parse(f"macs<={count(plain_vit(like, 8, 2)).macs}")
    assert {arch.patch_size for arch in three_shapes(like, tight, patch_sizes=sizes)} == {like.patch_size}, (
        "a patch size of which no ViT is small enough is left out"
    )
