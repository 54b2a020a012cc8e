"""Genes of the patches kept: the contract of every Space that has them, what they mean, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.model import PUBLISHED
from vitnas.space import Space, StageSpace, autoformer, mixer_space, vit_resnas, vitas
from vitnas.space.around import around
from vitnas.testing import SpaceContract

KEEP = (1.0, 0.7, 0.5)


class Keeping(SpaceContract):
    """A selection has weights and holds more at once, so only MACs rise with the patches."""

    quantities: ClassVar[tuple[str, ...]] = ("macs",)

    def test_some_archs_keep_fewer_and_the_largest_all(self, space: Space) -> None:
        archs = [space.decode(genes) for genes in space.random_matrix(50, np.random.default_rng(0)).tolist()]
        assert {arch.selector for arch in archs} == {None, space.selector}
        assert space.largest().selector is None

    def test_an_arch_that_keeps_another_number_is_refused(self, space: Space) -> None:
        archs = [space.decode(genes) for genes in space.random_matrix(50, np.random.default_rng(0)).tolist()]
        arch = next(arch for arch in archs if arch.selector is not None)
        last = arch.stages[-1]
        place = next(i for i, block in enumerate(last.blocks) if block.keep is not None)
        blocks = list(last.blocks)
        blocks[place] = replace(blocks[place], keep=(blocks[place].keep or 0) + 1)
        other = replace(arch, stages=(*arch.stages[:-1], replace(last, blocks=tuple(blocks))))
        assert any("keep is" in reason and "Nearest" in reason for reason in space.reasons_against(other))


class TestAutoFormer(Keeping):
    @pytest.fixture
    def space(self) -> Space:
        return autoformer("micro", image_size=32, patch_size=4, num_classes=10, keep=KEEP)


class TestAttention(Keeping):
    """What a block costs also depends on whether the next one asks what it looked at."""

    @pytest.fixture
    def space(self) -> Space:
        return autoformer(
            "micro", image_size=32, patch_size=4, num_classes=10, keep=KEEP, selector="attention"
        )


class TestMixers(Keeping):
    @pytest.fixture
    def space(self) -> Space:
        return mixer_space(
            "micro", mixers=("softmax", "performer"), keep=KEEP, keep_places=(0, 2), selector="fixed"
        )


class TestShifted(Keeping):
    """Two patch sizes: a share is another number of patches on each."""

    @pytest.fixture
    def space(self) -> Space:
        return vitas("micro", image_size=16, num_classes=10, keep=KEEP)


class TestSlotIndexed(Keeping):
    """Any block may go, so a selection can stand in front of any slot."""

    @pytest.fixture
    def space(self) -> Space:
        return vitas("micro", image_size=16, num_classes=10, shifted=False, num_slots=8, keep=KEEP)


class TestStages(Keeping):
    @pytest.fixture
    def space(self) -> Space:
        return vit_resnas(
            "micro", image_size=64, patch_size=4, num_classes=10, keep=KEEP, selector="attention"
        )


class TestAround(Keeping):
    @pytest.fixture
    def space(self) -> Space:
        return around(PUBLISHED["vitas_c"], keep=KEEP, selector="attention")


class TestCountable(Keeping):
    """Small enough to list: blocks of the last stage may be left out, and with them a selection moves or goes."""

    @pytest.fixture
    def space(self) -> Space:
        stage: dict[str, Any] = {"embed_dims": (8,), "num_heads": (1,), "head_dim": 4}
        stages = (
            StageSpace(depth=1, mlp_hidden=(8,), **stage),
            StageSpace(depth=4, mlp_hidden=(8, 16), skip=((1, 0.5), (2, 0.5), (3, 0.5)), **stage),
        )
        return vit_resnas(
            "micro",
            image_size=16,
            patch_size=2,
            num_classes=3,
            stages=stages,
            reduction="conv",
            stem="linear",
            stem_width=0,
            keep=(1.0, 0.7, 0.3),
            keep_places=(1, 3),
            selector="attention",
        )


def keeps(arch: Arch) -> list[int | None]:
    return [block.keep for block in arch.blocks]


def genes_of(space: Space, **options: int) -> list[int]:
    """Genes of the largest Arch, with these options of the genes named (`keep_ratio_2` for `keep_ratio.2`)."""
    genes = [n - 1 for n in space.num_options]
    names = [gene.name for gene in space.genes]
    for name, option in options.items():
        genes[names.index(".".join([name.rpartition("_")[0], name.rpartition("_")[2]]))] = option
    return genes


def test_places_are_the_quarters_of_the_depth() -> None:
    assert autoformer("tiny", keep=KEEP, relative_position=0).keep_places == (3, 7, 10)
    assert vit_resnas("sr_tiny_mh", keep=KEEP).keep_places == (1, 3, 4)
    assert [g.name for g in vit_resnas("sr_tiny_mh", keep=KEEP).genes[-3:]] == [
        f"keep_ratio.2.{i}" for i in (1, 3, 4)
    ]


def test_a_later_place_never_has_more() -> None:
    space = autoformer("micro", image_size=32, patch_size=4, keep=KEEP, keep_places=(1, 3, 5))
    genes = genes_of(space, keep_ratio_1=1, keep_ratio_3=2, keep_ratio_5=0)
    assert keeps(space.decode(genes)) == [None, 44, None, None, None, 32]
    assert space.encode(space.decode(genes))[-3:] == (1, 1, 0)
    assert space.decode(genes).selector == "predictor"


def test_a_share_is_rounded_down_and_exact() -> None:
    space = autoformer("micro", image_size=20, patch_size=2, keep=(0.7, 0.29), keep_places=(2,))
    assert keeps(space.smallest())[2] == 29
    assert keeps(space.largest())[2] == 70


def test_the_first_block_there_is_of_a_place_keeps() -> None:
    space = vitas(
        "micro", image_size=16, patch_size=2, shifted=False, num_slots=4, keep=KEEP, keep_places=(1, 3)
    )
    arch = space.decode(genes_of(space, keep_1=0, keep_ratio_1=0))
    assert [(block.slot, block.keep) for block in arch.blocks] == [(0, None), (2, 32), (3, None)]
    gone = space.decode(genes_of(space, keep_1=0, keep_2=0, keep_ratio_1=0))
    assert [(block.slot, block.keep) for block in gone.blocks] == [(0, None), (3, None)]
    assert gone.selector is None
    assert space.encode(gone)[-2:] == (0, 2)


def test_each_patch_size_has_its_own_numbers() -> None:
    space = vitas("micro", image_size=16, keep=(0.5,), keep_places=(0,), identity=False, num_slots=2)
    found = {arch.patch_size: keeps(arch)[0] for arch in space.representatives()}
    assert found == {2: 32, 4: 8}


def test_fewer_patches_are_cheaper_than_the_predictor_costs() -> None:
    space = autoformer("tiny", keep=KEEP, relative_position=0)
    full, half = space.largest(), space.decode(genes_of(space, keep_ratio_3=0))
    assert 0.55 < count(half).macs / count(full).macs < 0.65
    assert count(half).params > count(full).params


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": (0.7, 1.2)}, r"keep is \(0\.7, 1\.2\); shares of the patches lie above 0 and up to 1"),
        ({"keep": (1.0,)}, r"keep is 1\.0 alone; that leaves all patches everywhere, as without it"),
        (
            {"keep": (1.0, 0.005)},
            r"of 64 patches that leaves 0, 64, and each must be another number of at least 1",
        ),
        ({"keep": (0.5, 0.505)}, r"of 64 patches that leaves 32, 32, and each must be another number"),
        (
            {"keep": KEEP, "keep_places": (6,)},
            r"keep_places are 6; they are blocks of the last stage, from 0 to 5",
        ),
        ({"keep_places": (2,)}, r"keep is empty, but keep_places is \(2,\)"),
        ({"selector": "fixed"}, r"keep is empty, but .* selector 'fixed'"),
        (
            {"keep": KEEP, "selector": "patch_slimming"},
            r"'patch_slimming', whose patches are found block by block",
        ),
        ({"keep": KEEP, "selector": "fixd"}, r"selector is 'fixd'; it must be one of .* Nearest: 'fixed'"),
        (
            {"keep": KEEP, "selector": "attention", "keep_places": (0,)},
            r"keep_places begin at 0 and every block before may be left out; .* without any attention",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        autoformer("micro", image_size=32, patch_size=4, **options)


def test_what_other_spaces_refuse() -> None:
    with pytest.raises(UserError, match=r"mixer is 'linformer' behind a selection; only "):
        mixer_space("micro", mixers=("linformer", "softmax"), keep=KEEP)
    with pytest.raises(UserError, match=r"stand behind a reduction, which needs all patches"):
        vit_resnas("micro", image_size=64, patch_size=4, keep=KEEP, keep_places=(0, 1))
    with pytest.raises(UserError, match=r"every block before may be left out; .* without any attention"):
        vitas("micro", image_size=16, shifted=False, keep=KEEP, selector="attention")
    with pytest.raises(UserError, match=r"'fixed' and there are several patch or work sizes"):
        vitas("micro", image_size=16, keep=KEEP, selector="fixed")
    with pytest.raises(UserError, match=r"keeps fewer patches already, chosen by 'predictor'"):
        around(autoformer("micro", image_size=32, patch_size=4, keep=KEEP).smallest())
