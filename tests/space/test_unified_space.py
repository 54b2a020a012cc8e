"""The unified Space: its contract, what is in it of other Spaces, and what it refuses."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.model.transformer_ls import transformer_ls
from vitnas.space import (
    AutoFormerConfig,
    Space,
    UnifiedConfig,
    UnifiedSpace,
    UnifiedStage,
    VitasConfig,
    ViTResNASConfig,
    autoformer,
    mixer_space,
    unified,
    vit_resnas,
    vitas,
)
from vitnas.testing import SpaceContract


class TestUnified(SpaceContract):
    quantities: ClassVar[tuple[str, ...]] = ("macs",)

    @pytest.fixture
    def space(self) -> Space:
        few: dict[str, Any] = {"mixers": ("fourier", "softmax"), "positions": ("none", "learned")}
        return unified("px32", depths=(3, 2, 2), **few)


class TestCountable(SpaceContract):
    """Small enough to list: two image sizes, one or two stages with blocks that may go from any place."""

    quantities: ClassVar[tuple[str, ...]] = ("macs",)

    @pytest.fixture
    def space(self) -> Space:
        return countable()


class TestKeeping(SpaceContract):
    quantities: ClassVar[tuple[str, ...]] = ("macs",)

    @pytest.fixture
    def space(self) -> Space:
        return unified(
            "micro", image_size=8, mixers=("performer", "softmax"), keep=(1.0, 0.5), keep_places=(1,)
        )


def countable(**options: Any) -> UnifiedSpace:
    small: dict[str, Any] = {"head_dim": 8, "mixers": ("fourier", "softmax"), "mlp_ratios": (1.0,)}
    stages = (
        UnifiedStage(depth=2, embed_dims=(16, 24), num_heads=(1, 2), **small),
        UnifiedStage(depth=1, embed_dims=(24,), num_heads=(2,), **small),
    )
    common: dict[str, Any] = {"stems": ("linear",), "patch_sizes": (4,), "positions": ("none", "learned")}
    common["stages"] = stages
    common |= {
        "reductions": ("patch", "conv"),
        "num_stages": (1, 2),
        "work_sizes": (8, 16),
        "image_size": 16,
    }
    return UnifiedSpace(**{**common, **options})


def flat(like: Space, **options: Any) -> UnifiedSpace:
    """A unified Space of one stage with the options of another."""
    given: Any = like
    stage = UnifiedStage(
        depth=given.depths[-1],
        embed_dims=given.embed_dims,
        num_heads=given.num_heads,
        mlp_ratios=given.mlp_ratios,
        mixers=getattr(given, "mixers", ("softmax",)),
        head_dim=given.head_dim,
        mixer_sizes=getattr(given, "mixer_sizes", ()),
    )
    own: dict[str, Any] = {"stems": ("linear",), "positions": ("learned",), "reductions": ("residual",)}
    own |= {"patch_sizes": (given.patch_size,), "num_stages": (1,), "stages": (stage,)}
    return UnifiedSpace(image_size=given.image_size, num_classes=given.num_classes, **{**own, **options})


def test_archs_of_other_spaces_are_in_it() -> None:
    """Where its genes can say them: the mixers' space, AutoFormer's, ViT-ResNAS's with ratios for its hidden units."""
    rng = random.Random(0)
    mixers: Any = mixer_space("micro", image_size=16, patch_size=4)
    plain = autoformer("micro", image_size=16, patch_size=4, num_classes=7)
    staged = vit_resnas(
        "micro", image_size=16, patch_size=2, num_classes=5, depths=(2, 2), embed_dims=(24, 48)
    )
    stages = tuple(
        UnifiedStage(
            depth=stage.depth,
            embed_dims=stage.embed_dims,
            num_heads=stage.num_heads,
            head_dim=stage.head_dim,
            mlp_ratios=tuple(sorted({h / d for h in stage.mlp_hidden for d in stage.embed_dims})),
            mixers=("softmax",),
        )
        for stage in staged.stages
    )
    own: dict[str, Any] = {"positions": ("learned",), "reductions": ("residual",), "class_token": True}
    pairs = (
        (mixers, flat(mixers, stems=mixers.stems, positions=mixers.positions)),
        (plain, flat(plain, relative_position=14, class_token=True)),
        (
            staged,
            UnifiedSpace(
                image_size=16, num_classes=5, stems=("conv",), patch_sizes=(2,), num_stages=(1, 2), stages=stages,
                stem_width=12, norm_eps=1e-6, global_pool="token", **own,
            ),
        ),
    )  # fmt: skip
    for other, space in pairs:
        for arch in [other.largest(), other.smallest(), *(other.sample(rng) for _ in range(20))]:
            assert space.decode(space.encode(arch)) == arch


@pytest.mark.parametrize("shifted", [True, False])
def test_archs_of_vitas_whose_heads_are_of_one_width_are_in_it(shifted: bool) -> None:
    """In ViTAS's space heads divide a width anew; here they have one, so the others are refused by it."""
    other: Any = vitas("micro", image_size=16, num_classes=7, shifted=shifted)
    stage = UnifiedStage(
        depth=other.num_slots,
        embed_dims=other.embed_dims,
        num_heads=other.num_heads,
        head_dim=16,
        mlp_ratios=tuple(sorted({h / d for h in other.mlp_hiddens for d in other.embed_dims})),
        mixers=("softmax",),
    )
    space = UnifiedSpace(
        image_size=16, num_classes=7, in_chans=other.in_chans, stems=("linear",), patch_sizes=other.patch_sizes,
        positions=("learned",), reductions=("patch",), num_stages=(1,), stages=(stage,), class_token=True,
        global_pool="token", norm_eps=1e-6, head_norm_eps=1e-5, attn_scale=other.attn_scale,
    )  # fmt: skip
    rng, found = random.Random(0), 0
    for arch in (other.sample(rng) for _ in range(300)):
        if all(block.head_dim == 16 for block in arch.blocks):
            assert space.decode(space.encode(arch)) == arch
            found += 1
        else:
            assert any("head_dim" in reason for reason in space.reasons_against(arch))
    assert found > 10


def test_transformer_ls_is_in_it() -> None:
    arch = transformer_ls(
        "l1,h3,d24,n1,s1,g1,p2,f7,a0,r8_l2,h3,d48,n2,s0,g1,p2,a0_l3,h6,d96,n1,g0,p2,a0",
        image_size=16, num_classes=10, window_bias="step",
    )  # fmt: skip
    stages = tuple(
        UnifiedStage(
            depth=3,
            embed_dims=(stage.embed_dim,),
            num_heads=(stage.blocks[0].num_heads,),
            head_dim=stage.blocks[0].head_dim,
            mlp_ratios=(2.0, 4.0),
            mixers=(stage.blocks[0].mixer,),
            mixer_sizes=(("long_short", 8),),
        )
        for stage in arch.stages
    )
    space = UnifiedSpace(
        image_size=16, stems=("linear",), patch_sizes=(2,), positions=("none",), reductions=("patch",),
        num_stages=(3,), stages=stages, class_token=True, rel_pos_bias="table", patch_norm=True, norm_eps=1e-6,
    )  # fmt: skip
    assert arch in space


def test_blocks_may_go_from_any_place() -> None:
    space = unified("px32")
    largest = space.largest()
    for stage in range(3):
        for gone in range(len(largest.stages[stage].blocks)):
            blocks = [
                replace(block, slot=slot)
                for slot, block in enumerate(largest.stages[stage].blocks)
                if slot != gone
            ]
            if gone == len(blocks):
                blocks = [replace(block, slot=None) for block in blocks]
            stages = list(largest.stages)
            stages[stage] = replace(stages[stage], blocks=tuple(blocks))
            assert replace(largest, stages=tuple(stages)) in space


def test_a_stage_has_the_same_weights_however_many_follow() -> None:
    space = unified("px32")
    one = replace(space.largest(), stages=space.largest().stages[:1], reduction="residual")
    assert one in space
    assert space.slots(one) == list(range(6))
    assert "reduction is 'patch', must be 'residual'" in " ".join(
        space.reasons_against(replace(one, reduction="patch"))
    )


@pytest.mark.slow
def test_counting_is_fast() -> None:
    space = unified("px32")
    table, genes = space.cost_table(), space.random_matrix(20_000, np.random.default_rng(0))
    table.costs(genes[:10])
    start = time.process_time()
    table.costs(genes)
    assert len(genes) / (time.process_time() - start) > 100_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"num_stages": (1,)},
            r"num_stages is \(1,\) and there are 2 stages; the most is all of them\. Use 1, 2\.",
        ),
        ({"positions": ("leaned",)}, r"positions is 'leaned'"),
        ({"positions": ()}, r"positions is \(\); it needs at least one option"),
        (
            {"reductions": ("residual",), "work_sizes": (12, 16)},
            r"work_size is 12; it must be a multiple of patch_size 4 times 2",
        ),
        ({"class_token": True}, r"which stages have a class token would go by them\. Use class_token=False"),
        (
            {"stems": ("cct",), "patch_sizes": (3,), "work_sizes": (12,), "image_size": 12},
            r"stem 'cct' halves",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        countable(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixers": ("fourier2d", "softmax")}, "mixer is 'fourier2d' behind a selection"),
        (
            {"mixers": ("performer", "softmax"), "selector": "evit"},
            "mixer 'performer' stands before it; it goes by the attention",
        ),
        (
            {"mixers": ("softmax",), "selector": "random", "scales": (0.5, 1.0)},
            "there are several patch or work sizes; the places that it keeps are those of one grid",
        ),
        (
            {"mixers": ("softmax",), "keep": (0.7, 0.75), "scales": (0.67, 1.0), "image_size": 12},
            "of 9 patches that leaves 6, 6",
        ),
    ],
    ids=str,
)
def test_a_selection_must_fit_every_mixer_and_every_grid(options: dict[str, Any], words: str) -> None:
    usual: dict[str, Any] = {"image_size": 16, "patch_sizes": (4,), "depths": (4,), "keep": (1.0, 0.5)}
    with pytest.raises(UserError, match=words):
        unified("micro", **{**usual, **options})


def test_the_size_of_a_mixer_must_fit_every_grid() -> None:
    small: dict[str, Any] = {"depth": 1, "embed_dims": (16,), "num_heads": (1,), "mlp_ratios": (1.0,)}
    stage = UnifiedStage(mixers=("linformer", "softmax"), mixer_sizes=(("linformer", 5),), **small)
    with pytest.raises(UserError, match=r"mixer_size is 5; linformer compresses 4 tokens"):
        countable(stages=(stage,), num_stages=(1,))


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ("px32", {"keep": (1.0, 0.5)}),
        ("micro", {"keep": (1.0, 0.5), "selector": "evit"}),
        ("px64", {"reductions": ("patch", "residual")}),
        ("px96", {"mixers": ("linformer", "linformer_shared", "linformer_one_head", "nystrom", "softmax")}),
    ],
    ids=str,
)
def test_what_is_left_to_a_preset_follows_what_is_asked(size: str, options: dict[str, Any]) -> None:
    """Mixers that a selection suits, sizes that reductions can halve, ranks that coarse grids have."""
    space = unified(size, image_size={"micro": 8, "px32": 32, "px64": 64, "px96": 96}[size], **options)
    rng = random.Random(0)
    for arch in (space.sample(rng) for _ in range(20)):
        assert space.decode(space.encode(arch)) == arch
    assert space.cost_table()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depths": (1, 1, 1)}, r"depths is \(1, 1, 1\); there are 2 stages\. Name 1 to 2"),
        ({"depths": ()}, r"depths is \(\); there are 2 stages\. Name 1 to 2"),
        ({"embed_dims": ()}, r"embed_dims is \(\); there are 2 stages"),
        ({"num_stages": ()}, r"num_stages is \(\); options must be positive and rise"),
        ({"num_stages": (0,)}, r"num_stages is \(0,\); options must be positive and rise"),
        ({"patch_sizes": ()}, r"patch_sizes is \(\); options must be positive and rise"),
        ({"patch_sizes": (0, 2)}, r"patch_sizes is \(0, 2\); options must be positive and rise"),
        ({"scales": (0.0, 1.0)}, r"scales is \(0\.0, 1\.0\); they are shares of the images' sides, above 0"),
        ({"scales": (-1.0,)}, r"scales is \(-1\.0,\)"),
        ({"scales": (float("nan"),)}, r"scales is \(nan,\)"),
        ({"scales": (float("inf"),)}, r"scales is \(inf,\)"),
        ({"keep": (1.0, 0.5), "depths": (2, 1)}, r"the last stage has 1 block; .* Give it more blocks"),
    ],
    ids=str,
)
def test_options_that_no_preset_takes_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        unified("micro", **options)


def test_stages_that_cannot_be_are_refused() -> None:
    small: dict[str, Any] = {"embed_dims": (16,), "num_heads": (1,), "mlp_ratios": (1.0,)}
    with pytest.raises(UserError, match=r"depth is 2 and stays \(2,\); .* counted from 0"):
        UnifiedStage(depth=2, mixers=("softmax",), stays=(2,), **small)
    with pytest.raises(UserError, match=r"mixers has 'sofmax'; .* Nearest: 'softmax'"):
        UnifiedStage(depth=2, mixers=("sofmax",), **small)


@pytest.mark.parametrize(
    ("size", "pixels"), [("micro", 8), ("px32", 32), ("px64", 64), ("px96", 96), ("px224", 224)]
)
def test_presets_fit_their_images(size: str, pixels: int) -> None:
    space = unified(size, image_size=pixels)
    rng = random.Random(0)
    archs: list[Arch] = [space.sample(rng) for _ in range(10)]
    assert {arch.num_stages for arch in archs} > {1}
    assert all(arch in space for arch in archs)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (AutoFormerConfig, {"depths": (2, 10**30)}),
        (AutoFormerConfig, {"embed_dims": (16, 10**30)}),
        (UnifiedConfig, {"depths": (10**30,)}),
        (ViTResNASConfig, {"depths": (10**6, 3)}),
        (VitasConfig, {"num_slots": 10**30}),
    ],
)
def test_numbers_that_no_network_has_are_refused_before_anything_is_made_of_them(
    config: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"at most 1,000|at most 1,000,000"):
        config(**options).build(image_size=8, in_chans=3, num_classes=2)
