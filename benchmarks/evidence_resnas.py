"""Three questions to ViT-ResNAS's parts on the handwritten digits (1,797 real images, drawn up to 16 pixels).

    python benchmarks/evidence_resnas.py [--only residual spread winner] [--seeds 5] [--epochs 40] [--out FILE.jsonl]

- residual: a net of three stages with residual reductions against the same net without the residual (and without the
  weights that differ: there are none), trained from scratch.
- spread: a supernet trained with several Archs per step against one Arch per step, at equal epochs and at equal time;
  the mean accuracy of fixed random Archs with inherited weights.
- winner: the best Arch of an evolution with inherited weights, against a hand-made net in the proportions of
  ViT-Res-Tiny with the same MACs, both trained from scratch with the same settings.

The first two are scored on a holdout split, the last on the test split, as its Arch was chosen on the holdout. Every
line says n and the spread over seeds; nothing is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.model import build
from vitnas.sample import Fixed, Sampler, Spread, Uniform
from vitnas.searching import Study, ViTResNASEvolution, search
from vitnas.space import Space, StageSpace, vit_resnas
from vitnas.supernet import Supernet
from vitnas.train import Classification, Rewiring, TrainConfig, evaluate, fit

AUGMENT = Augment(rotate=10.0, zoom=(0.9, 1.1))
BATCH = 64


def hand_made() -> Arch:
    """ViT-Res-Tiny's proportions: widths double, heads fill them, hidden units are four times as many."""
    stages = tuple(
        Stage(embed_dim=dim, blocks=(Block(num_heads=dim // 16, head_dim=16, mlp_hidden=4 * dim),) * 2)
        for dim in (16, 32, 64)
    )
    return Arch(
        image_size=16, patch_size=2, in_chans=1, num_classes=10, stages=stages, stem="conv", stem_width=8
    )


def space() -> Space:
    """Around the hand-made net: narrower and wider, shallower and deeper."""
    stages = tuple(
        StageSpace(
            depth=3,
            embed_dims=tuple(dim * n // 8 for n in (6, 7, 8, 9, 10)),
            num_heads=tuple(heads * n // 2 for n in (1, 2, 3)) if heads > 1 else (1, 2, 3),
            head_dim=16 if heads > 1 else 8,
            mlp_hidden=tuple(dim * n for n in (2, 3, 4, 5)),
            skip=((1, 0.5),),
        )
        for dim, heads in ((16, 1), (32, 2), (64, 4))
    )
    return vit_resnas(
        "micro", image_size=16, patch_size=2, in_chans=1, num_classes=10, stages=stages, stem_width=8
    )


def data() -> Data:
    return open_data(DataConfig(dataset="digits", image_size=16, holdout=0.2, batch_size=BATCH, seed=0))


def train(
    network: nn.Module, images: Data, sampler: Sampler, epochs: float, seed: int, hooks: Sequence[Any] = ()
) -> float:
    """Train in place; returns the seconds."""
    config = TrainConfig(epochs=epochs, lr=3e-3, warmup_epochs=min(3, epochs / 4), monitor_every=0)
    batches = TrainBatches(images.train, AUGMENT, batch_size=BATCH, seed=seed)
    start = time.monotonic()
    fit(network, Classification(), sampler, batches, config=config, seed=seed, hooks=hooks)
    return time.monotonic() - start


def scoring(images: Any) -> EvalBatches:
    return EvalBatches(images, batch_size=512)


def accuracy(network: nn.Module, batches: EvalBatches, arch: Arch | None = None) -> float:
    return evaluate(network, batches, arch).accuracy


def scratch(arch: Arch, images: Data, scored: EvalBatches, epochs: float, seeds: int) -> list[float]:
    found = []
    for seed in range(seeds):
        model = build(arch, generator=torch.Generator().manual_seed(seed))
        train(model, images, Fixed(), epochs, seed)
        found.append(accuracy(model, scored))
    return found


def told(name: str, values: Sequence[float], n: int, **more: Any) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.mean(values)
    return {
        "what": name,
        "mean": mean,
        "sd": spread,
        "seeds": len(values),
        "n": n,
        "values": list(values),
        **more,
    }


def difference(name: str, ours: Sequence[float], other: Sequence[float], n: int) -> dict[str, Any]:
    """Ours less the other's, seed by seed."""
    return told(name, [a - b for a, b in zip(ours, other, strict=True)], n)


def residual(images: Data, epochs: float, seeds: int) -> list[dict[str, Any]]:
    arch, scored = hand_made(), scoring(images.holdout)
    found = {
        kind: scratch(replace(arch, reduction=kind), images, scored, epochs, seeds)
        for kind in ("residual", "conv")
    }
    cost, n = count(arch), len(images.holdout)
    return [
        *(
            told(f"reduction {kind}", values, n, macs=cost.macs, epochs=epochs)
            for kind, values in found.items()
        ),
        difference("residual less conv", found["residual"], found["conv"], n),
    ]


def spread(images: Data, epochs: float, seeds: int) -> list[dict[str, Any]]:
    where, scored = space(), scoring(images.holdout)
    archs = [where.sample(random.Random(index)) for index in range(12)]
    means: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    train(Supernet(where), images, Uniform(where), 1, 0)  # warms up what the first timing would pay for
    for seed in range(seeds):

        def one(
            name: str, sampler: Sampler, span: float, hooks: Sequence[Any] = (), seed: int = seed
        ) -> float:
            supernet = Supernet(where, generator=torch.Generator().manual_seed(seed))
            took = train(supernet, images, sampler, span, seed, hooks)
            mean = statistics.mean(accuracy(supernet, scored, arch) for arch in archs)
            means.setdefault(name, []).append(mean)
            seconds.setdefault(name, []).append(took)
            return took

        several = one("four Archs per step", Spread(where, 4), epochs)
        single = one("one Arch per step, equal epochs", Uniform(where), epochs)
        one("one Arch per step, equal time", Uniform(where), epochs * several / single)
        warm = epochs / 4
        one(
            "four, widths opening over a quarter, rewired",
            Spread(where, 4, warmup_epochs=warm),
            epochs,
            [Rewiring(warm)],
        )
    n = len(images.holdout)
    rows = [
        told(name, values, n, archs=len(archs), epochs=epochs, seconds=statistics.mean(seconds[name]))
        for name, values in means.items()
    ]
    first = means["four Archs per step"]
    return rows + [
        difference(f"four less {name}", first, values, n)
        for name, values in means.items()
        if values is not first
    ]


def winner(images: Data, epochs: float, seeds: int) -> list[dict[str, Any]]:
    where, reference = space(), hand_made()
    macs = count(reference).macs
    supernet = Supernet(where, generator=torch.Generator().manual_seed(0))
    train(supernet, images, Spread(where, 4), 1.5 * epochs, 0)

    held_out = scoring(images.holdout)

    def score(arch: Arch) -> dict[str, float]:
        return {"accuracy": accuracy(supernet, held_out, arch)}

    evolution = replace(
        ViTResNASEvolution(), first=40, population=20, parents=10, mutants=10, crossovers=10, generations=4
    )
    study = search(
        Study.open(supernet.space, f"{int(0.975 * macs)}<=macs<={macs}"),
        score,
        searcher=evolution,
        num_trials=evolution.num_trials,
    )
    best = study.best()
    with tempfile.TemporaryDirectory() as folder:
        test = images.open_test(Path(folder) / "reads.json", purpose="winner against the hand-made net")
    found = {
        name: scratch(arch, images, scoring(test), epochs, seeds)
        for name, arch in (("winner", best.arch), ("hand-made", reference))
    }
    n = len(test)
    return [
        told("winner", found["winner"], n, macs=best.cost.macs, arch=best.arch.describe(), epochs=epochs),
        told("hand-made", found["hand-made"], n, macs=macs, arch=reference.describe(), epochs=epochs),
        difference("winner less hand-made", found["winner"], found["hand-made"], n),
    ]


PARTS = {"residual": residual, "spread": spread, "winner": winner}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = data()
    for name in options.only:
        start = time.monotonic()
        for row in PARTS[name](images, options.epochs, options.seeds):
            print(
                f"{name}: {row['what']:<48} {row['mean']:+.4f} sd {row['sd']:.4f} ({row['seeds']} seeds, n {row['n']})"
            )
            if options.out is not None:
                with open(options.out, "a") as stream:
                    stream.write(json.dumps({"part": name, **row}) + "\n")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
