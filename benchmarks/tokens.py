"""Exported networks that keep fewer tokens: against all tokens, and against a network written by hand for the purpose.

    python benchmarks/tokens.py [--only ROW ...] [--rounds 7] [--threads 1] [--out FILE.csv]

The shape of DeiT-S at 197 tokens, keep 0.7 at three places, one thread, batch 1, in ONNX Runtime; files by the exporter
that `vitnas.export` uses. The network by hand is plain torch: the least code that selects by the same rule.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from spine import Row, main, paired
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.measure.convert import convert
from vitnas.measure.runtimes import Call, onnx_call
from vitnas.measure.target import LatencyTarget
from vitnas.model import build

DIM, HEADS, DEPTH, SHAPE = 384, 6, 12, (3, 224, 224)
KEEPS = {3: 137, 6: 96, 9: 67}
TARGET = LatencyTarget(runtime="onnxruntime", threads=1, batch=1)
REPEATS = 5  # calls per round


def deit(selector: str | None) -> Arch:
    """DeiT-S, whole or with KEEPS."""
    keeps = KEEPS if selector else {}
    blocks = [
        Block(num_heads=HEADS, head_dim=64, mlp_hidden=4 * DIM, keep=keeps.get(n)) for n in range(DEPTH)
    ]
    return Arch(
        image_size=224, patch_size=16, stages=(Stage(embed_dim=DIM, blocks=tuple(blocks)),), selector=selector
    )


class Attention(nn.Module):
    """Also tells the class token's attention, if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, tell: bool) -> tuple[Tensor, Tensor | None]:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        told = None
        if tell:
            told = (q[:, :, :1] * 0.125 @ k.transpose(2, 3)).softmax(-1).mean((1, 2))[:, 1:]
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, DIM)), told


class ByHand(nn.Module):
    """A ViT that gathers the best patches, by DynamicViT's predictor or by the class token's attention."""

    def __init__(self, selector: str) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, 16, 16)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, DIM)), nn.Parameter(torch.randn(1, 197, DIM))
        self.attn = nn.ModuleList(Attention() for _ in range(DEPTH))
        self.mlp = nn.ModuleList(Mlp(DIM, 4 * DIM) for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * DEPTH + 1))
        self.by_attention = selector == "attention"
        halves = [nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU()]
        rest = [
            nn.Linear(DIM, DIM // 2),
            nn.GELU(),
            nn.Linear(DIM // 2, DIM // 4),
            nn.GELU(),
            nn.Linear(DIM // 4, 2),
        ]
        made = (
            ()
            if self.by_attention
            else [nn.ModuleList([nn.Sequential(*halves), nn.Sequential(*rest)]) for _ in KEEPS]
        )
        self.predictors = nn.ModuleList(made)
        self.head = nn.Linear(DIM, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        told, place = None, 0
        for n in range(DEPTH):
            if n in KEEPS:
                patches = x[:, 1:]
                if not self.by_attention:
                    first, rest = self.predictors[place]
                    own, whole = first(patches).chunk(2, dim=-1)
                    both = torch.cat([own, whole.mean(1, keepdim=True).expand_as(own)], dim=-1)
                    told = rest(both).log_softmax(-1)[..., 0]
                best = told.topk(KEEPS[n], dim=1).indices
                patches = patches.gather(1, best.unsqueeze(-1).expand(-1, -1, DIM))
                x, place = torch.cat([x[:, :1], patches], dim=1), place + 1
            mixed, told = self.attn[n](self.norms[2 * n](x), self.by_attention and n + 1 in KEEPS)
            x = x + mixed
            x = x + self.mlp[n](self.norms[2 * n + 1](x))
        return self.head(self.norms[-1](x)[:, 0])


FOLDER = tempfile.TemporaryDirectory(prefix="vitnas-tokens-")


@cache
def file_of(name: str) -> Path:
    """The exported file of `full`, of a selector's Model, or of `by hand SELECTOR`."""
    torch.manual_seed(0)
    hand, selector = name.startswith("by hand"), name.rpartition(" ")[2]
    network = ByHand(selector) if hand else build(deit(None if name == "full" else selector))
    path = Path(FOLDER.name) / f"{name.replace(' ', '_')}.onnx"
    convert(network.eval(), path, torch.randn(2, *SHAPE))
    return path


def call_of(name: str) -> Callable[[], None]:
    call: Call = onnx_call(file_of(name), TARGET, SHAPE)

    def several() -> None:
        for _ in range(REPEATS):
            call()

    return several


def beside(name: str, other: str, target: str) -> Callable[[int], Row]:
    """Speed of one file over another."""

    def row(rounds: int) -> Row:
        return paired(f"exported {name}", other, target, call_of(name), call_of(other), rounds)

    return row


MEMORY = """
import sys, numpy, onnxruntime
def kib(word):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(word + ":"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.add_free_dimension_override_by_name("batch", 1)
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
made = kib("RssAnon")
images = numpy.zeros((1, 3, 224, 224), numpy.float32)
for _ in range(3):
    session.run(None, {session.get_inputs()[0].name: images})
print(kib("RssAnon") - made)
"""


def memory(selector: str) -> Callable[[int], Row]:
    """What three runs add to the memory of a fresh session (a session's own comes in two sizes, by chance): what it
    allocates, not the pages of ONNX Runtime's own code that more kinds of kernels bring in."""

    def row(rounds: int) -> Row:
        added: dict[str, float] = {}
        for name in (selector, "full"):
            command = [sys.executable, "-c", MEMORY, str(file_of(name))]
            found = []
            for _ in range(min(5, rounds)):
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(int(done.stdout) / 1024)
            added[name] = statistics.median(found)
        ratio = added[selector] / added["full"]
        return Row(
            f"memory of running, {selector}", "full", "<= 1.0", ratio, ratio, ratio, f"{added[selector]:.1f} MiB",
            f"{added['full']:.1f} MiB", min(5, rounds),
        )  # fmt: skip

    return row


def by_count(rounds: int) -> Row:
    """What multiply-accumulates say."""
    full, kept = count(deit(None)).macs, count(deit("predictor")).macs
    return Row("MACs, predictor", "full", "", full / kept, full / kept, full / kept, f"{kept / 1e9:.3f} G",
               f"{full / 1e9:.3f} G", 1)  # fmt: skip


ROWS: dict[str, Callable[[int], Row]] = {
    "macs": by_count,
    **{
        name: beside(name, "full", ">= 1.35")
        for name in ("predictor", "attention", "fixed", "evit", "merge", "random")
    },
    **{f"by_hand_{name}": beside(name, f"by hand {name}", ">= 1.0") for name in ("predictor", "attention")},
    **{f"memory_{name}": memory(name) for name in ("predictor", "attention")},
}

if __name__ == "__main__":
    main(ROWS, "tokens", __doc__)
