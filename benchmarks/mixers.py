"""Our mixers beside the packages that people use, in one process, in turns: time and peak memory, and how both grow.

    python benchmarks/mixers.py [--tokens 1024 4096] [--seconds 5] [--threads 1] [--device cpu]
        [--mixers softmax ...] [--out FILE.csv]

At dim 128 and 4 heads, forward and forward with backward. Needs `pip install 'vitnas[peers]'`; a missing package is
named and left out. A ratio above 1 means that ours is faster, or holds less. Long-short attention of images has no
package in use beside it: its rows are ours alone.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from vitnas.measure.environment import environment
from vitnas.measure.memory import peak_bytes_of
from vitnas.measure.mixers import _call, _make, _time, growth

DIM, HEADS, HEAD_DIM = 128, 4, 32


class NaiveSoftmax(nn.Module):
    """Attention with its N x N weights spelt out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * HEAD_DIM**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class TokenMlp(nn.Module):
    """The token half of timm's MixerBlock, without its norm and residual."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.mlp_tokens = Mlp(tokens, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_tokens(x.transpose(1, 2)).transpose(1, 2)


class OnMap(nn.Module):
    """A block of maps, given tokens as a view."""

    def __init__(self, block: nn.Module, side: int) -> None:
        super().__init__()
        self.block, self.side = block, side

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.transpose(1, 2).unflatten(2, (self.side, self.side)))


def peers(tokens: int) -> dict[str, tuple[str, Callable[[], nn.Module] | None]]:
    """By our word: the package's name and what makes its module, None where there is no package."""

    def performer() -> nn.Module:
        from performer_pytorch import SelfAttention

        return SelfAttention(DIM, heads=HEADS, dim_head=HEAD_DIM, causal=False, qkv_bias=True)

    def linformer() -> nn.Module:
        from linformer import LinformerSelfAttention

        return LinformerSelfAttention(DIM, tokens, k=min(64, tokens), heads=HEADS)

    def nystrom() -> nn.Module:
        from nystrom_attention import NystromAttention

        return NystromAttention(DIM, dim_head=HEAD_DIM, heads=HEADS, num_landmarks=min(64, tokens))

    def fourier() -> nn.Module:
        from vision_xformer.fnet import FNetBlock

        return FNetBlock()

    def fourier2d() -> nn.Module:
        from vision_xformer.fnet2d import FourierBlock

        block = FourierBlock(dim=DIM)
        block.ff = nn.Identity()  # the transform alone
        return OnMap(block, math.isqrt(tokens))

    return {
        "softmax": ("naive", NaiveSoftmax),
        "performer": ("performer-pytorch", performer),
        "linformer": ("linformer", linformer),
        "nystrom": ("nystrom-attention", nystrom),
        "fourier": ("vision-xformer", fourier),
        "fourier2d": ("vision-xformer", fourier2d),
        "token_mlp": ("timm", lambda: TokenMlp(tokens)),
        "long_short": ("none", None),
    }


def compare(tokens: int, seconds: float, device: str, words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row per mixer (of `words`, if any are given) and direction."""
    rows: list[dict[str, Any]] = []
    x = torch.randn(1, tokens, DIM, generator=torch.Generator().manual_seed(0)).to(device)
    for word, (package, maker) in peers(tokens).items():
        if words and word not in words:
            continue
        pair: dict[str, Any] = {"ours": _make(word, tokens, DIM, HEADS, device)}
        try:
            if maker is not None:
                pair["theirs"] = maker().to(device).eval()
        except ImportError as error:
            print(f"NOT MEASURED: {package} ({error})")
            continue
        for backward in (False, True):
            calls = {who: _call(module, x, backward) for who, module in pair.items()}
            times = _time(calls, seconds, device)
            held = {who: peak_bytes_of(module, x, calls[who]) for who, module in pair.items()}
            direction = "forward+backward" if backward else "forward"
            rows.append(
                {"mixer": word, "package": package, "tokens": tokens, "direction": direction}
                | beside(times, held)
            )
    return rows


def beside(times: dict[str, list[float]], held: dict[str, int]) -> dict[str, Any]:
    """What a row says of two modules, or of ours alone."""
    ours, theirs = times["ours"], times.get("theirs")
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=False)) if theirs else []
    return {
        "ours_ms": round(statistics.median(ours), 3),
        "theirs_ms": round(statistics.median(theirs), 3) if theirs else "",
        "speed_ratio": round(statistics.median(ratios), 3) if ratios else "",
        "ratio_p10": round(ratios[len(ratios) // 10], 3) if ratios else "",
        "ratio_p90": round(ratios[-1 - len(ratios) // 10], 3) if ratios else "",
        "ours_bytes": held["ours"],
        "theirs_bytes": held.get("theirs", ""),
        "memory_ratio": round(held["theirs"] / held["ours"], 3) if theirs else "",
        "rounds": len(ratios) or len(ours),
    }


def line(row: dict[str, Any]) -> str:
    """A row for a person."""
    start = f"{row['mixer']:<10} {row['tokens']:>5} {row['direction']:<17} ours {row['ours_ms']:>8} ms"
    if row["package"] == "none":
        return f"{start}, no package; memory {row['ours_bytes'] / 1e6:.1f} MB"
    spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}, {row['rounds']} rounds"
    held = f"{row['ours_bytes'] / 1e6:.1f} against {row['theirs_bytes'] / 1e6:.1f} MB"
    return (
        f"{start}, {row['package']} {row['theirs_ms']:>8} ms: {row['speed_ratio']:.2f}x as fast ({spread}); "
        f"memory {held}: {row['memory_ratio']:.2f}x less"
    )


def slopes(rows: list[dict[str, Any]]) -> list[str]:
    """How the memory of ours grows."""
    return [
        f"{word}, {direction}: memory grows as tokens^{slope:.2f}"
        for direction in ("forward", "forward+backward")
        for word, slope in growth(rows, direction, "ours_bytes").items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--mixers", nargs="+", default=[], help="only these")
    parser.add_argument("--seconds", type=float, default=5.0, help="per mixer, token count and direction")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the packages use what Python and torch are about to drop
    rows = [
        row
        for count in options.tokens
        for row in compare(count, options.seconds, options.device, options.mixers)
    ]
    print("\n".join(line(row) for row in rows))
    print("\n".join(slopes(rows)))
    found = environment()
    print(
        f"{found.get('cpu', '')}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}"
    )
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
