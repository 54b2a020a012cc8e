"""What the learned sampler costs: its share of training, and how fast it answers.

    python benchmarks/focus.py [--rounds N] [--out results.csv]

The share of training is measured on the digits space of the tour (batch 64) and on colour images of 32 pixels
(batch 64): `every` training steps with and without the look and the updates that go with them, in alternating rounds.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vitnas.budget import Budget
from vitnas.measure.environment import environment
from vitnas.sample import Focus, Moment
from vitnas.space import AutoFormerSpace, autoformer
from vitnas.stages.sampler import answers
from vitnas.supernet import Supernet

BATCH = 64
DIGITS = autoformer(
    "micro", image_size=8, patch_size=2, in_chans=1, embed_dims=(48, 64, 80), depths=(2, 3, 4), num_heads=(1, 2, 3),
    mlp_ratios=(1.0, 2.0, 3.0), num_classes=10,
)  # fmt: skip
COLOUR = autoformer("micro", image_size=32, patch_size=4, num_classes=10)


class HeldOut:
    """Random images in the place of held-out ones: what they show does not change the time."""

    def __init__(self, space: AutoFormerSpace) -> None:
        shape = (256, space.in_chans, space.image_size, space.image_size)
        self.batch = torch.randn(shape), torch.randint(0, 10, (256,))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.batch


def share(space: AutoFormerSpace, rounds: int) -> tuple[float, float, float, str]:
    """Time that learning adds to `every` training steps, as a share of these."""
    supernet, focus = Supernet(space), Focus(space, HeldOut(space))
    optimizer = torch.optim.AdamW(supernet.parameters(), lr=1e-4, fused=True)
    images, targets = (part[:BATCH] for part in HeldOut(space).batch)
    every, rng = focus.config.every, random.Random(0)

    def steps() -> None:
        for _ in range(every):
            (draw,) = focus.draw(rng)
            assert draw.arch is not None
            functional.cross_entropy(supernet(images, draw.arch), targets).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def learn(index: int) -> None:
        focus.before(Moment(2000 + index * every, 10_000, 0.0, 0, supernet, optimizer, lambda tensor: None))

    shares, plain, extra = [], [], []
    focus.queue = focus.ask(torch.linspace(focus.low, focus.high, 64))
    for index in range(-1, rounds):
        start = time.perf_counter()
        steps()
        middle = time.perf_counter()
        for _ in range(4):  # the record of what the policy would draw is made at every fourth look
            learn(50 * (index + 2) + _)
        end = time.perf_counter()
        if index >= 0:
            plain.append(middle - start)
            extra.append((end - middle) / 4)
            shares.append(extra[-1] / plain[-1])
    shares.sort()
    told = f"{1000 * statistics.median(extra):.0f} ms beside {1000 * statistics.median(plain):.0f} ms"
    return statistics.median(shares), shares[0], shares[-1], told


def timed(work: Callable[[], object], rounds: int) -> tuple[float, float, float, str]:
    work()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    return statistics.median(seconds), seconds[0], seconds[-1], "seconds"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    large = Focus(autoformer("base"))
    middle = 0.5 * (large.low + large.high)
    budget = Budget.parse(f"macs<={round(middle)}")
    rows: list[tuple[str, str, Callable[[], tuple[float, float, float, str]]]] = [
        ("learning, share of training (digits)", "<= 0.10", lambda: share(DIGITS, options.rounds)),
        ("learning, share of training (32 pixels)", "<= 0.10", lambda: share(COLOUR, options.rounds)),
        (
            "greedy answer, AutoFormer-B space",
            "< 0.1 s",
            lambda: timed(lambda: large.ask(torch.tensor([middle]), greedy=True), options.rounds),
        ),
        (
            "100 draws with filtering, AutoFormer-B space",
            "< 1 s",
            lambda: timed(lambda: answers(large, budget, num_draws=100), options.rounds),
        ),
    ]
    machine = environment()
    version = torch.__version__.partition("+")[0]
    out = options.out or Path(__file__).parent / "results" / f"focus_cpu_torch{version}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not out.exists()
    with open(out, "a", newline="") as stream:
        writer = csv.writer(stream)
        if fresh:
            writer.writerow(
                "date,name,target,median,low,high,detail,rounds,threads,torch,cpu,cores".split(",")
            )
        for name, target, measure in rows:
            median, low, high, detail = measure()
            print(f"{name:<46} {median:8.4f} ({low:.4f}-{high:.4f}) {target:<8} {detail}", flush=True)
            cells = [
                f"{median:.5f}",
                f"{low:.5f}",
                f"{high:.5f}",
                detail,
                options.rounds,
                torch.get_num_threads(),
            ]
            today, cpu = datetime.now(UTC).date(), machine.get("cpu", "")
            writer.writerow([today, name, target, *cells, torch.__version__, cpu, machine.get("cores", "")])


if __name__ == "__main__":
    main()
