"""What swapping attention costs a trained ViT on the handwritten digits, and what a short distillation wins back.

    python benchmarks/evidence_swap.py [--seeds 3] [--epochs 40] [--recover-epochs 5] [--lr 1e-3] [--threads 1]
        [--out FILE.csv]

Per seed a timm ViT (4 blocks of width 32, 16 patches) is trained to its plateau; its accuracy after another quarter of
the epochs stands beside. Then all its attention is swapped for another mixer, small enough to hurt, and the swapped
network learns the trained one's logits from the images of the training split, without labels. Two controls get the
same distillation: a swapped network whose weights were never trained, and the trained one itself, untouched. All
accuracies are of a holdout split that none of them saw.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.model.swap import swap_attention
from vitnas.sample import Fixed
from vitnas.train import Classification, TrainConfig, evaluate, fit
from vitnas.train.imitate import SHORT, agreement, imitate

AUGMENT, BATCH = Augment(rotate=10.0, zoom=(0.9, 1.1)), 64
SIZES = {"nystrom": (2,), "performer": (4,), "linformer": (1,)}


def fresh_vit(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
    return VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, global_pool="avg", **sizes)


def train(model: nn.Module, data: Data, holdout: EvalBatches, epochs: int, seed: int) -> list[float]:
    """Train in place; accuracy after `epochs`, and after a quarter more, which says whether that was the plateau."""
    seen = []
    for more, rate in ((epochs, 4e-3), (epochs // 4, 1e-3)):
        batches = TrainBatches(data.train, AUGMENT, batch_size=BATCH, seed=seed)
        config = TrainConfig(epochs=more, lr=rate, warmup_epochs=1, monitor_every=0)
        fit(model, Classification(), Fixed(), batches, config=config, seed=seed)
        seen.append(evaluate(model, holdout).accuracy)
    return seen


def one_seed(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    data = open_data(DataConfig(dataset="digits", holdout=0.2, batch_size=BATCH, seed=0))
    holdout, rows = EvalBatches(data.holdout, batch_size=512), list[dict[str, Any]]()
    teacher = fresh_vit(seed)
    earlier, trained = train(teacher, data, holdout, options.epochs, seed)
    teacher.eval()
    print(f"seed {seed}: {earlier:.3f} trained, {trained:.3f} after a quarter more", flush=True)
    config = replace(SHORT, epochs=options.recover_epochs, lr=options.lr)

    def won_back(model: nn.Module) -> float:
        batches = TrainBatches(data.train, AUGMENT, batch_size=BATCH, seed=seed + 1)
        imitate(model, teacher, batches, config=config, seed=seed)
        return evaluate(model, holdout).accuracy

    same = won_back(copy.deepcopy(teacher))
    for mixer, sizes in SIZES.items():
        for size in sizes:
            generator = torch.Generator().manual_seed(seed)
            model = swap_attention(copy.deepcopy(teacher), mixer, size=size, generator=generator)
            control = swap_attention(fresh_vit(seed + 100), mixer, size=size, generator=generator)
            before, started = evaluate(model, holdout).accuracy, time.perf_counter()
            after = won_back(model)
            rows.append(
                {
                    "mixer": mixer, "size": size, "seed": seed, "n": len(data.holdout), "trained": trained,
                    "swapped": before, "recovered": after, "seconds": time.perf_counter() - started,
                    "agreement": agreement(model, teacher, holdout)[0], "from_scratch": won_back(control),
                    "untouched_distilled": same, "recover_epochs": options.recover_epochs, "lr": options.lr,
                }
            )  # fmt: skip
            told = {key: round(value, 3) for key, value in rows[-1].items() if isinstance(value, float)}
            print(seed, mixer, size, told, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--recover-epochs", type=float, default=SHORT.epochs)
    parser.add_argument("--lr", type=float, default=SHORT.lr)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for seed in range(options.seeds) for row in one_seed(seed, options)]
    print("\nmean (sd) over seeds, % of the holdout split")
    for key in dict.fromkeys((row["mixer"], row["size"]) for row in rows):
        mine, told = [row for row in rows if (row["mixer"], row["size"]) == key], []
        for name in ("trained", "swapped", "recovered", "from_scratch", "untouched_distilled"):
            values = [100 * row[name] for row in mine]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            told.append(f"{name} {statistics.mean(values):.1f} ({spread:.1f})")
        print(f"{key[0]:<10} {key[1]:>3}  {'  '.join(told)}")
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
