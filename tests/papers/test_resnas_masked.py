"""Several Archs on slices give the gradient of ViT-ResNAS's masked formulation, which is written out here.

There the whole supernet runs for every sample; masks per sample zero what its Arch lacks, and a masked LayerNorm takes
its mean and variance over the channels kept (arXiv 2109.00642, section 3.3). Batch norm runs on given statistics.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.sample import Spread
from vitnas.space import ViTResNASSpace, vit_resnas
from vitnas.supernet import Supernet
from vitnas.testing import randomize_

Weights = dict[str, Tensor]


def masked_norm(x: Tensor, keep: Tensor, weights: Weights, name: str) -> Tensor:
    """LayerNorm over the channels that a sample keeps; keep (B, 1, C) of 0 and 1."""
    fraction = keep.mean(-1, keepdim=True)
    mean = x.mean(-1, keepdim=True) / fraction
    var = (x**2).mean(-1, keepdim=True) / fraction - mean**2
    return ((x - mean) / (var + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]) * keep


def prefix(sizes: list[int], largest: int) -> Tensor:
    """(B, 1, C): the first channels of each sample."""
    return (torch.arange(largest)[None] < torch.tensor(sizes)[:, None]).double()[:, None]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def masked_block(
    x: Tensor, dim: Tensor, weights: Weights, name: str, head_dim: int, told: list[tuple[int, int]]
) -> Tensor:
    """`told` has (heads, hidden units) of each sample, (0, 0) where the block does not exist."""
    exists = torch.tensor([float(heads > 0) for heads, _ in told]).double()[:, None, None]
    normed = masked_norm(x, dim, weights, f"{name}.norm1")
    q, k, v = (
        linear(normed, weights, f"{name}.attn.qkv").unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
    )
    mixed = (q @ k.transpose(-1, -2) * head_dim**-0.5).softmax(-1) @ v
    mixed = mixed.transpose(1, 2).flatten(2)
    mixed = mixed * prefix([heads * head_dim for heads, _ in told], mixed.shape[-1])
    x = x + linear(mixed, weights, f"{name}.attn.proj") * exists * dim
    normed = masked_norm(x, dim, weights, f"{name}.norm2")
    hidden = functional.gelu(linear(normed, weights, f"{name}.mlp.fc1"))
    hidden = hidden * prefix([hidden for _, hidden in told], hidden.shape[-1])
    return x + linear(hidden, weights, f"{name}.mlp.fc2") * exists * dim


def masked_reduction(x: Tensor, dim: Tensor, out: Tensor, weights: Weights, name: str) -> Tensor:
    side = round((x.shape[1] - 1) ** 0.5)
    normed = masked_norm(x, dim, weights, f"{name}.norm")

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))

    patches = functional.conv2d(
        grid(normed), weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"], stride=2, padding=1
    )
    patches = patches.flatten(2).transpose(1, 2) + weights[f"{name}.pos_embed"]
    tokens = torch.cat([linear(normed[:, :1], weights, f"{name}.prefix"), patches], 1)
    short = torch.cat([x[:, :1], functional.avg_pool2d(grid(x), 2).flatten(2).transpose(1, 2)], 1)
    zeros = short.new_zeros(*short.shape[:2], tokens.shape[-1] - short.shape[-1])
    return (tokens + torch.cat([short, zeros], -1)) * out


def masked_stem(images: Tensor, weights: Weights) -> Tensor:
    if "patch_embed.conv1.weight" not in weights:
        kernel = weights["patch_embed.proj.weight"]
        return functional.conv2d(images, kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[-1])

    def step(x: Tensor, index: int, stride: int) -> Tensor:
        x = functional.conv2d(x, weights[f"patch_embed.conv{index}.weight"], stride=stride, padding=1)
        stats = [
            weights[f"patch_embed.norm{index}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")
        ]
        return functional.batch_norm(x, *stats).relu()

    first = step(images, 1, 2)
    kernel = weights["patch_embed.proj.weight"]
    x = first + step(step(first, 2, 1), 3, 1)
    return functional.conv2d(x, kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[-1])


def masked_logits(
    space: ViTResNASSpace, weights: Weights, images: Tensor, archs: list[Arch]
) -> dict[str, Tensor]:
    """Class and patch logits of `images`, the i-th by `archs[i]`, all computed by the whole supernet."""
    widths = [[stage.embed_dim for stage in arch.stages] for arch in archs]
    x = masked_stem(images, weights).flatten(2).transpose(1, 2)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1) + weights["pos_embed"]
    dim = prefix([width[0] for width in widths], x.shape[-1])
    x, place = x * dim, 0
    for s, stage in enumerate(space.stages):
        if s:
            out = prefix([width[s] for width in widths], stage.embed_dims[-1])
            x, dim = masked_reduction(x, dim, out, weights, f"reductions.{s - 1}"), out
        for i in range(stage.depth):
            told = []
            for arch in archs:
                found = {
                    index if b.slot is None else b.slot: b for index, b in enumerate(arch.stages[s].blocks)
                }
                told.append((found[i].num_heads, found[i].mlp_hidden) if i in found else (0, 0))
            x = masked_block(x, dim, weights, f"blocks.{place}", stage.head_dim, told)
            place += 1
    x = masked_norm(x, dim, weights, "norm")
    return {"head": linear(x[:, 0], weights, "head"), "patch_head": linear(x[:, 1:], weights, "patch_head")}


def loss(heads: dict[str, Tensor], targets: Tensor) -> Tensor:
    patches = heads["patch_head"]
    each = functional.cross_entropy(patches.flatten(0, 1), targets.repeat_interleave(patches.shape[1]))
    return functional.cross_entropy(heads["head"], targets) + each


@pytest.mark.parametrize("stem", ["conv", "linear"])
@pytest.mark.parametrize("num_archs", [2, 4])
def test_the_grouped_step_has_the_gradient_of_the_masked_one(stem: str, num_archs: int) -> None:
    space = vit_resnas(
        "micro",
        image_size=16,
        patch_size=4,
        num_classes=3,
        embed_dims=(8, 12, 16),
        depths=(3, 3),
        num_heads=(1, 2, 3),
        head_dim=4,
        stem=stem,
        stem_width=6 if stem == "conv" else 0,
        patch_head=True,
    )
    generator = torch.Generator().manual_seed(0)
    supernet = Supernet(space).double().eval()
    randomize_(supernet, generator)
    size = 8
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 3, (size,), generator=generator)
    draws = Spread(space, num_archs).draw(random.Random(5))
    assert len({draw.arch for draw in draws}) == num_archs
    assert any(arch.depth < space.largest().depth for arch in (draw.arch for draw in draws) if arch)
    archs: list[Arch] = []
    for draw in draws:
        assert draw.arch is not None
        rows = draw.rows(size)
        heads = supernet(images[rows], draw.arch, want=("head", "patch_head?"))
        (loss(heads, targets[rows]) * draw.weight).backward()
        archs += [draw.arch] * (rows.stop - rows.start)

    weights: Weights = {name: p.detach().clone().requires_grad_() for name, p in supernet.named_parameters()}
    buffers = dict(supernet.named_buffers())
    masked = masked_logits(space, weights | buffers, images, archs)
    loss(masked, targets).backward()
    for name, parameter in supernet.named_parameters():
        want = weights[name].grad
        assert want is not None, name
        got = torch.zeros_like(want) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert want.abs().max() > 0, name
