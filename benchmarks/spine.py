"""The speed and memory table: every row is a ratio of two things measured side by side in one process.

    python benchmarks/spine.py [--only NAME ...] [--rounds N] [--out results.csv]

Rounds alternate between the two sides (A B A B ...), the ratio is the median of the rounds' ratios, so a machine that
slows down for a while slows both; on one thread of a CPU the processor's time counts, which others on the machine
hardly change. `target` is what the ratio must reach. Prints a table and appends it to a CSV named by device and torch
version.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.extraction import extract
from vitnas.measure.environment import environment
from vitnas.model import build
from vitnas.space import AutoFormerSpace, Space, autoformer, unified
from vitnas.supernet import Supernet
from vitnas.train import evaluate

DEVICE = torch.device("cpu")  # set by the command line
SPACE = autoformer("tiny")
NARROW = autoformer("tiny", image_size=32)
UNIFIED = unified("px32", num_classes=1000)
BATCH = 16


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` is ours over the other's rate (higher is better) unless the name says time."""

    name: str
    against: str
    target: str
    ratio: float
    low: float
    high: float
    ours: str
    other: str
    rounds: int


def paired(
    name: str, against: str, target: str, ours: Callable[[], object], other: Callable[[], object], rounds: int
) -> Row:
    """Speed of `ours` over `other`: median of the ratios of alternating rounds, after a warm-up of each."""
    ours(), other()
    pairs = []
    for index in range(rounds):
        sides = (ours, other) if index % 2 == 0 else (other, ours)
        seconds = {}
        for side in sides:
            start = clock()
            side()
            wait()
            seconds[side] = clock() - start
        pairs.append((seconds[ours], seconds[other]))
    return row_of(name, against, target, pairs)


def row_of(name: str, against: str, target: str, pairs: list[tuple[float, float]]) -> Row:
    """The row of (our seconds, the other's) of each round."""
    ratios = sorted(b / a for a, b in pairs)
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Row(
        name, against, target, statistics.median(ratios), ratios[0], ratios[-1], f"{mine:.4f} s", f"{theirs:.4f} s",
        len(pairs),
    )  # fmt: skip


def clock() -> float:
    """Seconds, of the processor where one thread of it is all that works."""
    alone = DEVICE.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def on_device(batch: int, pixels: int = 224, classes: int = 1000) -> tuple[Tensor, Tensor]:
    """Images and class numbers."""
    images, targets = torch.randn(batch, 3, pixels, pixels), torch.randint(0, classes, (batch,))
    return images.to(DEVICE), targets.to(DEVICE)


def step_of(
    network: nn.Module, arch: Arch | Callable[[], Arch] | None, batch: int = BATCH, pixels: int = 224
) -> Callable[[], None]:
    """A training step: forward, loss, backward, AdamW."""
    images, targets = on_device(batch, pixels)
    network.to(DEVICE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    network.train()

    def step() -> None:
        chosen = arch() if callable(arch) else arch
        logits = network(images) if chosen is None else network(images, chosen)
        functional.cross_entropy(logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def supernet_step(rounds: int) -> Row:
    arch = SPACE.middle()
    supernet = Supernet(SPACE)
    model = extract(supernet, arch)
    return paired(
        "supernet step, fixed Arch",
        "extracted Model",
        ">= 0.90",
        step_of(supernet, arch),
        step_of(model, None),
        rounds,
    )


def host_step(rounds: int) -> Row:
    """What a GPU waits for: 12 blocks of width 192 at batch 1, cut from a Supernet that is little wider, so that both
    sides move about the same data."""
    space = replace(NARROW, embed_dims=(192, 200), num_heads=(3,), mlp_ratios=(4.0,), depths=(12,))
    return _host(space, "host time of a step (time)", "<= 1.25", rounds)


def host_tiny(rounds: int) -> Row:
    """The smallest Arch of AutoFormer's tiny space; gradients and moments of the Supernet are 1.7 times as large."""
    return _host(NARROW, "the same, smallest of tiny (time)", "", rounds)


def _host(space: AutoFormerSpace, name: str, target: str, rounds: int) -> Row:
    arch, supernet = space.smallest(), Supernet(space)
    model = extract(supernet, arch)
    keep_freed_memory()
    ours, other = (step_of(network, chosen, 1, 32) for network, chosen in ((supernet, arch), (model, None)))
    return inverted(paired(name, "extracted Model", target, ours, other, 20 * rounds))


def host_fresh(rounds: int) -> Row:
    """The same with an Arch that was never seen before, whose skeleton is made too; against the same Arch again."""
    keep_freed_memory()
    row = fresh_arch(5 * rounds, NARROW, 1, 32)
    return replace(inverted(row), name="host time, a fresh Arch (time)", target="")


def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MB that were freed, as it does after any large tensor and a GPU's allocator
    always does; else each step of so small a net gets its gradients from the kernel page by page."""
    torch.empty(2**25 - 2**13, dtype=torch.uint8)


def inverted(row: Row) -> Row:
    """The row with times instead of rates in its ratio."""
    return replace(row, ratio=1 / row.ratio, low=1 / row.high, high=1 / row.low)


def relative_step(rounds: int) -> Row:
    arch = SPACE.middle()
    plain = replace(arch, relative_position=0)
    return paired(
        "step with 2-D relative positions",
        "the same Arch without",
        ">= 0.75",
        step_of(build(arch), None),
        step_of(build(plain), None),
        rounds,
    )


def fresh_arch(rounds: int, space: Space = SPACE, batch: int = BATCH, pixels: int = 224) -> Row:
    """Random Archs cost more or less than a fixed one, so each round runs a fresh one and then the same again."""
    supernet = Supernet(space)
    rng = random.Random(0)
    current = [space.middle()]
    step = step_of(supernet, lambda: current[0], batch, pixels)
    step()
    pairs = []
    for _ in range(rounds):
        current[0] = space.sample(rng)
        seconds = []
        for _ in range(3):  # fresh, then twice known: the second known run is the other side
            start = clock()
            step()
            wait()
            seconds.append(clock() - start)
        pairs.append((seconds[0], statistics.mean(seconds[1:])))
    return row_of("a fresh random Arch", "the same Arch again", ">= 0.90", pairs)


def several_archs(rounds: int, k: int = 4) -> Row:
    """k Archs on slices of one batch, against k steps of a k-th of the batch."""
    supernet = Supernet(SPACE).to(DEVICE)
    rng = random.Random(0)
    archs = [SPACE.sample(rng) for _ in range(k)]
    images, targets = on_device(BATCH)
    optimizer = torch.optim.AdamW(supernet.parameters(), lr=1e-4, fused=True)
    part = BATCH // k

    def run(step_each: bool) -> Callable[[], None]:
        def body() -> None:
            for i, arch in enumerate(archs):
                rows = slice(i * part, (i + 1) * part)
                functional.cross_entropy(supernet(images[rows], arch), targets[rows]).backward()
                if step_each or i == k - 1:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)

        return body

    return paired(
        f"{k} Archs in one step", f"{k} steps of a {k}th batch", ">= 1.00", run(False), run(True), rounds
    )


def fresh_unified(rounds: int) -> Row:
    """Modules of several mixers, stems and reductions are made anew."""
    row = fresh_arch(8 * rounds, UNIFIED, 64, 32)
    return replace(row, name="the same, unified Space")


def scoring(rounds: int, space: Space = SPACE, batch: int = 32, pixels: int = 224) -> Row:
    arch = space.middle()
    supernet = Supernet(space).to(DEVICE).eval()
    model = extract(supernet, arch)
    batches = [on_device(batch, pixels) for _ in range(2)]
    row = paired(
        "scoring an Arch (time)",
        "validating its Model",
        "<= 1.05",
        lambda: evaluate(supernet, batches, arch),
        lambda: evaluate(model, batches),
        rounds,
    )
    return inverted(row)


def scoring_unified(rounds: int) -> Row:
    row = scoring(2 * rounds, UNIFIED, 256, 32)
    return replace(row, name="the same, unified Space (time)")


def counting(rounds: int) -> Row:
    arch = SPACE.middle()
    meta = torch.empty(1, 3, 224, 224, device="meta")
    model = build(arch, device="meta")

    def torch_counter() -> None:
        with FlopCounterMode(display=False):
            model(meta)

    def ours() -> None:
        for _ in range(1000):
            count(arch)

    row = paired("counting an Arch", "torch's flop counter", ">= 1000", ours, torch_counter, rounds)
    return replace(
        row, ratio=row.ratio * 1000, low=row.low * 1000, high=row.high * 1000, ours=f"{row.ours} per 1000"
    )


def cost_table(rounds: int, space: Space = SPACE, low: float = 1.60e9) -> Row:
    """Archs a second that are drawn, costed and kept when within a 1 % window; one core."""
    table, rng = space.cost_table(), np.random.default_rng(0)
    n, rates = 100_000, []
    for _ in range(max(3, rounds)):
        start = clock()
        macs = table.costs(space.random_matrix(n, rng))["macs"]
        kept = int(((macs >= low) & (macs <= 1.01 * low)).sum())
        rates.append(n / (clock() - start))
    rates.sort()
    return Row(
        "Archs/s drawn and costed", f"a 1 % window kept {kept} of {n}", ">= 100000", statistics.median(rates), rates[0],
        rates[-1], "", "", len(rates),
    )  # fmt: skip


def table_unified(rounds: int) -> Row:
    return replace(cost_table(rounds, UNIFIED, 10e6), name="the same, unified Space")


def deit(keeps: dict[int, int], selector: str | None = None) -> Arch:
    """The shape of DeiT-Ti, with fewer patches from some blocks on."""
    blocks = [Block(num_heads=3, head_dim=64, mlp_hidden=768, keep=keeps.get(index)) for index in range(12)]
    stages = (Stage(embed_dim=192, blocks=tuple(blocks)),)
    return Arch(image_size=224, patch_size=16, stages=stages, selector=selector)


WHOLE, DYNAMIC = deit({}), deit({3: 137, 6: 96, 9: 67}, "predictor")


def masked(rounds: int) -> Row:
    """In training all tokens stay, and attention behind the first selection has a mask with a gradient."""
    return paired(
        "step that keeps 0.7 at 3 places",
        "DeiT-Ti, 197 tokens",
        ">= 0.75",
        step_of(build(DYNAMIC), None),
        step_of(build(WHOLE), None),
        rounds,
    )


def gathered(rounds: int) -> Row:
    """In evaluation the tokens are gone."""
    images, _ = on_device(BATCH)

    def pass_of(arch: Arch) -> Callable[[], None]:
        model = build(arch).to(DEVICE).eval()

        def forward() -> None:
            with torch.no_grad():
                model(images)

        return forward

    row = paired(
        "evaluation keeping 0.7 (time)",
        "DeiT-Ti, 197 tokens",
        "<= 0.70",
        pass_of(DYNAMIC),
        pass_of(WHOLE),
        rounds,
    )
    return inverted(row)


MEMORY = """
import torch
from torch.nn import functional
from vitnas.space import autoformer
from vitnas.supernet import Supernet
from vitnas.model import build
def kib(word):  # of this process's own image; getrusage would count the parent that was forked
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(word + ":"))
torch.set_num_threads(1)
space = autoformer("tiny")
images, targets = torch.randn(16, 3, 224, 224), torch.randint(0, 1000, (16,))
start = kib("VmRSS")
network = {"supernet": lambda: Supernet(space), "static": lambda: build(space.largest())}[KIND]()
arch = (space.largest(),) if KIND == "supernet" else ()
optimizer = torch.optim.AdamW(network.parameters(), fused=True)
for _ in range(2):
    functional.cross_entropy(network(images, *arch), targets).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(kib("VmHWM") - start)
"""


def memory(rounds: int) -> Row:
    """Peak memory of weights, optimizer and two steps in a fresh process: supernet (largest Arch), that Model."""
    peaks: dict[str, float] = {}
    for kind in ("supernet", "static"):
        code, found = MEMORY.replace("KIND", repr(kind)), []
        for _ in range(min(3, rounds)):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            found.append(int(done.stdout) / 1024)
        peaks[kind] = statistics.median(found)
    ratio = peaks["supernet"] / peaks["static"]
    return Row(
        "memory of a supernet step", "largest Model's step", "<= 1.15", ratio, ratio, ratio,
        f"{peaks['supernet']:.0f} MiB", f"{peaks['static']:.0f} MiB", min(3, rounds),
    )  # fmt: skip


ROWS: dict[str, Callable[[int], Row]] = {
    "supernet": supernet_step,
    "host": host_step,
    "host_tiny": host_tiny,
    "host_fresh": host_fresh,
    "relative": relative_step,
    "fresh": fresh_arch,
    "fresh_unified": fresh_unified,
    "several": several_archs,
    "scoring": scoring,
    "scoring_unified": scoring_unified,
    "masked": masked,
    "gathered": gathered,
    "counting": counting,
    "table": cost_table,
    "table_unified": table_unified,
    "memory": memory,
}


def main(
    rows: dict[str, Callable[[int], Row]] = ROWS, table: str = "spine", doc: str | None = __doc__
) -> None:
    """The command line of a table; other benchmarks bring their own rows."""
    global DEVICE
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=rows, default=list(rows))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", type=torch.device, default=DEVICE, help="of the networks; cpu or cuda")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    DEVICE = options.device
    machine = environment()
    out = (
        options.out
        or Path(__file__).parent
        / "results"
        / f"{table}_{DEVICE.type}_torch{torch.__version__.partition('+')[0]}.csv"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not out.exists()
    with open(out, "a", newline="") as stream:
        writer = csv.writer(stream)
        if fresh:
            writer.writerow(
                "date,name,against,target,ratio,low,high,ours,other,rounds,threads,torch,cpu,cores".split(",")
            )
        for name in options.only:
            row = rows[name](options.rounds)
            print(
                f"{row.name:<34} / {row.against:<30} {row.ratio:>12,.3f} ({row.low:,.3f}-{row.high:,.3f}) {row.target}",
                flush=True,
            )
            writer.writerow(
                [
                    datetime.now(UTC).date(), row.name, row.against, row.target, f"{row.ratio:.4f}", f"{row.low:.4f}",
                    f"{row.high:.4f}", row.ours, row.other, row.rounds, torch.get_num_threads(), torch.__version__,
                    machine.get("cpu", ""), machine.get("cores", ""),
                ]
            )  # fmt: skip
            stream.flush()


if __name__ == "__main__":
    main()
