"""network_def: the authors' tuples become an Arch and come back; what is malformed is refused with its position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.model.network_def import network_def, parse_network_def
from vitnas.model.published import PUBLISHED, RESNAS

BLOCK = (1, (24, 2, 16), (24, 64), 1)
DEF = ((4, 24), BLOCK, (1, (24, 3, 16), (24, 48), 1), (3, 24, 40), (1, (40, 2, 24), (40, 96), 1), (2, 40, 10))


@pytest.mark.parametrize("name", RESNAS)
def test_published_nets_go_there_and_back(name: str) -> None:
    arch = RESNAS[name]
    told = network_def(arch)
    assert parse_network_def(told, image_size=arch.image_size) == arch
    assert parse_network_def(f"  {told}\n", image_size=arch.image_size) == arch
    assert told[0] == (4, arch.stages[0].embed_dim)
    assert [entry[0] for entry in told].count(3) == 2


def test_entries_become_fields() -> None:
    arch = parse_network_def(DEF, image_size=112, patch_head=True)
    assert [stage.embed_dim for stage in arch.stages] == [24, 40]
    assert [(b.num_heads, b.head_dim, b.mlp_hidden) for b in arch.blocks] == [
        (2, 16, 64),
        (3, 16, 48),
        (2, 24, 96),
    ]
    assert (arch.stem, arch.stem_width, arch.patch_size, arch.num_classes) == ("conv", 24, 14, 10)
    assert arch.patch_head
    assert network_def(arch) == DEF


@pytest.mark.parametrize(("stem", "fields"), [((0, 24), ("linear", 0)), ((5, 24, 32), ("conv", 32))])
def test_other_stems(stem: tuple[int, ...], fields: tuple[str, int]) -> None:
    arch = parse_network_def([list(stem), *DEF[1:]])
    assert (arch.stem, arch.stem_width) == fields
    assert network_def(arch)[0] == stem


def test_removed_blocks_are_dropped() -> None:
    gone = (1, (24, 3, 16), (24, 48), 0)
    arch = parse_network_def((DEF[0], gone, DEF[1], *DEF[3:]))
    assert [len(stage.blocks) for stage in arch.stages] == [1, 1]
    assert network_def(arch) == (DEF[0], DEF[1], *DEF[3:])
    assert parse_network_def(network_def(arch)) == arch
    placed = parse_network_def((DEF[0], gone, DEF[1], *DEF[3:]), slots=True)
    assert [block.slot for block in placed.blocks] == [1, 0]
    assert network_def(placed) == network_def(arch)


def broken(position: int, entry: Any) -> tuple[Any, ...]:
    return (*DEF[:position], entry, *DEF[position + 1 :])


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("((4, 24), ", r"network_def cannot be read .*; it must be nested tuples of whole numbers"),
        ("__import__('os')", r"network_def cannot be read"),
        (5, r"network_def is '5'; it needs at least a stem, a block and a head"),
        (((4, 24), (2, 24, 10)), r"it needs at least a stem, a block and a head"),
        (
            broken(0, (6, 24)),
            r"network_def\[0\] is \(6, 24\); it must begin with 0, 4, 5 \(stem\), 1 \(block\)",
        ),
        (
            broken(0, BLOCK),
            r"network_def\[0\] is \(1, .*; the first is the stem: \(0, width\) or \(4, width\)",
        ),
        (broken(0, (4, 24, 24)), r"network_def\[0\] is \(4, 24, 24\); it must be \(0, width\)"),
        (broken(0, (4, 0)), r"network_def\[0\] is \(4, 0\); widths and counts must be at least 1"),
        (broken(0, (4, True)), r"network_def\[0\] is \(4, True\); it must be .* all whole numbers"),
        (
            broken(2, (1, (24, 3), (24, 48), 1)),
            r"network_def\[2\] is .*; it must be \(1, \(width, heads, head size\), \(width, hidden units\), 0 or 1\)",
        ),
        (
            broken(2, (1, (24, 3, 16), (24, 48), 2)),
            r"network_def\[2\] is .*; the last number is 1 for a block that",
        ),
        (broken(2, (1, (24, 3, 16), (24, -8), 1)), r"network_def\[2\] is .* at least 1"),
        (
            broken(2, (1, (32, 3, 16), (24, 48), 1)),
            r"network_def\[2\] has width 32; its stage is 24 wide\. Write 24",
        ),
        (broken(2, (1, (24, 3, 16), (32, 48), 1)), r"network_def\[2\] has width 32; its stage is 24 wide"),
        (broken(2, "block"), r"network_def\[2\] is block; it must begin with"),
        (
            broken(2, (2, 24, 10)),
            r"network_def\[2\] is \(2, 24, 10\); the head \(2, \.\.\.\) is last and only last",
        ),
        (broken(3, (3, 32, 40)), r"network_def\[3\] has width 32; its stage is 24 wide"),
        (
            broken(3, (3, 24, 16)),
            r"network_def\[3\] is \(3, 24, 16\); a residual reduction cannot narrow from 24",
        ),
        (broken(5, (2, 48, 10)), r"network_def\[5\] has width 48; its stage is 40 wide"),
        (DEF[:-1], r"network_def\[4\] is \(1, .*; the head \(2, \.\.\.\) is last"),
        (
            broken(4, (1, (40, 2, 24), (40, 96), 0)),
            r"network_def\[4:5\] leaves a stage without a block; each needs one",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_definitions_are_refused(definition: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_network_def(definition)


def test_an_image_that_the_reductions_do_not_divide_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"image_size is 240; .* times 2 \(1 reductions\), 28\. Nearest: 224 and 252"
    ):
        parse_network_def(DEF, image_size=240)


def test_an_arch_that_tuples_cannot_say_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"has no network_def: relative_position is 14, not 0; .*norm_eps is 1e-05"
    ):
        network_def(PUBLISHED["autoformer_tiny"])
    with pytest.raises(UserError, match=r"reduction is 'conv', not 'residual'"):
        network_def(replace(RESNAS["vit_res_tiny"], reduction="conv"))


FIGURES = {  # multiply-accumulates in G and parameters in M without and with the patch head, of the published nets
    "vit_res_tiny": (1.7944, 42.013, 42.782),
    "vit_resnas_tiny": (1.7826, 40.794, 41.499),
    "vit_resnas_small": (2.8455, 63.724, 64.605),
    "vit_resnas_medium": (4.5131, 96.443, 97.324),
    "vit_resnas_medium_280": (7.219, None, None),
    "vit_resnas_medium_336": (10.739, None, None),
    "vit_resnas_medium_392": (15.201, None, None),
}


@pytest.mark.parametrize("name", FIGURES)
def test_published_figures(name: str) -> None:
    macs, params, with_head = FIGURES[name]
    arch: Arch = RESNAS[name]
    assert round(count(arch).macs / 1e9, 4 if params else 3) == macs
    if params:
        assert round(count(arch).params / 1e6, 3) == params
        assert round(count(replace(arch, patch_head=True)).params / 1e6, 3) == with_head
        assert count(replace(arch, patch_head=True)).macs == count(arch).macs
    else:
        assert round(count(replace(arch, patch_head=True)).params / 1e6) in (97, 98)
