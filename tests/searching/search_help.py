"""Small Spaces and a cheap evaluator for the search tests, and the script that the killed processes run."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from vitnas.arch import Arch
from vitnas.searching import Evolution, Study, Trial, search
from vitnas.space import AutoFormerSpace

MICRO = AutoFormerSpace(
    name="micro",
    image_size=16,
    patch_size=4,
    num_classes=10,
    embed_dims=(32, 48, 64),
    depths=(2, 3, 4),
    num_heads=(1, 2, 3),
    mlp_ratios=(1.0, 2.0, 3.0),
    head_dim=8,
    relative_position=2,
)
# 12 different Archs: small enough to be tried out.
DOZEN = AutoFormerSpace(
    name="dozen",
    image_size=16,
    patch_size=4,
    num_classes=10,
    embed_dims=(32, 48),
    depths=(1, 2),
    num_heads=(2,),
    mlp_ratios=(1.0, 2.0),
    head_dim=8,
    relative_position=2,
)
BUDGET = "macs<=700K"


class Stub(nn.Module):
    """Stands for a Model; remembers its Arch."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = arch


def score(arch: Arch) -> dict[str, float]:
    """Deterministic: wide and deep is better, with a wrinkle of its own for every Arch."""
    width = sum(block.mlp_hidden + 8 * block.num_heads for block in arch.blocks) + arch.embed_dim
    return {"accuracy": width / (width + 400) + 0.01 * random.Random(arch.id).random()}


def evolution() -> Evolution:
    return Evolution(population=10, parents=4, mutants=5, crossovers=4, generations=3)


def told(study: Study) -> list[tuple[tuple[int, ...], Mapping[str, float]]]:
    return [(trial.genes, trial.values) for trial in study.scored()]


def main(storage: str, num_trials: int, die_after: int, pause_s: float, name: str = "search") -> None:
    """Search; after `die_after` own Trials kill this very process inside the next evaluation (-1: never)."""
    done = 0

    def evaluator(arch: Arch) -> dict[str, float]:
        if done == die_after:
            dying = "dying" if "://" in storage else storage.removeprefix("journal:") + ".dying"
            Path(dying).write_text(arch.id)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause_s)
        return score(arch)

    def count(study: Study, trial: Trial) -> None:
        nonlocal done
        done += 1

    search(
        Study.open(MICRO, BUDGET, storage=storage, name=name),
        evaluator,
        searcher=evolution(),
        num_trials=num_trials,
        on_trial=count,
    ).close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:])
