"""Our mixers beside the packages that people use, in one process, in turns: time and peak memory, and how both grow.

    python benchmarks/mixers.py [--tokens 1024 4096] [--seconds 5] [--threads 1] [--device cpu] [--out FILE.csv]

At dim 128 and 4 heads, forward and forward with backward. Needs `pip install 'vitnas[peers]'`; a missing package is
named and left out. A ratio above 1 means that ours is faster, or holds less.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.measure.environment import environment
from vitnas.measure.memory import peak_bytes_of
from vitnas.measure.mixers import _call, _make, _time

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


def peers(tokens: int) -> dict[str, tuple[str, Callable[[], nn.Module]]]:
    """By our word: the package's name and what makes its module."""

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

    return {
        "softmax": ("naive", NaiveSoftmax),
        "performer": ("performer-pytorch", performer),
        "linformer": ("linformer", linformer),
        "nystrom": ("nystrom-attention", nystrom),
        "fourier": ("vision-xformer", fourier),
    }


def compare(tokens: int, seconds: float, device: str) -> list[dict[str, Any]]:
    """A row per mixer and direction."""
    rows, x = [], torch.randn(1, tokens, DIM, generator=torch.Generator().manual_seed(0)).to(device)
    for word, (package, maker) in peers(tokens).items():
        try:
            theirs = maker().to(device).eval()
        except ImportError as error:
            print(f"NOT MEASURED: {package} ({error})")
            continue
        pair: dict[str, Any] = {"ours": _make(word, tokens, DIM, HEADS, device), "theirs": theirs}
        for backward in (False, True):
            calls = {who: _call(module, x, backward) for who, module in pair.items()}
            times = _time(calls, seconds, device)
            ratios = sorted(b / a for a, b in zip(times["ours"], times["theirs"], strict=False))
            bytes_of = {who: peak_bytes_of(module, x, calls[who]) for who, module in pair.items()}
            rows.append(
                {
                    "mixer": word,
                    "package": package,
                    "tokens": tokens,
                    "direction": "forward+backward" if backward else "forward",
                    "ours_ms": round(statistics.median(times["ours"]), 3),
                    "theirs_ms": round(statistics.median(times["theirs"]), 3),
                    "speed_ratio": round(statistics.median(ratios), 3),
                    "ratio_p10": round(ratios[len(ratios) // 10], 3),
                    "ratio_p90": round(ratios[-1 - len(ratios) // 10], 3),
                    "ours_bytes": bytes_of["ours"],
                    "theirs_bytes": bytes_of["theirs"],
                    "memory_ratio": round(bytes_of["theirs"] / bytes_of["ours"], 3),
                    "rounds": len(ratios),
                }
            )
    return rows


def growth(rows: list[dict[str, Any]]) -> list[str]:
    """Slopes of log(memory) over log(tokens) of ours."""
    lines = []
    for key in dict.fromkeys((row["mixer"], row["direction"]) for row in rows):
        mine = [row for row in rows if (row["mixer"], row["direction"]) == key]
        if len(mine) > 1:
            xs, ys = ([math.log(row[name]) for row in mine] for name in ("tokens", "ours_bytes"))
            slope = statistics.linear_regression(xs, ys).slope
            lines.append(f"{key[0]}, {key[1]}: memory grows as tokens^{slope:.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--seconds", type=float, default=5.0, help="per mixer, token count and direction")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the packages use what Python and torch are about to drop
    rows = [row for count in options.tokens for row in compare(count, options.seconds, options.device)]
    for row in rows:
        spread = f"{row['ratio_p10']:.2f}-{row['ratio_p90']:.2f}, {row['rounds']} rounds"
        held = f"{row['ours_bytes'] / 1e6:.1f} against {row['theirs_bytes'] / 1e6:.1f} MB"
        print(
            f"{row['mixer']:<10} {row['tokens']:>5} {row['direction']:<17} ours {row['ours_ms']:>8} ms, "
            f"{row['package']} {row['theirs_ms']:>8} ms: {row['speed_ratio']:.2f}x as fast ({spread}); "
            f"memory {held}: {row['memory_ratio']:.2f}x less"
        )
    print("\n".join(growth(rows)))
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
