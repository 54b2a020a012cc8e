"""What ViTAS's ways of sharing bring on the handwritten digits (1,797 real images of 8x8 pixels).

    python benchmarks/evidence_vitas.py [--only prefix bilateral ...] [--seeds 3] [--epochs 30] [--out FILE.json]

Per seed, `--archs` random Archs within a window of MACs are trained by themselves for `--alone` epochs. Then, for every
way of sharing, a supernet is trained and asked for the same Archs' accuracy (rank correlation of the two, Spearman and
Kendall; both on the holdout split), and the best of a random search of `--trials` Archs within the window is trained by
itself (accuracy on the test split), as is a hand-scaled DeiT of the winner's MACs. All ways have equal epochs; a
bilateral epoch takes about twice the time, which the table shows. Bilateral supernets are scored by both sides.
`--out` is written as results come, and what it holds is not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.errors import UserError
from vitnas.model import build
from vitnas.runs import read_json, write_json
from vitnas.sample import Fixed, Identity, Sampler, identity_probability
from vitnas.searching import Study, rank_correlation, search
from vitnas.space import vitas
from vitnas.stages.hand_scaled import hand_scaled
from vitnas.stages.run import differences
from vitnas.supernet import Supernet, make_sharing
from vitnas.train import Classification, CombinedSides, TrainConfig, evaluate, fit

AUGMENT, BATCH, WINDOW = Augment(rotate=10.0, zoom=(0.9, 1.1)), 64, "200K<=macs<=400K"
SPACE = vitas("micro", image_size=8, num_classes=10, in_chans=1, num_slots=4)
WAYS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "bilateral": {"coupling": "bilateral"},
    "cyclic": {"coupling": "cyclic"},
    "prefix, private tokens": {"private_tokens": True},
    "prefix, private heads": {"private_heads": True},
    "prefix, private both": {"private_tokens": True, "private_heads": True},
    "bilateral, private both": {"coupling": "bilateral", "private_tokens": True, "private_heads": True},
    "cyclic, private both": {"coupling": "cyclic", "private_tokens": True, "private_heads": True},
}
SETTINGS = ("archs", "epochs", "alone", "trials")  # what rows of one file must share


def train(network: nn.Module, data: Data, sampler: Sampler, epochs: float, seed: int) -> float:
    """Train in place; returns the seconds."""
    config = TrainConfig(epochs=epochs, lr=3e-3, warmup_epochs=min(3, epochs / 4), monitor_every=0)
    batches = TrainBatches(data.train, AUGMENT, batch_size=BATCH, seed=seed)
    start = time.monotonic()
    fit(network, CombinedSides(Classification()), sampler, batches, config=config, seed=seed)
    return time.monotonic() - start


def alone(arch: Arch, data: Data, scored: EvalBatches, epochs: float, seed: int) -> float:
    model = build(arch, generator=torch.Generator().manual_seed(seed))
    train(model, data, Fixed(), epochs, seed)
    return evaluate(model, scored).accuracy


class Kept:
    """The file of `--out`: written after every Arch and every way, so that a killed run goes on where it was.

    Rows of other settings are refused.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path | None = options.out
        settings = {name: getattr(options, name) for name in SETTINGS}
        settings |= {"window": WINDOW, "space": SPACE.to_json()["options"], "scoring": "mean of all sides"}
        self.content: dict[str, Any] = {"settings": json.loads(json.dumps(settings)), "alone": {}, "rows": []}
        if self.path is None or not self.path.exists():
            return
        known = read_json(self.path)
        if changed := differences(known.get("settings", {}), self.content["settings"]):
            raise UserError(
                f"{self.path} has rows of other settings ({'; '.join(changed)}). Use another --out."
            )
        self.content = known

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def has(self, seed: int, way: str) -> bool:
        return any((row["seed"], row["way"]) == (seed, way) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write()

    def trained(self, seed: int, archs: list[Arch], train_one: Callable[[Arch], float]) -> list[float]:
        """Accuracy of each Arch trained by itself."""
        known: dict[str, float] = self.content["alone"].setdefault(str(seed), {})
        for arch in archs:
            if arch.id not in known:
                known[arch.id] = train_one(arch)
                self._write()
        return [known[arch.id] for arch in archs]

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content)


def one_seed(seed: int, kept: Kept, options: argparse.Namespace) -> None:
    ways = [way for way in options.only if not kept.has(seed, way)]
    if not ways:
        return
    data = open_data(DataConfig(dataset="digits", holdout=0.2, batch_size=BATCH, seed=0))
    holdout = EvalBatches(data.holdout, batch_size=512)
    prob, rng = identity_probability(SPACE, WINDOW, seed=seed).prob, random.Random(seed)
    budget, archs = Budget.parse(WINDOW), list[Arch]()
    while len(archs) < options.archs:
        arch = SPACE.sample(rng)
        if arch not in archs and not budget.misses(count(arch)):
            archs.append(arch)
    trained = kept.trained(seed, archs, lambda arch: alone(arch, data, holdout, options.alone, seed))
    with tempfile.TemporaryDirectory() as folder:
        test = EvalBatches(data.open_test(Path(folder) / "reads.json", purpose="evidence"), batch_size=512)
    for way in ways:
        sharing = make_sharing(SPACE, **WAYS[way])
        supernet = Supernet(SPACE, sharing=sharing, generator=torch.Generator().manual_seed(seed))
        seconds = train(supernet, data, Identity(SPACE, prob), options.epochs, seed)

        def score(arch: Arch, supernet: Supernet = supernet) -> dict[str, float]:
            return {"accuracy": evaluate(supernet, holdout, arch).accuracy}

        inherited = [score(arch)["accuracy"] for arch in archs]
        found = rank_correlation(inherited, trained)
        study = search(
            Study.open(supernet.space, WINDOW, seed=seed), score, searcher="random", num_trials=options.trials
        )
        best = study.best().arch
        plain = hand_scaled(best, Budget.parse(f"macs<={count(best).macs}"))
        row = {
            "seed": seed, "way": way, "n_archs": len(archs), "spearman": found["spearman"],
            "kendall": found["kendall_tau"], "inherited_mean": statistics.mean(inherited),
            "winner_test": alone(best, data, test, options.alone, seed), "winner_macs": count(best).macs,
            "winner": best.describe(), "hand_scaled_test": alone(plain, data, test, options.alone, seed),
            "hand_scaled_macs": count(plain).macs, "hand_scaled": plain.describe(), "supernet_seconds": seconds,
        }  # fmt: skip
        kept.add(row)
        print(seed, way, {k: v for k, v in row.items() if isinstance(v, float)}, flush=True)


def table(rows: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds."""
    for way in [way for way in WAYS if any(row["way"] == way for row in rows)]:
        mine = [row for row in rows if row["way"] == way]
        told = []
        names = (
            "spearman",
            "kendall",
            "inherited_mean",
            "winner_test",
            "hand_scaled_test",
            "gain",
            "supernet_seconds",
        )
        for name in names:
            values = [
                row["winner_test"] - row["hand_scaled_test"] if name == "gain" else row[name] for row in mine
            ]
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
    try:
        kept = Kept(options)
    except UserError as error:
        parser.error(str(error))
    for seed in range(options.seeds):
        one_seed(seed, kept, options)
    table([row for row in kept.rows if row["way"] in options.only and row["seed"] < options.seeds])


if __name__ == "__main__":
    main()
