"""Ways of sharing: which entries a width uses, how evenly they are used, and what private tensors there are."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from vitnas.errors import UserError
from vitnas.space import VitasSpace, vitas
from vitnas.supernet import (
    PRIVATE_HEADS,
    PRIVATE_TOKENS,
    Bilateral,
    Coupling,
    Cyclic,
    Place,
    Prefix,
    Sharing,
    Supernet,
    make_sharing,
    select,
)
from vitnas.train.config import TrainConfig
from vitnas.train.optim import make_optimizer

TENTHS = vitas("1g").embed_dims
SPACE = vitas(
    "micro", image_size=8, num_classes=5, in_chans=1, num_slots=2, widest=(12, 48, 20), num_heads=(2, 3, 4)
)


def used(rule: Coupling, size: int, largest: int, place: Place) -> list[int]:
    return [entry for run in rule(size, largest, place) for entry in range(largest)[run]]


def coverage(rule: Coupling, widths: tuple[int, ...]) -> Counter[int]:
    """How often each entry is used over all widths, sides and laps."""
    places = [Place(side, turn) for side in range(rule.sides) for turn in range(rule.turns)]
    return Counter(
        entry for width in widths for place in places for entry in used(rule, width, max(widths), place)
    )


@pytest.mark.parametrize("widths", [TENTHS, (48, 64, 80), (3, 6, 9, 12), (7, 11, 13), (5,)])
def test_cyclic_uses_every_channel_equally_often(widths: tuple[int, ...]) -> None:
    rule = Cyclic(widths)
    found = coverage(rule, widths)
    assert set(found) == set(range(max(widths)))
    assert set(found.values()) == {rule.turns * sum(widths) // max(widths)}
    for width in widths:  # and every width gets as many different channels as it asks for
        for turn in range(rule.turns):
            entries = used(rule, width, max(widths), Place(0, turn))
            assert len(set(entries)) == len(entries) == width
            assert entries == sorted(entries)
            start = rule.start(width, turn)
            assert set(entries) == {(start + i) % max(widths) for i in range(width)}


def test_bilateral_is_symmetric_and_prefix_is_not() -> None:
    both, left = coverage(Bilateral(), TENTHS), coverage(Prefix(), TENTHS)
    assert [both[i] for i in range(384)] == [both[383 - i] for i in range(384)]
    assert (max(left.values()), min(left.values())) == (10, 1)
    assert set(both.values()) <= {10, 11, 12}  # eleven but where widths meet, as they are rounded


def test_archs_of_a_space_use_channels_evenly() -> None:
    space = vitas("1g")
    sharing = Sharing(per_axis={"dim": Cyclic(space.embed_dims)})
    rng = random.Random(0)
    counts = torch.zeros(384)
    for _ in range(2000):
        arch = space.sample(rng)
        assert sharing.place(arch) == sharing.place(arch)
        for run in sharing.per_axis["dim"](arch.embed_dim, 384, sharing.place(arch)):
            counts[run] += 1
    mean = float(counts.mean())
    assert abs(mean - 1100) < 40  # 55 % of 2,000
    # six deviations of a binomial count
    assert float((counts - mean).abs().max()) < 6 * (2000 * 0.55 * 0.45) ** 0.5


def test_a_width_that_the_circle_does_not_know_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"a cyclic axis has 5 of 12 entries; it knows 3, 6, 12\. Give it all"
    ):
        Cyclic((3, 6, 12))(5, 12, Place())


def numbered(supernet: Supernet) -> dict[str, Tensor]:
    """Shared tensors whose entries are all different."""
    start = 0
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.copy_(torch.arange(start, start + parameter.numel()).view_as(parameter))
            start += parameter.numel()
    return dict(supernet.named_parameters())


def test_right_subnets_are_aligned_right_end_to_end() -> None:
    supernet = Supernet(SPACE, sharing=Sharing(Bilateral()))
    shared, arch = numbered(supernet), SPACE.smallest()
    left, right = select(supernet, arch, 0), select(supernet, arch, 1)
    d, m = arch.embed_dim, arch.blocks[0].mlp_hidden
    for name in ("cls_token", "norm.weight", "head.weight", "blocks.1.norm2.bias"):
        if name in left:
            assert torch.equal(left[name], shared[name][..., :d])
            assert torch.equal(right[name], shared[name][..., -d:])
    fc1 = shared["blocks.0.mlp.fc1.weight"]
    assert torch.equal(left["blocks.0.mlp.fc1.weight"], fc1[:m, :d])
    assert torch.equal(right["blocks.0.mlp.fc1.weight"], fc1[-m:, -d:])
    qkv = shared["blocks.0.attn.qkv.weight"].view(3, 48, 12)
    inner = arch.blocks[0].num_heads * arch.blocks[0].head_dim
    assert torch.equal(right["blocks.0.attn.qkv.weight"].view(3, inner, d), qkv[:, -inner:, -d:])
    assert torch.equal(left["head.bias"], right["head.bias"])


def test_a_cyclic_subnet_has_the_same_channels_end_to_end() -> None:
    """Whatever carries the embedding takes one set of channels, and so do inner and hidden units of a block."""
    supernet = Supernet(SPACE, sharing=make_sharing(SPACE, "cyclic"))
    numbers, wrapped = numbered(supernet), 0
    for seed in range(20):
        arch = SPACE.sample(random.Random(seed))
        place = supernet.sharing.place(arch)
        rules = supernet.sharing.per_axis
        dims = used(rules["dim"], arch.embed_dim, 12, place)
        wrapped += dims != list(range(dims[0], dims[0] + len(dims)))
        weights = select(supernet, arch)
        assert torch.equal(weights["cls_token"], numbers["cls_token"][..., dims])
        assert torch.equal(weights["head.weight"], numbers["head.weight"][:, dims])
        assert torch.equal(weights["norm.bias"], numbers["norm.bias"][dims])
        for index, block in enumerate(arch.blocks):
            name = f"blocks.{index}."
            inner = used(rules["inner"], block.num_heads * block.head_dim, 48, place)
            hidden = used(rules["hidden"], block.mlp_hidden, 20, place)
            qkv = numbers[f"{name}attn.qkv.weight"].view(3, 48, 12)[:, inner][..., dims]
            assert torch.equal(weights[f"{name}attn.qkv.weight"].view_as(qkv), qkv)
            assert torch.equal(
                weights[f"{name}attn.proj.weight"], numbers[f"{name}attn.proj.weight"][dims][:, inner]
            )
            assert torch.equal(
                weights[f"{name}mlp.fc1.weight"], numbers[f"{name}mlp.fc1.weight"][hidden][:, dims]
            )
            assert torch.equal(
                weights[f"{name}mlp.fc2.weight"], numbers[f"{name}mlp.fc2.weight"][dims][:, hidden]
            )
    assert wrapped, "some went over the end of the circle"


def test_head_counts_divide_the_same_inner_width_anew() -> None:
    supernet = Supernet(SPACE)
    shared = numbered(supernet)
    genes = list(SPACE.encode(SPACE.largest()))
    at = [gene.name for gene in SPACE.genes].index("num_heads.0")
    found = []
    for option in range(3):
        genes[at] = option
        found.append(select(supernet, SPACE.decode(genes))["blocks.0.attn.qkv.weight"])
    for weight in found:
        assert torch.equal(weight, shared["blocks.0.attn.qkv.weight"])


def test_private_tensors() -> None:
    supernet = Supernet(SPACE, sharing=Sharing(private=(PRIVATE_TOKENS, PRIVATE_HEADS)))
    shapes = {name: tuple(p.shape) for name, p in supernet.named_parameters()}
    for patch, tokens in ((2, 17), (4, 5)):
        assert shapes[f"private.patch_size_{patch}.pos_embed"] == (1, tokens, 12)
        assert shapes[f"private.patch_size_{patch}.cls_token"] == (1, 1, 12)
        assert shapes[f"private.patch_size_{patch}.patch_embed.proj.weight"] == (12, 1, patch, patch)
    for heads in (2, 3, 4):
        assert shapes[f"private.num_heads_{heads}.blocks.1.attn.qkv.weight"] == (96, 12)
    assert shapes["blocks.1.attn.qkv.weight"] == (48, 12)  # v
    assert "pos_embed" not in shapes
    assert "blocks.1.attn.proj.weight" in shapes
    groups = {
        id(p): group["weight_decay"]
        for group in make_optimizer(supernet, TrainConfig()).param_groups
        for p in group["params"]
    }
    named = dict(supernet.named_parameters())
    assert groups[id(named["private.patch_size_4.pos_embed"])] == 0
    assert groups[id(named["private.num_heads_2.blocks.0.attn.qkv.weight"])] > 0


def test_private_options_do_not_touch_each_other() -> None:
    supernet = Supernet(SPACE, sharing=Sharing(private=(PRIVATE_TOKENS, PRIVATE_HEADS)))
    arch = SPACE.largest()
    supernet(torch.randn(2, 1, 8, 8), arch).sum().backward()
    touched = {name for name, p in supernet.named_parameters() if p.grad is not None}
    private = {name for name in touched if name.startswith("private.")}
    assert {name.split(".")[1] for name in private} == {"patch_size_2", "num_heads_4"}
    weights, shared = select(supernet, arch), dict(supernet.named_parameters())
    qkv = weights["blocks.0.attn.qkv.weight"]
    assert torch.equal(qkv[:96], shared["private.num_heads_4.blocks.0.attn.qkv.weight"])
    assert torch.equal(qkv[96:], shared["blocks.0.attn.qkv.weight"])


def test_shared_tokens_are_the_first_of_the_longest() -> None:
    supernet = Supernet(SPACE)
    assert supernet.get_parameter("pos_embed").shape == (1, 17, 12)
    assert supernet.get_parameter("patch_embed.proj.weight").shape == (12, 1, 4, 4)
    coarse = next(arch for arch in SPACE.corners() if arch.patch_size == 4)
    assert torch.equal(
        select(supernet, coarse)["pos_embed"], supernet.get_parameter("pos_embed")[:, :5, : coarse.embed_dim]
    )


def test_shared_tensors_start_as_a_model_does() -> None:
    private = Supernet(
        SPACE,
        sharing=Sharing(private=(PRIVATE_TOKENS, PRIVATE_HEADS)),
        generator=torch.Generator().manual_seed(0),
    )
    for name, parameter in private.named_parameters():
        if name.endswith(("qkv.weight", "pos_embed")):
            assert 0.01 < float(parameter.detach().std()) < 0.03
        elif name.endswith("qkv.bias"):
            assert not parameter.detach().any()
    assert (
        len(
            {float(p.detach().flatten()[0]) for n, p in private.named_parameters() if n.endswith("cls_token")}
        )
        == 2
    )


def test_a_frozen_tensor_gets_no_gradient() -> None:
    supernet = Supernet(SPACE, sharing=Sharing(private=(PRIVATE_HEADS,)))
    frozen = supernet.get_parameter("blocks.0.attn.qkv.weight").requires_grad_(False)
    supernet(torch.randn(2, 1, 8, 8), SPACE.largest()).sum().backward()
    assert frozen.grad is None
    assert supernet.get_parameter("private.num_heads_4.blocks.0.attn.qkv.weight").grad is not None


def test_identity_shifting_makes_one_arch_of_many() -> None:
    shifted, slots = (
        vitas("micro", image_size=8, num_classes=5, num_slots=3, shifted=value) for value in (True, False)
    )
    rng = random.Random(0)
    arch = slots.decode([1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2])  # the identity, then two blocks
    assert [block.slot for block in arch.blocks] == [1, 2]
    assert isinstance(shifted, VitasSpace)
    assert any("blocks follow each other" in reason for reason in shifted.reasons_against(arch))
    for _ in range(50):
        assert all(block.slot is None for block in shifted.sample(rng).blocks)
