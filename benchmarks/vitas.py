"""ViTAS's parts against the plain supernet: ways of sharing, several patch sizes, the search for the identity.

    python benchmarks/vitas.py [--only NAME ...] [--rounds N] [--threads N] [--out results.csv]

All rows but the last compare training steps (forward, loss, backward, AdamW) of the same Arch on the same batch of
224-pixel images in the 1g space; rounds alternate, and rows are times (lower is better).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from spine import Row, inverted, main, paired

from vitnas.arch import Arch
from vitnas.sample import identity_probability
from vitnas.space import vitas
from vitnas.supernet import Supernet, make_sharing
from vitnas.supernet.sharing import Coupled
from vitnas.train import Batch, Classification, CombinedSides
from vitnas.train.task import read_views

SPACE = vitas("1g")
BATCH = 8


def middling(patch_size: int) -> Arch:
    """Half of every width, half of the slots."""
    genes = [n // 2 for n in SPACE.num_options]
    for index, gene in enumerate(SPACE.genes):
        if gene.name == "patch_size":
            genes[index] = gene.options.index(patch_size)
        elif gene.name.startswith("keep."):
            genes[index] = int(gene.name.partition(".")[2]) % 2
    return SPACE.decode(genes)


def trainer(coupling: Coupled = "prefix", *, private: bool = True) -> Callable[[list[Arch]], None]:
    """Training steps on one supernet, one per Arch that is given."""
    sharing = make_sharing(SPACE, coupling, private_tokens=private, private_heads=private)
    supernet = Supernet(SPACE, sharing=sharing).train()
    optimizer = torch.optim.AdamW(supernet.parameters(), lr=1e-4, fused=True)
    batch = Batch((torch.randn(BATCH, 3, 224, 224),), torch.randint(0, 1000, (BATCH,)))
    task = CombinedSides(Classification())

    def steps(archs: list[Arch]) -> None:
        for arch in archs:
            outputs = read_views(supernet, batch.views, task.wants, arch=arch)
            task(outputs, batch, {})["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return steps


def coupled(coupling: Coupled, target: str) -> Callable[[int], Row]:
    def row(rounds: int) -> Row:
        archs = [middling(16)]
        ours, prefix = partial(trainer(coupling), archs), partial(trainer(), archs)
        return inverted(paired(f"{coupling} step (time)", "prefix step", target, ours, prefix, rounds))

    return row


def mixed(rounds: int) -> Row:
    """Steps that change the patch size every time, against the same steps of the same supernet sorted by patch size."""
    archs = [middling(size) for size in SPACE.patch_sizes]
    steps, each = trainer(), 3
    ours, alone = partial(steps, archs * each), partial(steps, [arch for arch in archs for _ in range(each)])
    return inverted(
        paired("mixed patch sizes (time)", "each patch size alone", "<= 1.0", ours, alone, 2 * rounds)
    )


def identity(rounds: int) -> Row:
    """Seconds of the whole search, 1,000 draws per probability, for a window far from where it starts."""
    found = []
    for seed in range(max(3, rounds)):
        space = vitas("1g")  # with its cost table still to be made
        start = time.perf_counter()
        identity_probability(space, "0.3G<=macs<=0.32G", seed=seed)
        found.append(time.perf_counter() - start)
    found.sort()
    median = statistics.median(found)
    return Row(
        "identity probability (seconds)", "1,000 draws per step", "< 1", median, found[0], found[-1],
        f"{median:.4f} s", "", len(found),
    )  # fmt: skip


ROWS: dict[str, Callable[[int], Row]] = {
    "bilateral": coupled("bilateral", "<= 2.1"),
    "cyclic": coupled("cyclic", "<= 1.1"),
    "patches": mixed,
    "identity": identity,
}

if __name__ == "__main__":
    main(ROWS, "vitas", __doc__)
