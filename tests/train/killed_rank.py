"""Run by test_distributed.py as one of several ranks, as srun would start it: trains until it is killed or hears of it.

With a number of epochs it ends by itself, late by chance at every step, and prints what its weights are.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
from pathlib import Path

import torch
from two_ranks import ARCHS, supernet

from vitnas.data import Augment, TrainBatches, synthetic
from vitnas.errors import UserError
from vitnas.sample import Draw
from vitnas.train import Classification, Engine, Silent, TrainConfig, fit


class ByRank:
    """Ranks train one Arch or the other, and some are late."""

    def __init__(self, rank: int, late_s: float) -> None:
        self.rank, self.late_s = rank, late_s

    def draw(self, rng: object) -> list[Draw]:
        time.sleep(random.uniform(0, self.late_s))
        return [Draw(arch=ARCHS[self.rank % 2])]


class Notes(Silent):
    """Prints what is worth keeping."""

    def note(self, text: str) -> None:
        print(text, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine = Engine(cpu=True)
    data = synthetic(num_classes=4, image_size=8, n=64, seed=0)
    loader = TrainBatches(data.train, Augment(), batch_size=8, seed=0, rank=engine.rank, world=engine.world)
    epochs = float(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    network = supernet()
    config = TrainConfig(epochs=epochs, monitor_every=0, log_every=1, checkpoint_minutes=0, warmup_epochs=0)
    try:
        fit(
            network,
            Classification(),
            ByRank(engine.rank, 0.02 * (epochs < 100_000)),
            loader,
            config=config,
            engine=engine,
            folder=Path(sys.argv[1]),
            progress=Notes(),
        )
    except UserError as error:
        print(f"{time.time()} {error}", flush=True)
    else:
        state = b"".join(value.numpy().tobytes() for value in network.state_dict().values())
        print(hashlib.sha256(state).hexdigest(), flush=True)
