"""What ViTAS's ways of sharing bring on the handwritten digits (1,797 real images of 8x8 pixels).

    python benchmarks/evidence_vitas.py [--only prefix bilateral ...] [--seeds 3] [--epochs 30] [--out FILE.json]

Per seed, `--archs` random Archs within a window of MACs are trained by themselves for `--alone` epochs. Then, for every
way of sharing, a supernet is trained and asked for the same Archs' accuracy (rank correlation of the two, Spearman and
Kendall; both on the holdout split), and the best of a random search of `--trials` Archs within the window is trained by
itself (accuracy on the test split), as is a hand-scaled DeiT of the winner's MACs. All ways have equal epochs; a
bilateral epoch takes about twice the time, which the table shows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.model import build
from vitnas.sample import Fixed, Identity, Sampler, identity_probability
from vitnas.searching import rank_correlation, search
from vitnas.space import vitas
from vitnas.stages.hand_scaled import hand_scaled
from vitnas.supernet import Supernet, make_sharing
from vitnas.train import AllSides, Classification, TrainConfig, evaluate, fit

AUGMENT, BATCH, WINDOW = Augment(rotate=10.0, zoom=(0.9, 1.1)), 64, "200K<=macs<=400K"
SPACE = vitas("micro", image_size=8, num_classes=10, in_chans=1, num_slots=4)
WAYS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "bilateral": {"coupling": "bilateral"},
    "cyclic": {"coupling": "cyclic"},
    "prefix, private tokens": {"private_tokens": True},
    "prefix, private heads": {"private_heads": True},
    "prefix, private both": {"private_tokens": True, "private_heads": True},
}


def train(network: nn.Module, data: Data, sampler: Sampler, epochs: float, seed: int) -> float:
    """Train in place; returns the seconds."""
    config = TrainConfig(epochs=epochs, lr=3e-3, warmup_epochs=min(3, epochs / 4), monitor_every=0)
    batches = TrainBatches(data.train, AUGMENT, batch_size=BATCH, seed=seed)
    start = time.monotonic()
    fit(network, AllSides(Classification()), sampler, batches, config=config, seed=seed)
    return time.monotonic() - start


def alone(arch: Arch, data: Data, scored: EvalBatches, epochs: float, seed: int) -> float:
    model = build(arch, generator=torch.Generator().manual_seed(seed))
    train(model, data, Fixed(), epochs, seed)
    return evaluate(model, scored).accuracy


def one_seed(seed: int, ways: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    data = open_data(DataConfig(dataset="digits", holdout=0.2, batch_size=BATCH, seed=0))
    holdout = EvalBatches(data.holdout, batch_size=512)
    prob, rng = identity_probability(SPACE, WINDOW, seed=seed).prob, random.Random(seed)
    budget, archs = Budget.parse(WINDOW), list[Arch]()
    while len(archs) < options.archs:
        arch = SPACE.sample(rng)
        if arch not in archs and not budget.misses(count(arch)):
            archs.append(arch)
    trained = [alone(arch, data, holdout, options.alone, seed) for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        test = EvalBatches(data.open_test(Path(folder) / "reads.json", purpose="evidence"), batch_size=512)
    rows = []
    for way in ways:
        sharing = make_sharing(SPACE, **WAYS[way])
        supernet = Supernet(SPACE, sharing=sharing, generator=torch.Generator().manual_seed(seed))
        seconds = train(supernet, data, Identity(SPACE, prob), options.epochs, seed)

        def score(arch: Arch, supernet: Supernet = supernet) -> dict[str, float]:
            return {"accuracy": evaluate(supernet, holdout, arch).accuracy}

        inherited = [score(arch)["accuracy"] for arch in archs]
        found = rank_correlation(inherited, trained)
        study = search(
            supernet, score, budget=WINDOW, searcher="random", num_trials=options.trials, seed=seed
        )
        best = study.best().arch
        plain = hand_scaled(best, Budget.parse(f"macs<={count(best).macs}"), SPACE.patch_sizes)
        rows.append(
            {
                "seed": seed, "way": way, "n_archs": len(archs), "spearman": found["spearman"],
                "kendall": found["kendall_tau"], "inherited_mean": statistics.mean(inherited),
                "winner_test": alone(best, data, test, options.alone, seed), "winner_macs": count(best).macs,
                "winner": best.describe(), "hand_scaled_test": alone(plain, data, test, options.alone, seed),
                "hand_scaled_macs": count(plain).macs, "supernet_seconds": seconds,
            }
        )  # fmt: skip
        print(seed, way, {k: v for k, v in rows[-1].items() if isinstance(v, float)}, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds."""
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        told = []
        for name in ("spearman", "kendall", "winner_test", "hand_scaled_test", "supernet_seconds"):
            values = [row[name] for row in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            told.append(f"{name} {statistics.mean(values):.3f} sd {spread:.3f}")
        print(f"{way:<24} ({len(mine)} seeds)  {'  '.join(told)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--archs", type=int, default=20)
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--alone", type=float, default=10)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        rows += one_seed(seed, options.only, options)
        if options.out is not None:
            settings = {key: str(value) for key, value in vars(options).items()}
            options.out.write_text(
                json.dumps({"settings": settings, "window": WINDOW, "rows": rows}, indent=1)
            )
    table(rows)


if __name__ == "__main__":
    main()
