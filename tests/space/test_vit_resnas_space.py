"""The ViT-ResNAS spaces: the contract, sizes as published, what may be left out, and what is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vitnas.arch import Stage
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.model.network_def import network_def, parse_network_def
from vitnas.model.published import RESNAS
from vitnas.space import Space, StageSpace, ViTResNASSpace, space_from_json, vit_resnas
from vitnas.testing import SpaceContract


class TestSrTinyMh(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return vit_resnas("sr_tiny_mh")


class TestFlatWithConsecutiveSkips(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return vit_resnas("tiny", image_size=64, num_classes=10)


class TestMicro(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return vit_resnas("micro", image_size=32, patch_size=4, num_classes=10, patch_head=True)


class TestCountable(SpaceContract):
    """Small enough to list: two stages, two blocks in a row that may be left out, plain reductions that narrow too."""

    @pytest.fixture
    def space(self) -> Space:
        stage = StageSpace(
            depth=3,
            embed_dims=(8, 12),
            num_heads=(1, 2),
            head_dim=4,
            mlp_hidden=(8,),
            skip=((1, 0.25), (2, 0.5)),
        )
        return vit_resnas(
            "micro",
            image_size=16,
            patch_size=2,
            num_classes=3,
            stages=(stage, replace(stage, depth=1, skip=())),
            reduction="conv",
            stem="linear",
            stem_width=0,
        )


@pytest.mark.parametrize(("size", "power"), [("sr_tiny_mh", 28.3), ("sr_small_mh", 32.6)])
def test_published_sizes(size: str, power: float) -> None:
    assert round(math.log10(vit_resnas(size).size()), 1) == power


@pytest.mark.parametrize(
    ("size", "macs", "params"), [("sr_tiny_mh", 3.498, 84.8), ("sr_small_mh", 6.260, 155.3)]
)
def test_published_costs_of_the_whole_supernet(size: str, macs: float, params: float) -> None:
    largest = vit_resnas(size).largest()
    assert round(count(largest).macs / 1e9, 3) == macs
    found = {round(count(replace(largest, patch_head=head)).params / 1e6, 1) for head in (False, True)}
    assert params in found


SHAPES: dict[
    str, Any
] = {  # stem width, patch, blocks per stage, numbers of blocks that may go and their chances
    "sr_tiny_mh": (24, 14, (6, 6, 6), {(1, 3, 5): 0.5}),
    "sr_small_mh": (24, 14, (7, 7, 7), {(1, 3, 5): 0.5}),
    "sr_small": (32, 14, (7, 7, 7), {(1, 3, 5): 0.5}),
    "sr_tiny": (0, 14, (7, 7, 4), {(1, 3, 5): 0.25, (): None}),
    "sr_tiny_666": (0, 14, (6, 6, 6), {(1, 3, 5): 0.5}),
    "tiny": (0, 16, (14,), {(3, 4, 7, 8, 11, 12): None}),
    "tiny_deep": (0, 16, (16,), {(3, 5, 7, 9, 11, 13): 0.25}),
    "small_deep": (0, 16, (16,), {(3, 5, 7, 9, 11, 13): 0.25}),
}


@pytest.mark.parametrize("size", SHAPES)
def test_published_shapes(size: str) -> None:
    space, (stem_width, patch, depths, skips) = vit_resnas(size), SHAPES[size]
    assert (space.stem_width, space.patch_size) == (stem_width, patch)
    assert tuple(stage.depth for stage in space.stages) == depths
    for stage in space.stages:
        blocks = tuple(block for block, _ in stage.skip)
        assert blocks in skips
        if skips[blocks] is not None:
            assert {chance for _, chance in stage.skip} == {skips[blocks]}
    assert space_from_json(json.loads(json.dumps(space.to_json()))) == space


def test_published_options() -> None:
    first, second, third = vit_resnas("sr_tiny_mh").stages
    assert first.embed_dims == (160, 176, 192, 224, 256)
    assert [n * first.head_dim for n in first.num_heads] == [96, 128, 160, 192]
    assert second.mlp_hidden == (768, 896, 1024, 1152, 1280, 1408, 1536)
    assert (third.num_heads, third.head_dim) == ((6, 8, 10, 12), 64)
    small = vit_resnas("sr_small").stages
    assert [n * small[0].head_dim for n in small[0].num_heads] == [160, 192, 224, 256]
    assert small[0].mlp_hidden == (480, 560, 640, 720, 800, 880, 960)
    assert small[1].num_heads == second.num_heads
    assert vit_resnas("tiny").stages[0].skip[:2] == ((3, 1 / 3), (4, 1 / 2))


@pytest.mark.parametrize("name", ["vit_resnas_tiny", "vit_resnas_small", "vit_resnas_medium"])
def test_published_nets_lie_in_their_spaces(name: str) -> None:
    """They do not say which blocks were left out; with a place for each they are in."""
    space = vit_resnas("sr_tiny_mh" if name.endswith("tiny") else "sr_small_mh")
    stages = []
    for options, stage in zip(space.stages, RESNAS[name].stages, strict=True):
        gone = {block for block, _ in options.skip[: options.depth - len(stage.blocks)]}
        slots = [i for i in range(options.depth) if i not in gone]
        stages.append(
            replace(
                stage,
                blocks=tuple(
                    replace(block, slot=slot if gone else None)
                    for block, slot in zip(stage.blocks, slots, strict=True)
                ),
            )
        )
    arch = replace(RESNAS[name], stages=tuple(stages))
    assert arch in space
    assert network_def(arch) == network_def(RESNAS[name])


def test_a_network_def_with_removed_blocks_lies_in_its_space() -> None:
    space = vit_resnas("sr_tiny_mh")
    told = list(network_def(space.largest()))
    told[2] = (*told[2][:3], 0)
    arch = parse_network_def(told, slots=True)
    assert [block.slot for block in arch.stages[0].blocks] == [0, 2, 3, 4, 5]
    placed = replace(
        arch,
        stages=(
            arch.stages[0],
            *(
                Stage(embed_dim=s.embed_dim, blocks=tuple(replace(b, slot=None) for b in s.blocks))
                for s in arch.stages[1:]
            ),
        ),
    )
    genes = space.encode(placed)
    assert genes[[gene.name for gene in space.genes].index("exists.0.1")] == 0
    assert space.decode(genes) == placed
    assert space.slots(placed)[:5] == [0, 2, 3, 4, 5]


def test_a_block_goes_with_the_one_before_it() -> None:
    space = vit_resnas("tiny", image_size=64)
    names = [gene.name for gene in space.genes]
    genes = list(space.encode(space.largest()))
    genes[names.index("exists.0.3")] = 0
    arch = space.decode(genes)
    assert arch.depth == 12
    assert 4 not in space.slots(arch)
    matrix = space.random_matrix(4000, np.random.default_rng(0))
    first, second = matrix[:, names.index("exists.0.3")], matrix[:, names.index("exists.0.4")]
    assert not (second > first).any()
    assert abs(first.mean() - 2 / 3) < 0.05
    assert abs(second.mean() - 1 / 3) < 0.05


def test_a_mutation_flips_existence() -> None:
    space = vit_resnas("sr_tiny_mh")
    names = [gene.name for gene in space.genes]
    child = space.mutate_genes(space.encode(space.largest()), random.Random(0), prob=0, structural_prob=1)
    assert all(child[i] == 0 for i, name in enumerate(names) if name.startswith("exists"))


def test_archs_outside_are_refused_with_every_reason() -> None:
    space = vit_resnas("tiny", image_size=64)
    arch = space.largest()
    blocks = arch.blocks

    def with_slots(*slots: int) -> Any:
        kept = tuple(replace(blocks[slot], slot=slot) for slot in slots)
        return replace(arch, stages=(replace(arch.stages[0], blocks=kept),))

    everything = range(14)
    reasons = space.reasons_against(with_slots(*(i for i in everything if i not in (0, 3))))
    assert "stage 0, block 0 is left out; only 3, 4, 7, 8, 11, 12 may be" in reasons
    assert "stage 0, block 4 exists without the one before it" in reasons
    assert space.reasons_against(with_slots(*everything)) == [
        "stage 0: slots must be left out where they say nothing"
    ]
    assert "stage 0 has a block 20; it has 14, counted from 0" in space.reasons_against(
        replace(arch, stages=(replace(arch.stages[0], blocks=(replace(blocks[0], slot=20),)),))
    )
    assert "it has 1 stages, must have 3" in vit_resnas("sr_tiny_mh").reasons_against(arch)


STAGE: dict[str, Any] = {
    "depth": 3,
    "embed_dims": (8, 16),
    "num_heads": (1, 2),
    "head_dim": 4,
    "mlp_hidden": (8, 16),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dims": (16, 8)}, r"embed_dims is \(16, 8\); options must be positive and rise"),
        ({"mlp_hidden": ()}, r"mlp_hidden is \(\); options must be positive"),
        ({"skip": ((3, 0.5),)}, r"skip names blocks \[3\]; they must rise and lie in 0 to 2"),
        ({"skip": ((1, 0.5), (1, 0.5))}, r"skip names blocks \[1, 1\]"),
        ({"skip": ((0, 0.5), (1, 0.5), (2, 0.5))}, r"one block must stay"),
        ({"skip": ((1, 1.0),)}, r"chances lie between 0 and 1"),
    ],
    ids=str,
)
def test_bad_stages_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StageSpace(**{**STAGE, **change})


def test_bad_spaces_are_refused() -> None:
    stage = StageSpace(**STAGE)
    with pytest.raises(
        UserError, match=r"a stage may be 8 wide behind one of 16; a residual reduction cannot narrow"
    ):
        ViTResNASSpace(stages=(stage, stage), image_size=56)
    with pytest.raises(UserError, match=r"image_size is 230; .* 56\. Nearest: 224 and 280"):
        vit_resnas("sr_tiny_mh", image_size=230)
    with pytest.raises(UserError, match=r"size is 'sr_tiny_hm'; vit_resnas has .* Nearest: 'sr_tiny_mh'"):
        vit_resnas("sr_tiny_hm")
    with pytest.raises(UserError, match=r"has no option 'depth'.*Nearest: 'depths'"):
        vit_resnas("micro", image_size=32, patch_size=4, depth=3)
    with pytest.raises(
        UserError, match=r"depths cannot be given with size 'sr_tiny_mh', .* Use size 'micro'"
    ):
        vit_resnas("sr_tiny_mh", depths=(3, 3, 3))
