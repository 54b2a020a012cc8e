"""What orders trained networks: rankers held against published accuracies of AutoFormer-T nets; nothing is trained.

    python benchmarks/rankers.py PATH/autoformer_tiny_100.json [--fitted 20] [--splits 100]

The file (ViT-Bench-101, published with Auto-Prox, AAAI 2024) has 100 nets of AutoFormer's tiny Space, each trained
on three data sets, with the score that the published ImageNet supernet gives it. Kendall's tau-b over the nets that
the predictor was not fitted to, mean over random splits (standard deviation between them); all rankers are judged
on the same nets. Behind the bar within quartiles of MACs: the mean of the four, where MACs alone say little.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from vitnas.errors import UserError
from vitnas.searching import rank_correlation
from vitnas.searching.predictor import Features, Predictor, normal_scores
from vitnas.space import Genes, Space, autoformer
from vitnas.stages.ranking import expressivity

SETS = {"CIFAR-100": "c100_kd_acc", "Flowers": "flower_kd_acc", "Chaoyang": "chaoyang_kd_acc"}
QUARTILES = 4


def genes_of(space: Space, row: dict[str, Any]) -> Genes:
    """The genes of a net of the file."""
    said = {"embed_dim": row["embed_dim"], "depth": row["depth"]}
    for name in ("num_heads", "mlp_ratio"):
        said |= {f"{name}.{i}": value for i, value in enumerate(row[name])}
    return space.canonical([gene.options.index(said.get(gene.name, gene.options[0])) for gene in space.genes])


def process(features_NF: np.ndarray, scores_N: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A Gaussian process over structure, with noise, whose lengths are those of the largest likelihood."""
    kernel = ConstantKernel() * RBF(3.0, (0.5, 30.0)) + WhiteKernel(0.5, (1e-2, 2.0))
    fitted = GaussianProcessRegressor(kernel).fit(features_NF, normal_scores(scores_N))
    return lambda asked_NF: np.asarray(fitted.predict(asked_NF))


def tau(one: np.ndarray, other: np.ndarray) -> float:
    """Kendall's tau-b; 0 where one side has no order."""
    try:
        return float(rank_correlation(one.tolist(), other.tolist())["kendall_tau"])
    except UserError:
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--fitted", type=int, default=20)
    parser.add_argument("--splits", type=int, default=100)
    args = parser.parse_args()
    rows, space = json.loads(args.file.read_text()), autoformer("tiny", num_classes=100)
    genes = np.array([genes_of(space, row) for row in rows])
    macs = space.cost_table().costs(genes)["macs"].astype(float)
    known = {
        "inherited score": np.array([row["imagenet_super_acc"] for row in rows]),
        "MACs": macs,
        "depth": np.array([float(row["depth"]) for row in rows]),
        "width": np.array([float(row["embed_dim"]) for row in rows]),
        "expressivity at initialisation": np.array([expressivity(space.decode(each)) for each in genes]),
    }
    features = Features(space)
    structure, quartile = features.of(genes)[0], np.argsort(np.argsort(macs)) * QUARTILES // len(rows)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, column in SETS.items():
        trained = np.array([row[column] for row in rows])
        rng = np.random.default_rng(0)
        for _ in range(args.splits):
            order = rng.permutation(len(rows))
            seen, new = order[: args.fitted], order[args.fitted :]
            rankers = {**known, "predictor": Predictor.fit(features, genes[seen], trained[seen])(genes)}
            rankers["Gaussian process"] = process(structure[seen], trained[seen])(structure)
            rankers["mean of all"] = sum(normal_scores(score) for score in rankers.values())
            rankers["mean of predictor and MACs"] = normal_scores(rankers["predictor"]) + normal_scores(macs)
            for ranker, score in rankers.items():
                parts = [new[quartile[new] == q] for q in range(QUARTILES)]
                within = [tau(score[part], trained[part]) for part in parts if len(part) > 2]
                pair = (tau(score[new], trained[new]), float(np.mean(within)))
                found.setdefault(ranker, {}).setdefault(name, []).append(pair)
    print(f"| ranker | {' | '.join(f'{name}, all | within quartiles' for name in SETS)} |")
    for ranker, by_set in found.items():
        cells = [
            f"{mean:.2f} ({spread:.2f})"
            for pairs in by_set.values()
            for mean, spread in zip(np.mean(pairs, 0), np.std(pairs, 0), strict=True)
        ]
        print(f"| {ranker} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
