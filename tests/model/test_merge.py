"""Selections that merge, by their papers' formulas; and those that any other has to beat."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.layers.merge import EvitSelection, MergeSelection, PoolSelection
from vitnas.layers.select import Kept
from vitnas.model import Model, build
from vitnas.space import around, autoformer
from vitnas.testing import randomize_

BLOCK = Block(num_heads=2, head_dim=16, mlp_hidden=48)


def arch_of(selector: str, *keeps: int | None, **fields: Any) -> Arch:
    """Blocks on a grid of 4 x 4 patches, one per number of patches kept."""
    options = {"num_classes": 5, "image_size": 16, "patch_size": 4, **fields}
    blocks = tuple(replace(BLOCK, keep=keep) for keep in keeps)
    used = selector if any(keep is not None for keep in keeps) else None
    return Arch(stages=(Stage(embed_dim=32, blocks=blocks),), selector=used, **options)


def made(arch: Arch) -> Model:
    model = build(arch)
    randomize_(model, torch.Generator().manual_seed(0))
    return model.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def merged_by_hand(x: Tensor, keys: Tensor, sizes: list[float], keep: int) -> tuple[Tensor, list[float]]:
    """Bipartite soft matching of one image, in words: tokens of odd number look for their like among the others."""
    groups = [([token], key, size) for token, key, size in zip(x, keys, sizes, strict=True)]
    while len(groups) > keep:
        best = []
        for odd in range(1, len(groups), 2):
            alike = [
                float(functional.cosine_similarity(groups[odd][1], groups[even][1], dim=0))
                for even in range(0, len(groups), 2)
            ]
            best.append((max(alike), odd, 2 * alike.index(max(alike))))
        joins = {odd: even for _, odd, even in sorted(best, reverse=True)[: len(groups) - keep]}
        found = []
        for index in (n for n in range(len(groups)) if n not in joins):
            members = [groups[n] for n in (index, *(odd for odd, even in joins.items() if even == index))]
            size = sum(member[2] for member in members)
            value = sum(member[0][0] * member[2] for member in members) / size
            key = sum(member[1] * member[2] for member in members) / size
            found.append(([value], key, size))
        groups = found
    return torch.stack([value[0] for value, _, _ in groups]), [size for _, _, size in groups]


@pytest.mark.parametrize("keep", [11, 8, 3])
def test_merging_is_bipartite_soft_matching(keep: int) -> None:
    """Fewer than half, half, and more than half of the tokens; twice, so that sizes count."""
    x, sizes, kept = noise(2, 17, 8), [[1.0] * 16] * 2, None
    for left, keys in ((12, noise(2, 16, 4)), (keep, noise(2, 12, 4).flip(0))):
        found = MergeSelection(8, left, grid=(4, 4), num_prefix_tokens=1)(x, kept, keys)
        for image in range(2):
            want, sizes_now = merged_by_hand(x[image, 1:], keys[image], sizes[image], left)
            torch.testing.assert_close(found.x_BND[image, 1:], want, rtol=1e-5, atol=1e-6)
            assert found.after.log_size_BN is not None
            log_sizes = torch.tensor([1.0, *sizes_now]).log()
            torch.testing.assert_close(found.after.log_size_BN[image], log_sizes, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.x_BND[:, 0], x[:, 0], rtol=0, atol=0)
        x, kept = found.x_BND, found.after
        sizes = found.after.log_size_BN[:, 1:].exp().tolist()


@pytest.mark.parametrize(
    "pool",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "seq"},
        {"class_token": False, "global_pool": "map", "pool_num_heads": 2, "pool_mlp_hidden": 8},
    ],
    ids=lambda pool: pool.get("global_pool", "token"),
)
@pytest.mark.parametrize("mixer", ["softmax", "performer"])
def test_merging_what_is_alike_changes_nothing(pool: dict[str, Any], mixer: str) -> None:
    """Some of the patches that are there twice, without positions: attention and pooling count these twice."""
    merging = made(arch_of("merge", None, 11, None, position="none", **pool))
    blocks = [replace(block, mixer=mixer) for block in merging.arch.blocks[1:]]
    merging = made(merging.arch.with_blocks([merging.arch.blocks[0], *blocks]))
    plain = replace(merging.arch.stages[0], blocks=tuple(replace(b, keep=None) for b in merging.arch.blocks))
    whole = build(replace(merging.arch, stages=(plain,), selector=None))
    whole.load_state_dict(merging.state_dict())
    images = noise(2, 3, 16, 8).view(2, 3, 16, 2, 1, 4).expand(-1, -1, -1, -1, 2, -1).reshape(2, 3, 16, 16)
    found = merging(images, want=("logits", "groups"))
    joined = found["groups"][:, 0, 1::2] != torch.arange(1, 16, 2)
    assert joined.sum(1).tolist() == [5, 5]
    torch.testing.assert_close(found["groups"][:, 0, 1::2][joined], found["groups"][:, 0, ::2][joined])
    torch.testing.assert_close(found["logits"], whole.eval()(images), rtol=1e-4, atol=1e-5)


def test_a_fused_token_is_the_sum_by_attention() -> None:
    x, attention = noise(2, 17, 8), noise(2, 16).softmax(1)
    found = EvitSelection(8, 6, grid=(4, 4), num_prefix_tokens=1)(x, None, attention, grouping=True)
    for image in range(2):
        order = attention[image].argsort(descending=True)
        best, rest = order[:5].sort().values, order[5:]
        fused = (x[image, 1 + rest] * attention[image, rest, None]).sum(0, keepdim=True)
        want = torch.cat([x[image, :1], x[image, 1 + best], fused])
        torch.testing.assert_close(found.x_BND[image], want, rtol=1e-5, atol=1e-6)
        assert found.into_BP is not None
        assert set(found.into_BP[image, rest].tolist()) == {1 + int(order[5])}
        torch.testing.assert_close(found.into_BP[image, best], 1 + best)


def test_attention_learns_from_what_is_fused() -> None:
    """Where the class token is all that counts, dropped patches reach it through the fused token alone."""
    model = made(arch_of("evit", None, 3)).train()
    model(noise(2, 3, 16, 16)).square().sum().backward()
    weight = model.blocks[0].attn.qkv.weight
    with_fusing = weight.grad.clone()
    plain = build(replace(model.arch, selector="attention"))
    plain.load_state_dict(model.state_dict())
    plain.train()(noise(2, 3, 16, 16)).square().sum().backward()
    assert not torch.allclose(with_fusing, plain.blocks[0].attn.qkv.weight.grad)


def test_pooling_is_the_mean_of_squares() -> None:
    x = noise(2, 25, 8)
    found = PoolSelection(8, 6, grid=(4, 6), num_prefix_tokens=1)(x, None)
    maps = x[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
    want = functional.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.x_BND[:, 1:], want)
    assert found.after.rows_BN is not None
    assert found.after.rows_BN[0].tolist() == [0, 1, 3, 5, 13, 15, 17]
    again = PoolSelection(8, 1, grid=(4, 4), num_prefix_tokens=0)(
        x[:, :4], Kept(torch.tensor([[0, 2, 8, 10]]))
    )
    torch.testing.assert_close(again.x_BND, x[:, :4].mean(1, keepdim=True))


def test_random_places_are_drawn_in_training_and_fixed_in_evaluation() -> None:
    model = made(arch_of("random", None, 5))
    images = noise(2, 3, 16, 16)

    def kept() -> Tensor:
        keep: Tensor = model(images, want=("keep",))["keep"][:, 0]
        return keep

    fixed = kept()
    torch.testing.assert_close(kept(), fixed)
    torch.testing.assert_close(fixed[0], fixed[1])
    model.train()
    torch.manual_seed(0)
    first, second = kept(), kept()
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert first.sum(1).tolist() == [5, 5]
    torch.manual_seed(0)
    torch.testing.assert_close(kept(), first)


def test_first_come_is_first_served() -> None:
    model = made(arch_of("first", 7, None, 3))
    found = model(noise(2, 3, 16, 16), want=("places.0", "places.2"))
    assert found["places.0"].tolist() == [list(range(7))] * 2
    assert found["places.2"].tolist() == [[0, 1, 2]] * 2


def test_groups_name_the_token_that_a_patch_is_in() -> None:
    model = made(arch_of("merge", None, 9, None, 2))
    found = model(noise(2, 3, 16, 16), want=("groups", "keep", "places.3"))
    groups, places = found["groups"], found["places.3"]
    for image in range(2):
        assert [len(groups[image, step].unique()) for step in range(2)] == [9, 2]
        assert groups[image, 1].unique().tolist() == places[image].tolist()
    dropping = made(arch_of("fixed", None, 9, 4))
    groups = dropping(noise(2, 3, 16, 16), want=("groups",))["groups"]
    assert (groups == -1).sum(2).tolist() == [[7, 12]] * 2


@pytest.mark.parametrize(
    ("selector", "keeps", "fields", "message"),
    [
        ("evit", (None, 1), {}, r"block 1: keep is 1 of 16 patches and selector 'evit'; .* Keep at least 2"),
        (
            "evit",
            (9, None),
            {},
            r"selector is 'evit', but no block stands before it; it goes by the attention",
        ),
        ("merge", (9, None), {}, r"selector is 'merge', but no block stands before it; it goes by the keys"),
        ("pool", (None, 5), {}, r"keep is 5 of 16 patches and selector 'pool'; .* the quarter\. Use 4\."),
        ("pool", (None, 4, 1, 0), {"image_size": 24}, r"keep is 4 of 36 patches .* the quarter\. Use 9\."),
        ("pool", (None, 9, 2), {"image_size": 24}, r"2 x 2 are pooled, and 3 x 3 patches have an odd side"),
    ],
)
def test_what_cannot_merge_is_refused(
    selector: str, keeps: tuple[int | None, ...], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        arch_of(selector, *keeps, **fields)


def test_spaces_refuse_shares_that_a_selector_cannot_keep() -> None:
    with pytest.raises(
        UserError, match=r"keep is .*, which may leave 32 of 64 patches, and selector 'pool'; "
    ):
        autoformer("micro", image_size=16, keep=(0.5, 1.0), selector="pool")
    arch = arch_of("merge", None, None).with_blocks([BLOCK, replace(BLOCK, head_dim=8)])
    with pytest.raises(UserError, match=r"selector is 'merge' and heads are not all of one width"):
        around(arch, keep=(0.5, 1.0), keep_places=(1,), selector="merge")
