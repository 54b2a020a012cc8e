"""Searchers on planted scores whose best Arch is known nearly: how near to it is the best of 200 scored Archs?

    python benchmarks/searchers.py [--trials 200] [--seeds 3] [--searchers random evolution tpe predictor]

The score of an Arch is planted: each option of each gene is worth something (wider and deeper more, with a
wrinkle), genes of one block and neighbouring blocks work together, and there is less to gain from more. The budget
is the median of the MACs of random Archs. The optimum is the best that a climb by single genes finds from many
starts, on the planted function itself. No image is looked at.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import numpy as np

from vitnas.arch import Arch
from vitnas.budget import Budget
from vitnas.searching import SEARCHERS, Goal, Study, search
from vitnas.space import Matrix, Space, autoformer, mixer_space, vit_resnas, vitas

SPACES: dict[str, Callable[[], Space]] = {
    "autoformer": lambda: autoformer("tiny"),
    "vit_resnas": lambda: vit_resnas("sr_tiny_mh"),
    "vitas": lambda: vitas("1g"),
    "mixers": lambda: mixer_space("small", image_size=32, patch_size=4),
}
STARTS, CLIMBS = 24, 400


class Planted:
    """Scores from 0 to 1 of a Space's Archs."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, rng = space, np.random.default_rng(seed)
        self.worth = []
        for gene in space.genes:
            n = len(gene.options)
            rising = np.linspace(-1, 1, n) * rng.uniform(0.2, 1.0) if n > 1 else np.zeros(1)
            self.worth.append((rising + rng.normal(0, 0.5, n)) * (2.0 if gene.structural else 1.0))
        genes = len(space.genes)
        self.pairs = [(i, i + 1) for i in range(genes - 1)] + [(i, (i * 7) % genes) for i in range(genes)]
        self.together = [
            rng.normal(0, 0.3, (len(space.genes[i].options), len(space.genes[j].options)))
            for i, j in self.pairs
        ]
        raw = self._raw(space.random_matrix(4096, np.random.default_rng(seed + 1)))
        self.middle, self.spread = float(raw.mean()), float(raw.std())

    def _raw(self, genes_NG: Matrix) -> np.ndarray:
        active_NG = self.space.active_matrix(genes_NG)
        total_N = sum(worth[genes_NG[:, i]] * active_NG[:, i] for i, worth in enumerate(self.worth))
        for (i, j), worth in zip(self.pairs, self.together, strict=True):
            total_N = total_N + worth[genes_NG[:, i], genes_NG[:, j]] * active_NG[:, i] * active_NG[:, j]
        return np.asarray(total_N)

    def __call__(self, genes_NG: Matrix) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-(self._raw(genes_NG) - self.middle) / self.spread)))

    def of(self, arch: Arch) -> dict[str, float]:
        return {"accuracy": float(self(np.array([self.space.encode(arch)]))[0])}


def optimum(goal: Goal, planted: Planted, seed: int) -> float:
    """The best that climbing by single genes finds, from many starts."""
    space, rng, best = goal.space, random.Random(seed), 0.0
    for _ in range(STARTS):
        here = goal.draw(rng, ())
        assert here is not None
        value = float(planted(np.array([here]))[0])
        for _ in range(CLIMBS):
            rows = np.tile(np.array(here), (sum(space.num_options), 1))
            places = np.repeat(np.arange(len(here)), space.num_options)
            rows[np.arange(len(rows)), places] = [o for n in space.num_options for o in range(n)]
            twice = rows.copy()  # and pairs: one gene more at random
            other = np.array([rng.randrange(len(here)) for _ in rows])
            twice[np.arange(len(rows)), other] = [rng.randrange(space.num_options[g]) for g in other]
            rows = space.canonical_matrix(np.concatenate([rows, twice]))
            rows = rows[goal.meets(rows)]
            values = planted(rows)
            if values.max() <= value:
                break
            here, value = tuple(rows[int(values.argmax())].tolist()), float(values.max())
        best = max(best, value)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--spaces", nargs="*", default=[*SPACES])
    parser.add_argument("--searchers", nargs="*", default=["random", "evolution", "tpe", "predictor"])
    args = parser.parse_args()
    print(f"| space | optimum | {' | '.join(args.searchers)} | of what evolution leaves, predictor closes |")
    for name in args.spaces:
        space = SPACES[name]()
        drawn = space.random_matrix(2048, np.random.default_rng(0))
        budget = Budget.parse(f"macs<={int(np.median(space.cost_table().costs(drawn)['macs']))}")
        found: dict[str, list[float]] = {searcher: [] for searcher in args.searchers}
        tops, took = [], dict.fromkeys(args.searchers, 0.0)
        for seed in range(args.seeds):
            planted = Planted(space, seed)
            tops.append(optimum(Goal(space, budget), planted, seed))
            for searcher in args.searchers:
                start = time.process_time()
                study = search(
                    Study.open(space, budget, seed=seed),
                    planted.of,
                    searcher=SEARCHERS[searcher].sized(args.trials),
                    num_trials=args.trials,
                )
                took[searcher] += time.process_time() - start
                found[searcher].append(study.best().values["accuracy"])
        cells = [
            f"{np.mean(found[s]):.3f} ({np.std(found[s]):.3f}; {took[s] / args.seeds:.0f} s)" for s in found
        ]
        closed = ""
        if {"evolution", "predictor"} <= set(found):
            left = np.array(tops) - np.array(found["evolution"])
            closed = (
                f"{np.mean(np.array(found['predictor']) - np.array(found['evolution'])) / left.mean():.2f}"
            )
        print(f"| {name} | {np.mean(tops):.3f} | {' | '.join(cells)} | {closed} |", flush=True)


if __name__ == "__main__":
    main()
