"""The space around a given network: its largest Arch is the network, and the contract of every Space holds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.model import PUBLISHED, arch_of_timm, build, from_timm
from vitnas.space import AroundConfig, AroundSpace, Space, around
from vitnas.space.around import options_of
from vitnas.supernet import Supernet
from vitnas.supernet.pretrained import start_from_timm
from vitnas.testing import SpaceContract
from vitnas.testing.random import randomize_

NAMES = (
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch16_224",
    "vit_medium_patch16_reg4_gap_256",
    "vit_so150m_patch16_reg4_gap_256",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "beitv2_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_base_patch16_224_miil",
    "vit_relpos_small_patch16_224",
)


def given(name: str) -> Arch:
    """The Arch of a timm network, without weights."""
    with torch.device("meta"):
        return arch_of_timm(timm.create_model(name))


def test_what_an_arch_cannot_say_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be written as an Arch"):
        given("vit_small_r26_s32_224")


@pytest.mark.parametrize("name", NAMES)
def test_a_supernet_with_its_weights_is_the_network_bit_for_bit(name: str) -> None:
    model = from_timm(timm.create_model(name, depth=2, num_classes=7)).eval()
    randomize_(model, torch.Generator().manual_seed(0))
    space = around(model, embed_dim=(0.5, 1.0))
    supernet = Supernet(space).eval()
    start_from_timm(supernet, model)
    images = torch.randn(1, *model.arch.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(supernet(images, space.largest()), model(images), rtol=0, atol=0)
        assert supernet(images, space.smallest()).shape == (1, 7)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_is_the_network(name: str) -> None:
    arch = given(name)
    space = around(arch, embed_dim=(0.5, 1.0))
    assert space.largest() == arch
    assert space.smallest().embed_dim * 2 == arch.embed_dim
    for other in (space.smallest(), space.middle()):
        assert other in space
        with torch.no_grad():
            build(other, device="meta")
    assert {gene.name.partition(".")[0] for gene in space.genes} >= {"embed_dim", "exists", "mlp_hidden"}


class TestDeit(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return around(given("deit_tiny_patch16_224"))


class TestNarrowing(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return around(
            given("vit_small_patch16_224"),
            heads=(1, 3),
            hidden=(0.25, 1.0),
            embed_dim=(0.5, 0.75, 1.0),
            blocks=(),
        )


class TestStages(SpaceContract):
    """Several stages, and blocks whose heads and hidden units differ."""

    @pytest.fixture
    def space(self) -> Space:
        return around(replace(PUBLISHED["vit_resnas_tiny"], num_classes=10), blocks=(0, 1, 2, 3, 4, 8))


class TestMixers(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return around(PUBLISHED["vix_vin"], multiple=4)


class TestCountable(SpaceContract):
    """Small enough to list; every block of the first stage may go, so one of them is brought back."""

    @pytest.fixture
    def space(self) -> Space:
        block = Block(num_heads=2, head_dim=4, mlp_hidden=16)
        stages = (
            Stage(embed_dim=8, blocks=(block, replace(block, num_heads=1), block)),
            Stage(embed_dim=16, blocks=(replace(block, mlp_hidden=20),)),
        )
        arch = Arch(image_size=16, patch_size=4, num_classes=3, stages=stages)
        return around(arch, hidden=(8, 20), blocks=(0, 1, 2), embed_dim=(8, 16))


def test_a_narrower_net_is_cheaper_in_every_block() -> None:
    arch = given("deit_tiny_patch16_224")
    space = around(arch, heads=(0.5, 1.0), hidden=(0.3, 1.0), blocks=range(12))
    small = space.smallest()
    assert [(b.num_heads, b.head_dim, b.mlp_hidden) for b in small.blocks] == [(2, 64, 232)]
    assert space.size() == sum(math.comb(12, n) * 4**n for n in range(1, 13))
    assert space.name == "around"


def test_all_that_is_there_is_no_further_option_in_multiples() -> None:
    assert options_of((0.3, 0.5, 1.0), 100, 8) == (32, 48, 100)
    assert options_of((1.0,), 100, 8) == (100,)
    assert options_of((8, 64, 256), 100, 8) == (8, 64, 100)


def test_a_timm_model_a_model_and_an_arch_are_one() -> None:
    timm_model = timm.create_model("deit_tiny_patch16_224", depth=2)
    arch = arch_of_timm(timm_model)
    spaces = [around(network) for network in (timm_model, build(arch, device="meta"), arch)]
    assert spaces[0] == spaces[1] == spaces[2]


def test_blocks_may_go_from_any_place() -> None:
    space = around(given("deit_tiny_patch16_224"), blocks=(0, 5, 11))
    genes = list(space.encode(space.largest()))
    for index, gene in enumerate(space.genes):
        if gene.name in ("exists.0", "exists.11"):
            genes[index] = 0
    arch = space.decode(genes)
    assert [block.slot for block in arch.blocks] == list(range(1, 11))
    assert space.slots(arch) == list(range(1, 11))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": (5,)}, r"heads has 5; .* whole numbers from 1 to the 3 that are there"),
        ({"heads": (0.1, 1.0)}, r"heads has 0\.1; of 3 that is less than 1, .* Nearest: 0\.33"),
        ({"heads": (0.95, 1.0)}, r"heads is 0\.95, 1\.0; that leaves nothing to choose in multiples of 1"),
        ({"hidden": (100,)}, r"hidden has 100; it must be a multiple of 8\. Nearest: 96"),
        (
            {"hidden": (0.5, 384)},
            r"hidden has 0\.5; options are shares .* or whole numbers from 1 to the 768",
        ),
        ({"hidden": (0.001, 1.0)}, r"hidden has 0\.001; of 768 that is less than 8, .* Nearest: 0\.01"),
        ({"blocks": (3, 12)}, r"blocks are 3, 12; the network has blocks 0 to 11"),
        ({"heads": (1.0,), "hidden": (1.0,), "blocks": ()}, r"nothing may vary"),
        ({"multiple": 0}, r"multiple is 0; it must be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        around(given("deit_tiny_patch16_224"), **options)


def test_a_stage_cannot_end_up_narrower_than_the_one_before() -> None:
    with pytest.raises(UserError, match=r"residual reduction cannot make them narrower"):
        around(PUBLISHED["vit_resnas_tiny"], embed_dim=(0.25, 1.0))


def test_a_network_that_is_no_arch_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"cannot be written as an Arch"):
        around(timm.create_model("resnet18"))


def test_by_name_for_other_images() -> None:
    config = AroundConfig(network="deit_tiny_patch16_224", size="quarter", heads=(1, 3))
    space = config.build(image_size=64, in_chans=1, num_classes=7)
    arch = space.largest()
    assert isinstance(space, AroundSpace)
    assert (arch.image_size, arch.in_chans, arch.num_classes, arch.embed_dim) == (64, 1, 7, 192)
    assert space.smallest().blocks[0].mlp_hidden == 192
    assert space.name == "around_deit_tiny_patch16_224"
    with pytest.raises(UserError, match=r"network is 'deit'; it must be a folder .* NAME@FILE"):
        AroundConfig(network="deit").build()
    with pytest.raises(UserError, match=r"network 'resnet18' cannot be made .* Use deit_tiny_patch16_224"):
        AroundConfig(network="resnet18").build()


def test_without_a_network_there_is_nothing_to_stand_around() -> None:
    assert AroundConfig(network="test_vit").starting_from("test_vit2").network == "test_vit"
    assert AroundConfig().starting_from("test_vit2").network == "test_vit2"
    message = r"no network is named; .* Set pretrained=NAME .*, or space\.network=NAME"
    with pytest.raises(UserError, match=message):
        AroundConfig().starting_from(None)
    with pytest.raises(UserError, match=message):
        AroundConfig().build()
