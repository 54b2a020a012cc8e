"""ViT-ResNAS against its authors' way: several Archs per step on slices against masks, and higher resolutions.

    python benchmarks/resnas.py [--only NAME ...] [--rounds N] [--threads N] [--out results.csv]

The masked side runs the whole supernet for every image and zeroes what its Arch lacks, as published (arXiv 2109.00642,
section 3.3): boolean masks, a masked LayerNorm with a hand-written backward, torch's fused attention. Both sides train
the same Archs on the same batch with the same optimizer; rounds alternate. Memory is the peak of a fresh process per
side.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from spine import Row, main, paired
from torch import Tensor
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.layers.axes import named_tensors
from vitnas.model import PUBLISHED, build
from vitnas.sample import Spread
from vitnas.space import vit_resnas
from vitnas.supernet import Supernet

SPACE = vit_resnas("sr_tiny_mh")
BATCH, NUM_ARCHS = 16, 2
Table = dict[str, Tensor]


class MaskedNorm(torch.autograd.Function):
    """LayerNorm over the kept channels; fraction (B, 1, 1) of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fraction: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True) / fraction
        var = (x * x).mean(-1, keepdim=True) / fraction - mean * mean
        scale = (var + 1e-6).rsqrt()
        normed = (x - mean) * scale
        ctx.save_for_backward(normed, scale, fraction)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        normed, scale, fraction = ctx.saved_tensors
        grad = grads[0]
        mean = grad.mean(-1, keepdim=True)
        along = (grad * normed).mean(-1, keepdim=True)
        return (grad - (mean + normed * along) / fraction) * scale, None


def norm(x: Tensor, keep: Tensor, table: Table, name: str) -> Tensor:
    fraction = keep.float().mean(-1, keepdim=True)
    return (MaskedNorm.apply(x, fraction) * table[f"{name}.weight"] + table[f"{name}.bias"]) * keep


def linear(x: Tensor, table: Table, name: str) -> Tensor:
    return functional.linear(x, table[f"{name}.weight"], table[f"{name}.bias"])


def first(sizes: Sequence[int], largest: int) -> Tensor:
    """(B, 1, C) bool: the first channels of each image."""
    return (torch.arange(largest)[None] < torch.tensor(sizes)[:, None])[:, None]


def masked_stem(images: Tensor, table: Table) -> Tensor:
    def step(x: Tensor, index: int, stride: int) -> Tensor:
        x = functional.conv2d(x, table[f"patch_embed.conv{index}.weight"], stride=stride, padding=1)
        stats = [
            table[f"patch_embed.norm{index}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")
        ]
        return functional.batch_norm(x, *stats, training=True).relu_()

    u1 = step(images, 1, 2)
    x = u1 + step(step(u1, 2, 1), 3, 1)
    kernel = table["patch_embed.proj.weight"]
    x = functional.conv2d(x, kernel, table["patch_embed.proj.bias"], stride=kernel.shape[-1])
    return x.flatten(2).transpose(1, 2)


def masked_block(
    x: Tensor, keep: Tensor, table: Table, name: str, head_dim: int, masks: Sequence[Tensor]
) -> Tensor:
    exists, inner, hidden = masks
    normed = norm(x, keep, table, f"{name}.norm1")
    q, k, v = (
        linear(normed, table, f"{name}.attn.qkv").unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)
    )
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) * inner
    x = x + linear(mixed, table, f"{name}.attn.proj") * exists * keep
    normed = norm(x, keep, table, f"{name}.norm2")
    wide = functional.gelu(linear(normed, table, f"{name}.mlp.fc1")) * hidden
    return x + linear(wide, table, f"{name}.mlp.fc2") * exists * keep


def masked_reduction(x: Tensor, keep: Tensor, out: Tensor, table: Table, name: str) -> Tensor:
    side = round((x.shape[1] - 1) ** 0.5)
    normed = norm(x, keep, table, f"{name}.norm")

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))

    new = functional.conv2d(
        grid(normed), table[f"{name}.conv.weight"], table[f"{name}.conv.bias"], stride=2, padding=1
    )
    patches = new.flatten(2).transpose(1, 2) + table[f"{name}.pos_embed"]
    tokens = torch.cat([linear(normed[:, :1], table, f"{name}.prefix"), patches], 1)
    short = torch.cat([x[:, :1], functional.avg_pool2d(grid(x), 2).flatten(2).transpose(1, 2)], 1)
    return (tokens + functional.pad(short, (0, tokens.shape[-1] - short.shape[-1]))) * out


def masked_logits(table: Table, images: Tensor, archs: Sequence[Arch]) -> Tensor:
    """Logits of `images`, the i-th by `archs[i]`, computed by the whole supernet."""
    x = masked_stem(images, table)
    x = torch.cat([table["cls_token"].expand(len(x), -1, -1), x], 1) + table["pos_embed"]
    keep = first([arch.stages[0].embed_dim for arch in archs], x.shape[-1])
    x, place = x * keep, 0
    for s, stage in enumerate(SPACE.stages):
        if s:
            out = first([arch.stages[s].embed_dim for arch in archs], stage.embed_dims[-1])
            x, keep = masked_reduction(x, keep, out, table, f"reductions.{s - 1}"), out
        for i in range(stage.depth):
            slots = [
                {n if b.slot is None else b.slot: b for n, b in enumerate(a.stages[s].blocks)} for a in archs
            ]
            found = [blocks.get(i) for blocks in slots]
            exists = torch.tensor([block is not None for block in found])[:, None, None]
            inner = [block.num_heads * block.head_dim if block else 0 for block in found]
            hidden = [block.mlp_hidden if block else 0 for block in found]
            masks = (
                exists,
                first(inner, stage.num_heads[-1] * stage.head_dim),
                first(hidden, stage.mlp_hidden[-1]),
            )
            x = masked_block(x, keep, table, f"blocks.{place}", stage.head_dim, masks)
            place += 1
    return linear(norm(x, keep, table, "norm")[:, 0], table, "head")


def steps(side: str, batch: int = BATCH) -> Callable[[], None]:
    """Training steps of one side; both sides see the same Archs in the same order."""
    torch.manual_seed(0)
    supernet = Supernet(SPACE, generator=torch.Generator().manual_seed(0)).train()
    images, targets = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    optimizer = torch.optim.AdamW(supernet.parameters(), lr=1e-4, fused=True)
    sampler, rng = Spread(SPACE, NUM_ARCHS), random.Random(0)
    table = named_tensors(supernet)

    def step() -> None:
        draws = sampler.draw(rng)
        if side == "slices":
            for draw in draws:
                rows = draw.rows(batch)
                logits = supernet(images[rows], draw.arch)
                (functional.cross_entropy(logits, targets[rows]) * draw.weight).backward()
        else:
            archs = [draw.arch for draw in draws for _ in range(batch // NUM_ARCHS) if draw.arch is not None]
            functional.cross_entropy(masked_logits(table, images, archs), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def grouped(rounds: int) -> Row:
    return paired(
        "several Archs on slices", "masked formulation", ">= 1.5", steps("slices"), steps("masked"), rounds
    )


MEMORY = """
import sys, torch
sys.path.insert(0, FOLDER)
import resnas
def kib(word):  # of this process's own image; getrusage would count the parent that was forked
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(word + ":"))
torch.set_num_threads(1)
start = kib("VmRSS")
step = resnas.steps(SIDE)
for _ in range(3):
    step()
print(kib("VmHWM") - start)
"""


def memory(rounds: int) -> Row:
    """Peak memory of weights, optimizer and three steps in a fresh process per side."""
    peaks = {}
    for side in ("slices", "masked"):
        code = MEMORY.replace("SIDE", repr(side)).replace("FOLDER", repr(str(Path(__file__).parent)))
        found = []
        for _ in range(min(3, rounds)):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            found.append(int(done.stdout) / 1024)
        peaks[side] = statistics.median(found)
    ratio = peaks["slices"] / peaks["masked"]
    return Row(
        "memory of several Archs on slices", "masked formulation", "<= 1.0", ratio, ratio, ratio,
        f"{peaks['slices']:.0f} MiB", f"{peaks['masked']:.0f} MiB", min(3, rounds),
    )  # fmt: skip


def resolution(size: int, batch: int = 2) -> Callable[[int], Row]:
    """Time per MAC of vit_resnas_medium at `size` over that at 224, forward; rounds alternate."""

    def row(rounds: int) -> Row:
        archs = [replace(PUBLISHED["vit_resnas_medium"], image_size=side) for side in (size, 224)]
        models = [build(arch).eval() for arch in archs]
        images = [torch.randn(batch, 3, arch.image_size, arch.image_size) for arch in archs]
        predicted = count(archs[0]).macs / count(archs[1]).macs
        ratios, found = [], []
        with torch.inference_mode():
            for index in range(rounds + 1):
                seconds = []
                for model, each in zip(models, images, strict=True):
                    start = time.perf_counter()
                    model(each)
                    seconds.append(time.perf_counter() - start)
                if index:  # the first warms up
                    ratios.append(seconds[0] / seconds[1] / predicted)
                    found.append(seconds)
        large, small = (statistics.median(column) for column in zip(*found, strict=True))
        ratios.sort()
        return Row(
            f"time at {size} px, vit_resnas_medium", f"224 px times {predicted:.3f} (MACs)", "<= 1.05",
            statistics.median(ratios), ratios[0], ratios[-1], f"{large:.4f} s", f"{small * predicted:.4f} s", rounds,
        )  # fmt: skip

    return row


ROWS: dict[str, Callable[[int], Row]] = {
    "grouped": grouped,
    "memory": memory,
    **{str(size): resolution(size) for size in (280, 336, 392)},
}

if __name__ == "__main__":
    main(ROWS, "resnas", __doc__)
