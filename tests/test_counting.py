"""count: equal to torch's own counter, to the parameters, to the live activations, and to what was published."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from math import prod
from typing import Any, get_args

import pytest
import torch

from vitnas.arch import Act, Arch, Block, MlpNorm, Stage
from vitnas.counting import BYTES, Convention, count, parts
from vitnas.layers.mlp import ACTS
from vitnas.layers.select import Kept, Selection, SelectionFrame
from vitnas.layers.selectors import SELECTIONS
from vitnas.measure.memory import peak_activation_bytes, peak_bytes_of
from vitnas.model import build
from vitnas.model.published import PUBLISHED
from vitnas.space import autoformer
from vitnas.testing.flops import counted_macs

SPACES = {
    "tiny": autoformer("tiny"),
    "small": autoformer("small"),
    "base": autoformer("base"),
    "micro": autoformer("micro", image_size=32, patch_size=4, num_classes=10),
    "micro_grey_8px": autoformer("micro", image_size=8, patch_size=2, num_classes=10, in_chans=1),
    "plain": autoformer("tiny", relative_position=0),
}
# The same widths in few blocks: torch's counters take a second per dozen blocks.
SHALLOW = {name: replace(space, depths=(1, 2)) for name, space in SPACES.items()}


def wild_arch(rng: random.Random) -> Arch:
    """Any shape: heads wider than the embedding, tiny grids, many classes."""
    class_token = rng.random() < 0.6
    patch, grid = rng.choice([1, 2, 4]), wild_grid(rng, [2, 3, 4, 8])
    return Arch(
        image_size=(patch * grid[0], patch * grid[1]),
        patch_size=patch,
        in_chans=rng.choice([1, 3, 5]),
        num_classes=rng.choice([0, 1, 10, 5000]),
        stages=(Stage(embed_dim=rng.choice([1, 8, 17, 96]), blocks=wild_blocks(rng)),),
        class_token=class_token,
        position=rng.choice(["learned", "none"]),
        relative_position=rng.choice([0, 0, 1, 2, 14]),
        global_pool=rng.choice(["token", "avg"]) if class_token else "avg",
        fc_norm=rng.random() < 0.4,
        qkv_bias=rng.random() < 0.7,
    )


def wild_grid(rng: random.Random, sides: list[int]) -> tuple[int, int]:
    """Rows and columns, as many of them as square ones."""
    rows = rng.choice(sides)
    return rows, rng.choice([rows, *sides])


def wild_blocks(rng: random.Random) -> tuple[Block, ...]:
    return tuple(
        Block(
            num_heads=rng.choice([1, 2, 3, 5]),
            head_dim=rng.choice([2, 7, 16, 64]),
            mlp_hidden=rng.choice([1, 3, 16, 200]),
        )
        for _ in range(rng.choice([1, 2]))
    )


def wild_stages(rng: random.Random) -> Arch:
    """Any shape of several stages, with a convolutional stem or several heads."""
    arch, num_stages = wild_arch(rng), rng.choice([1, 2, 3])
    patch, grid = rng.choice([2, 4, 6]), wild_grid(rng, [step << (num_stages - 1) for step in (1, 2, 3)])
    dims = sorted(rng.choice([1, 8, 17, 96]) for _ in range(num_stages))
    reduction = rng.choice(["residual", "conv", "patch"])
    drops = reduction == "patch" and num_stages > 1
    pooled_token = arch.global_pool == "token"
    distill = pooled_token and not arch.fc_norm and not drops and rng.random() < 0.5
    stem = rng.choice(["linear", "conv"])
    return replace(
        arch,
        image_size=(patch * grid[0], patch * grid[1]),
        patch_size=patch,
        stages=tuple(
            Stage(embed_dim=dim, blocks=wild_blocks(rng))
            for dim in (dims if reduction == "residual" else reversed(dims))
        ),
        stem=stem,
        stem_width=rng.choice([1, 5, 48]) if stem == "conv" else 0,
        reduction=reduction,
        distill_token=distill,
        patch_norm=rng.random() < 0.3,
        work_size=rng.choice([None, None, (patch * grid[0] * 2, patch * grid[1])]),
        patch_head=not distill and not arch.fc_norm and rng.random() < 0.5,
    )


def wild_selections(rng: random.Random, selector: str) -> Arch:
    """Any shape whose last stage keeps fewer patches once or more often, if `selector` can."""
    arch = wild_stages(rng)
    patches, first = prod(arch.grids[-1]), len(arch.stages) == 1
    kind = SELECTIONS[selector]
    reads_patches = arch.patch_head or arch.global_pool != "token"
    alone = not reads_patches and rng.random() < 0.5  # the last block gives the class token alone
    if kind.keeps_keys or alone or kind.asked(class_token=arch.ends_with_class) == "all":
        arch = replace(arch, relative_position=0)
    blocks = [block for _ in range(rng.choice([2, 3])) for block in wild_blocks(rng)]
    left = patches
    for index, block in enumerate(blocks):
        is_last = index == len(blocks) - 1
        keeps = range(1, left) if index > 0 or (first and kind.asks == "nothing") else []
        keeps = [keep for keep in keeps if not kind.refusal(keep, left, arch.grids[-1])]
        keep = rng.choice(keeps) if keeps and (rng.random() < 0.5 or is_last) else None
        keep = 0 if is_last and alone and index > 0 else keep
        mixers = ["softmax"]
        if not (arch.relative_position or kind.asks != "nothing" or kind.keeps_keys or keep == 0):
            mixers.append("performer")
        blocks[index] = replace(block, mixer=rng.choice(mixers), keep=keep)
        left = left if keep is None else keep
    rotary = arch.relative_position == 0 and rng.random() < 0.4
    if rotary:
        blocks = [replace(block, head_dim=rng.choice([4, 16])) for block in blocks]
        arch = replace(
            arch,
            stages=tuple(
                replace(s, blocks=tuple(replace(b, head_dim=8) for b in s.blocks)) for s in arch.stages
            ),
        )
    last = replace(arch.stages[-1], blocks=tuple(blocks))
    return replace(
        arch,
        reg_tokens=arch.reg_tokens
        or (0 if arch.distill_token or arch.drops_prefix else rng.choice([0, 0, 2])),
        stages=(*arch.stages[:-1], last),
        position=rng.choice(["rotary", "rotary_2d"]) if rotary else arch.position,
        selector=selector if left < patches else None,
    )


def with_parts(arch: Arch, rng: random.Random) -> Arch:
    """`arch` with some of the parts that pretrained networks are made of."""
    arch = replace(arch, **_attention_parts(arch, rng))
    takes_map = not arch.distill_token and not arch.drops_prefix and arch.blocks[-1].keep != 0
    if takes_map and rng.random() < 0.3:
        divisors = [n for n in range(1, arch.embed_dim + 1) if arch.embed_dim % n == 0]
        sizes = {"pool_num_heads": rng.choice(divisors), "pool_mlp_hidden": rng.choice([1, 16, 3000])}
        act = rng.choice(list(ACTS))
        arch = replace(arch, global_pool="map", act=act, **sizes)
    reg_tokens = 0 if arch.rel_pos_bias == "table" or arch.drops_prefix else rng.choice([0, 1, 4])
    prefix = arch.prefix_tokens[0] - arch.reg_tokens + reg_tokens
    return replace(
        arch,
        reg_tokens=reg_tokens,
        no_embed_class=arch.has_positions and prefix > 0 and rng.random() < 0.5,
        pre_norm=arch.stem == "linear" and rng.random() < 0.5,
        layer_scale=rng.random() < 0.5,
        act=arch.act if arch.global_pool == "map" else rng.choice(get_args(Act)),
        scale_mlp_norm=rng.random() < 0.5,
        mlp_norm=rng.choice(get_args(MlpNorm)),
    )


def _attention_parts(arch: Arch, rng: random.Random) -> dict[str, Any]:
    if any(block.mixer != "softmax" for block in arch.blocks):
        return {}
    parts: dict[str, Any] = {"qk_norm": rng.random() < 0.5, "qkv_bias": rng.choice([True, False, "qv"])}
    if not arch.relative_position and all(block.head_dim % 4 == 0 for block in arch.blocks):
        parts["position"] = rng.choice(["rotary_dinov3", "learned_rotary_2d"])
    elif not arch.relative_position and arch.selector is None and arch.position in ("learned", "none"):
        parts["rel_pos_bias"] = rng.choice(["mlp", "table"] if arch.num_prefix_tokens < 2 else ["mlp"])
    return parts


def torch_macs(arch: Arch) -> int:
    """By torch's counter."""
    return counted_macs(build(arch, device="meta").eval(), (1, *arch.input_size))


def check(arch: Arch) -> None:
    cost = count(arch)
    assert cost.macs == torch_macs(arch)
    model = build(arch, device="meta")
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert cost.memory_bytes == peak_activation_bytes(model, arch.input_size)


@pytest.mark.parametrize("name", SPACES)
def test_count_equals_torch_for_every_space(name: str) -> None:
    rng = random.Random(0)
    wide_and_narrow = [arch for arch in SHALLOW[name].corners() if arch.depth == 1]
    for arch in [*wide_and_narrow, SHALLOW[name].sample(rng)]:
        check(arch)


def test_count_equals_torch_at_full_depth() -> None:
    check(SPACES["tiny"].largest())
    check(SPACES["micro"].sample(random.Random(0)))


@pytest.mark.parametrize("number", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_count_equals_torch_for_any_shape(number: int) -> None:
    rng = random.Random(1)
    some = [*(wild_arch(rng) for _ in range(2 * number)), *(wild_stages(rng) for _ in range(3 * number))]
    for arch in [*some, *(with_parts(arch, rng) for arch in some)]:
        cost = count(arch)
        assert cost.macs == torch_macs(arch), arch
        model = build(arch).eval()
        assert cost.params == sum(parameter.numel() for parameter in model.parameters()), arch
        assert cost.memory_bytes == peak_activation_bytes(model, arch.input_size, device=None), arch


@pytest.mark.parametrize("number", [len(SELECTIONS), pytest.param(200, marks=pytest.mark.slow)])
def test_count_equals_torch_for_any_selections(number: int) -> None:
    rng, tried = random.Random(number), Counter[str]()
    while sum(tried.values()) < number:
        selector = min(SELECTIONS, key=lambda word: tried[word])
        arch = with_parts(wild_selections(rng, selector), rng)
        if arch.selector is None:
            continue
        tried[arch.selector] += 1
        cost, model = count(arch), build(arch).eval()
        assert cost.macs == torch_macs(arch), arch
        assert cost.params == sum(parameter.numel() for parameter in model.parameters()), arch
        assert cost.memory_bytes == peak_activation_bytes(model, arch.input_size, device=None), arch
        found = parts(arch)
        assert sum(part.macs for part in found) == cost.macs
        assert sum(part.params for part in found) == cost.params
        assert max(part.memory for part in found) * BYTES == cost.memory_bytes
    assert min(tried.values()) == number // len(SELECTIONS)


def held_by(kind: type[Selection], dim: int, keep: int, before: int, frame: SelectionFrame) -> int:
    """Bytes alive in one selection, measured."""
    selection = kind(dim, keep, grid=frame.grid, num_prefix_tokens=frame.num_prefix_tokens).eval()
    tokens = before + frame.num_prefix_tokens
    shapes = {"attention": (1, tokens), "keys": (1, tokens, frame.head_dim)}

    def run() -> None:
        x, told = torch.randn(1, tokens, dim), None
        if kind.asks != "nothing":
            told = torch.rand(shapes[kind.asks])[:, frame.num_prefix_tokens :]
        rows = torch.arange(tokens).unsqueeze(0) if frame.again else None
        sizes = torch.zeros(1, tokens) if frame.sized else None
        selection(x, Kept(rows, None, sizes), told)

    with torch.no_grad():
        return peak_bytes_of(selection, torch.empty(0), run)


@pytest.mark.parametrize("word", SELECTIONS)
def test_what_a_selection_holds_by_itself(word: str) -> None:
    """In a Model a wider layer mostly hides it."""
    rng, kind, tried = random.Random(0), SELECTIONS[word], 0
    while tried < 12:
        grid, dim = wild_grid(rng, [2, 3, 4, 6]), rng.choice([2, 7, 24])
        before = prod(grid) if rng.random() < 0.5 or kind.word == "pool" else rng.randrange(2, prod(grid) + 1)
        again = before < prod(grid)
        frame = SelectionFrame(grid, rng.choice([0, 1, 3]), 5, again, again and kind.has_sizes)
        keeps = [keep for keep in range(1, before) if not kind.refusal(keep, before, grid)]
        if keeps:
            tried, keep = tried + 1, rng.choice(keeps)
            cost = kind.cost(dim, before=before, keep=keep, frame=frame)
            assert held_by(kind, dim, keep, before, frame) == BYTES * cost.memory, (dim, keep, before, frame)


def test_attention_of_all_tokens_is_counted_beside_its_mean() -> None:
    plain = {"head_dim": 2, "mlp_hidden": 3}
    blocks = (Block(num_heads=3, **plain), Block(num_heads=3, **plain), Block(num_heads=1, keep=2, **plain))
    check(
        Arch(
            image_size=12,
            patch_size=4,
            stages=(Stage(embed_dim=8, blocks=blocks),),
            num_classes=2,
            class_token=False,
            global_pool="avg",
            selector="attention",
        )
    )


@pytest.mark.parametrize(
    "parts_of_stem",
    [
        {"position": "none"},
        {"position": "none", "class_token": False},
        {"no_embed_class": True},
        {"pre_norm": True},
    ],
    ids=str,
)
def test_what_is_before_the_blocks_is_the_peak_where_few_patches_go_on(parts_of_stem: dict[str, Any]) -> None:
    blocks = (Block(num_heads=1, head_dim=4, mlp_hidden=1, keep=1),)
    common = {"image_size": 18, "patch_size": 6, "num_classes": 2, "global_pool": "avg", "selector": "fixed"}
    arch = Arch(stages=(Stage(embed_dim=96, blocks=blocks),), **{**common, **parts_of_stem})
    check(arch)


@pytest.mark.parametrize("name", ["micro", "micro_grey_8px"])
def test_memory_is_what_a_pass_on_the_cpu_holds(name: str) -> None:
    for arch in (SHALLOW[name].smallest(), SHALLOW[name].largest(), SPACES[name].middle()):
        for each in (arch, replace(arch, relative_position=0), replace(arch, class_token=False)):
            model = build(each).eval()
            assert count(each).memory_bytes == peak_activation_bytes(model, each.input_size, device=None)


def test_parts_of_several_stages_add_up() -> None:
    rng = random.Random(4)
    for arch in (wild_stages(rng) for _ in range(12)):
        found, cost = parts(arch), count(arch)
        assert sum(part.macs for part in found) == cost.macs
        assert sum(part.params for part in found) == cost.params
        assert max(part.memory for part in found) * BYTES == cost.memory_bytes
        model = dict(build(arch, device="meta").named_parameters())
        for part in found:
            if part.name.startswith("reductions."):
                assert part.params == sum(
                    p.numel() for n, p in model.items() if n.startswith(f"{part.name}.")
                )


@pytest.mark.parametrize("name", SPACES)
def test_parts_add_up(name: str) -> None:
    conventions: list[Convention] = ["executed", "plain", "dense_relative"]
    for arch in (SPACES[name].largest(), SPACES[name].smallest(), SPACES[name].sample(random.Random(0))):
        model = dict(build(arch, device="meta").named_parameters())
        for convention in conventions:
            found, cost = parts(arch, convention=convention), count(arch, convention=convention)
            assert sum(part.macs for part in found) == cost.macs
            assert sum(part.params for part in found) == cost.params
            assert max(part.memory for part in found) * BYTES == cost.memory_bytes
        names = [
            "stem",
            *(f"blocks.{i}.{what}" for i in range(arch.depth) for what in ("attn", "mlp")),
            "head",
        ]
        assert [part.name for part in found] == names
        # Attention comes with its norm: norm1, qkv, proj and tables.
        first = [p.numel() for n, p in model.items() if n.startswith(("blocks.0.attn.", "blocks.0.norm1."))]
        assert found[1].params == sum(first)


@pytest.mark.parametrize(
    ("name", "params", "plain", "dense"),
    [
        ("autoformer_tiny", 5.868, 1.283, 1.482),
        ("autoformer_small", 22.891, 4.774, 5.161),
        ("autoformer_base", 53.692, 11.045, 11.691),
    ],
)
def test_published_figures(name: str, params: float, plain: float, dense: float) -> None:
    arch = PUBLISHED[name]
    assert round(count(arch).params / 1e6, 3) == params
    assert round(count(arch, convention="plain").macs / 1e9, 3) == plain
    assert round(count(arch, convention="dense_relative").macs / 1e9, 3) == dense
    # Ours costs less than the authors' code, and more than nothing.
    assert plain < count(arch).macs / 1e9 < dense


@pytest.mark.parametrize(("share", "macs"), [(0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)])
def test_published_macs_of_evit(share: float, macs: float) -> None:
    """Theirs drops between attention and MLP of blocks 3, 6 and 9: attention of a network that drops behind these, the
    MLPs of one that drops in front (arXiv 2202.07800, table 1; one token more with fusing)."""
    block, keeps, left = Block(num_heads=6, head_dim=64, mlp_hidden=1536), [], 196
    for _ in range(3):
        left = math.ceil(share * left) + 1
        keeps.append(left)

    def deit(*places: int) -> dict[str, int]:
        at = dict(zip(places, keeps, strict=True))
        stage = Stage(embed_dim=384, blocks=tuple(replace(block, keep=at.get(n)) for n in range(12)))
        arch = Arch(image_size=224, patch_size=16, stages=(stage,), selector="evit")
        return {part.name: part.macs for part in parts(arch) if not part.name.startswith("selections.")}

    behind, front = deit(4, 7, 10), deit(3, 6, 9)
    total = sum(front[name] if name.endswith(".mlp") else behind[name] for name in behind)
    assert round(total / 1e9, 1) == macs


@pytest.mark.parametrize(
    ("size", "params", "macs"),
    [
        ("tiny", (5.37, 10.52), (1.17, 2.26)),
        ("small", (13.06, 34.79), (2.77, 7.20)),
        ("base", (39.79, 76.88), None),
    ],
)
def test_published_ranges(size: str, params: tuple[float, float], macs: tuple[float, float] | None) -> None:
    ends = (SPACES[size].smallest(), SPACES[size].largest())
    assert tuple(round(count(arch).params / 1e6, 2) for arch in ends) == params
    if macs:
        assert tuple(round(count(arch, convention="plain").macs / 1e9, 2) for arch in ends) == macs


def test_a_plain_vit_costs_the_same_by_all_conventions() -> None:
    arch = SPACES["plain"].middle()
    assert len({count(arch, convention=c).macs for c in ("executed", "plain", "dense_relative")}) == 1
