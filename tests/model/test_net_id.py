"""ViTAS's net_id, its published nets, and the authors' retrained checkpoints."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vitnas.arch import Arch, Block
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.model import PUBLISHED, build
from vitnas.model.net_id import CODES, arch_of_net_id, net_id_of, tenths
from vitnas.model.vitas_official import load_vitas_model
from vitnas.space import vitas
from vitnas.testing import randomize_

A = "1 2 4 3 4 4 1 3 4 3 4 4 4 4 3 3 4 0 0 3 1 6 7 9 4 3 6 8 4 9 1 8 6 4 9 2 7 6 8 9 3 0 3 8 7 0 5 7 9 8 4 4"

# name: MACs as the authors count (M), MACs with 197 tokens and one classifier (M), parameters (M), blocks
FACTS = {
    "vitas_a": (858.7, 833.5, 3.679, 7),
    "vitas_b": (990.6, 958.6, 4.400, 8),
    "vitas_c": (1303.0, 1265.1, 6.048, 12),
    "vitas_e": (2706.8, 2653.9, 12.551, 11),
    "vitas_f": (4931.0, 4898.5, 22.540, 13),
}
# (heads, width of qkv, MLP) per slot, as the facts list them
B_BLOCKS = {
    0: (16, 288, 864), 3: (16, 432, 576), 5: (16, 432, 1008), 8: (12, 1152, 864), 9: (12, 1008, 720),
    11: (12, 864, 576), 12: (16, 432, 1296), 15: (6, 864, 864),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_published_costs(name: str) -> None:
    theirs, standard, params, depth = FACTS[name]
    arch = PUBLISHED[name]
    assert round(count(arch, convention="patch_tokens").macs / 1e6, 1) == theirs
    assert round(count(arch).macs / 1e6, 1) == standard
    assert round(count(arch).params / 1e6, 3) == params
    assert arch.depth == depth


def test_blocks_keep_their_slots() -> None:
    arch = PUBLISHED["vitas_b"]
    found = {b.slot: (b.num_heads, 3 * b.num_heads * b.head_dim, b.mlp_hidden) for b in arch.blocks}
    assert found == B_BLOCKS
    assert (arch.patch_size, arch.embed_dim) == (16, 192)
    assert [block.slot for block in PUBLISHED["vitas_f"].blocks] == [None] * 13  # no gaps: its own index


def test_a_code_reads_as_it_was_written() -> None:
    rng = random.Random(0)
    for code in CODES:
        for _ in range(20):
            ops = [rng.randrange(4 + code.identity) for _ in range(code.num_slots)]
            ops[3] = 1
            numbers = [rng.randrange(len(code.patch_sizes)), *ops, 0, 0, rng.randrange(10)]
            for op in ops:
                numbers += [rng.randrange(10) * (op < 4) for _ in range(2)]
            arch = arch_of_net_id(numbers)
            assert list(net_id_of(arch, num_slots=code.num_slots)) == numbers
            assert arch_of_net_id(", ".join(map(str, numbers))) == arch
    assert arch_of_net_id(net_id_of(PUBLISHED["vitas_a"])) == PUBLISHED["vitas_a"]


@pytest.mark.parametrize(
    ("name", "size"), [("a", "1g"), ("b", "1g"), ("e", "1g"), ("c", "1.3g"), ("f", "4.9g")]
)
def test_published_nets_are_in_their_spaces(name: str, size: str) -> None:
    assert PUBLISHED[f"vitas_{name}"] in vitas(size)


def test_a_code_for_other_images() -> None:
    arch = arch_of_net_id(A, image_size=32, in_chans=1, num_classes=10)
    assert (arch.image_size, arch.in_chans, arch.num_classes) == (32, 1, 10)


def broken(position: int, value: object) -> str:
    words: list[object] = list(A.split())
    words[position] = value
    return " ".join(map(str, words))


@pytest.mark.parametrize(
    ("net_id", "message"),
    [
        (A + " 1", r"has 53 numbers; it must have 52 for 16 slots, 40 for 12 slots, 43 for 13 slots"),
        ("", r"has 0 numbers"),
        (broken(0, 3), r"position 0 \(patch size\) is 3; it counts from 0 to 2 \(14, 16, 32\)"),
        (broken(3, 5), r"position 3 \(slot 2\) is 5; .* 0 to 4 \(3, 6, 12, 16 heads, identity\)"),
        (broken(17, 1), r"position 17 \(final norm\) is 1; it must be 0"),
        (broken(18, 2), r"position 18 \(classifier\) is 2; it must be 0"),
        (broken(19, 10), r"position 19 \(embedding width\) is 10; it counts from 0 to 9 \(tenths"),
        (broken(22, 11), r"position 22 \(qkv width of slot 1\) is 11"),
        (broken(51, 10), r"position 51 \(MLP width of slot 15\) is 10"),
        (broken(7, "x"), r"position 7 is 'x'; it must be a whole number"),
        (broken(7, -1), r"position 7 is '-1'; it must be a whole number"),
        ("1 " + "4 " * 16 + "0 0 3" + " 0 0" * 16, r"the identity in all 16 slots; an Arch needs a block"),
        (
            "1 " + "4 " * 13 + "0 0 3" + " 0 0" * 13,
            r"position 1 \(slot 0\) is 4; .* 0 to 3 \(3, 6, 12, 16 heads\)",
        ),
    ],
    ids=lambda value: str(value)[-12:],
)
def test_malformed_codes_are_refused(net_id: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        arch_of_net_id(net_id)


@pytest.mark.parametrize("bad", [1.5, "x", None])
def test_numbers_that_are_none_are_refused(bad: Any) -> None:
    numbers: list[Any] = [int(word) for word in A.split()]
    numbers[4] = bad
    with pytest.raises(UserError, match=rf"position 4 is '{bad}'; it must be a whole number"):
        arch_of_net_id(numbers)


def test_a_code_says_nothing_of_mixers() -> None:
    stage = PUBLISHED["vitas_a"].stages[0]
    mixed = tuple(replace(block, mixer="performer") for block in stage.blocks)
    with pytest.raises(UserError, match="mixer is 'performer'"):
        net_id_of(replace(PUBLISHED["vitas_a"], stages=(replace(stage, blocks=mixed),)))


def test_archs_without_a_code_are_refused() -> None:
    arch = PUBLISHED["vitas_c"]
    with pytest.raises(
        UserError, match=r"has no net_id \(16 slots: .*num_heads is 5.*13 slots: .*Keep it as"
    ):
        net_id_of(
            replace(
                arch,
                stages=(replace(arch.stages[0], blocks=(Block(num_heads=5, head_dim=3, mlp_hidden=7),)),),
            )
        )
    with pytest.raises(UserError, match=r"it differs from a ViTAS net"):
        net_id_of(replace(arch, attn_scale="head_dim"))
    with pytest.raises(UserError, match=r"num_slots is 14; published spaces have 16, 12, 13"):
        net_id_of(arch, num_slots=14)
    assert tenths(1440)[0] == 144


def official(arch: Arch) -> dict[str, Tensor]:
    """A checkpoint of `arch` under the names of the authors' module tree."""
    model = build(arch)
    randomize_(model, torch.Generator().manual_seed(0))
    names: dict[str, str] = {}
    for name in model.state_dict():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            names[name] = f"backbone_Block_Block_{arch.blocks[int(index)].slot}.0.{rest}"
        elif name.startswith(("norm.", "head.")):
            kind, leaf = name.split(".")
            names[name] = (
                f"backbone_Norm_Norm_0.0.{leaf}" if kind == "norm" else f"backbone_FC_FC_0.0.module.0.{leaf}"
            )
        else:
            names[name] = f"backbone_init_stem_Patch_init_0.0.{name}"
    return {f"net.{theirs}": model.state_dict()[ours] for ours, theirs in names.items()}


def small() -> Arch:
    arch = PUBLISHED["vitas_a"]
    blocks = tuple(replace(block, head_dim=2, mlp_hidden=8) for block in arch.blocks)
    return replace(
        arch, image_size=32, num_classes=3, stages=(replace(arch.stages[0], embed_dim=38, blocks=blocks),)
    )


def test_checkpoints_of_nets_with_identities_load() -> None:
    arch = small()
    state = official(arch)
    model = load_vitas_model(state, arch)
    for name, value in build(arch).state_dict().items():
        assert model.state_dict()[name].shape == value.shape
    torch.testing.assert_close(
        model.state_dict()["blocks.6.mlp.fc1.weight"], state["net.backbone_Block_Block_14.0.mlp.fc1.weight"]
    )


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("slots", r"has blocks in slots 0, 2, 5, 6, 8, 13, 14; .* has them in 0, 1"),
        ("names", r"has 1 names that a retrained ViTAS net lacks \(blocks\.0\.x\)"),
        ("shape", r"is not of .*: blocks\.0\.attn\.qkv\.weight is \(72, 38\), needed \(216, 38\)"),
        ("missing", r"norm\.bias is missing"),
        ("empty", r"holds no state dict"),
    ],
)
def test_other_checkpoints_are_refused(mistake: str, message: str) -> None:
    arch: Any = small()
    state = official(arch)
    if mistake == "slots":
        arch = replace(arch, stages=(replace(arch.stages[0], blocks=arch.blocks[:2]),))
        arch = replace(
            arch,
            stages=(
                replace(arch.stages[0], blocks=tuple(replace(b, slot=i) for i, b in enumerate(arch.blocks))),
            ),
        )
    elif mistake == "names":
        state["blocks.0.x"] = torch.zeros(1)
    elif mistake == "shape":
        arch = replace(
            arch,
            stages=(replace(arch.stages[0], blocks=(replace(arch.blocks[0], head_dim=6), *arch.blocks[1:])),),
        )
    elif mistake == "missing":
        del state["net.backbone_Norm_Norm_0.0.bias"]
    else:
        state = {}
    with pytest.raises(UserError, match=message):
        load_vitas_model(state, arch)
