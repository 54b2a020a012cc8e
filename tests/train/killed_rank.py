"""Run by test_distributed.py as one of two ranks, as srun would start it: trains until it is killed or hears of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from two_ranks import ByRank, supernet

from vitnas.data import Augment, TrainBatches, synthetic
from vitnas.errors import UserError
from vitnas.train import Classification, Engine, Silent, TrainConfig, fit


class Notes(Silent):
    """Prints what is worth keeping."""

    def note(self, text: str) -> None:
        print(text, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine = Engine(cpu=True)
    data = synthetic(num_classes=4, image_size=8, n=64, seed=0)
    loader = TrainBatches(data.train, Augment(), batch_size=8, seed=0, rank=engine.rank, world=engine.world)
    config = TrainConfig(epochs=100_000, monitor_every=0, log_every=1, checkpoint_minutes=0, warmup_epochs=0)
    try:
        fit(
            supernet(),
            Classification(),
            ByRank(engine.rank),
            loader,
            config=config,
            engine=engine,
            folder=Path(sys.argv[1]),
            progress=Notes(),
        )
    except UserError as error:
        print(f"{time.time()} {error}", flush=True)
