"""What recovery wins back of a pretrained ViT that was folded to half of its MACs, without labels.

    python benchmarks/evidence_recovery.py --weights FILE.safetensors --dataset hfds/FOLDER --out FILE.jsonl [--seeds 3]
        [--seconds 40] [--lr 1e-4] [--torch-pruning FOLDER] [--device cuda] [--precision fp32]

Network, images, probe, order and allocation are those of `evidence_slim.py`. Per seed: `folded`, and that recovered for
`--seconds` towards the given network on the train images that neither the probe nor its score uses (`recovered`); and
where Torch-Pruning's folder is given, what it leaves at the same MACs, before and after the same recovery. Rows go to
`--out` as they come; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import evidence_slim
from evidence_slim import Calibrated, Probe, given_network, images_for, parser, pruned_to, table
from torch import nn

from vitnas.counting import count
from vitnas.data import Augment, Data, EvalBatches, TrainBatches
from vitnas.runs import append_jsonl, read_jsonl
from vitnas.slimming.recovery import RECOVERY, recover, step_seconds
from vitnas.train import Engine


def networks(made: Calibrated, name: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What is recovered, by name."""
    if name == "folded":
        yield name, made.fold(made.half)
    else:  # of the same width, for the probe's sake; Torch-Pruning works on the CPU
        given, limit = copy.deepcopy(made.given).cpu(), count(made.half).macs
        yield name, pruned_to(options.torch_pruning, given, limit, True).to(options.device)


def recovered(
    network: nn.Module, original: nn.Module, data: Data, seed: int, options: argparse.Namespace
) -> Any:
    """Recover in place for about so long."""
    precision: Any = options.precision
    engine = Engine(precision=precision, cpu=options.device == "cpu")
    rest = data.train.subset(range(evidence_slim.PROBED + evidence_slim.HELD, len(data.train)))
    augment = Augment(shift=0.125, hflip=0.5)
    loader = TrainBatches(rest, augment, batch_size=options.batch, seed=seed, workers=options.workers)
    config, more = replace(RECOVERY, lr=options.lr, precision=precision), {"seed": seed, "engine": engine}
    step_s = step_seconds(network, original, loader, config=config, steps=8, **more)
    epochs = max(1.0, options.seconds / step_s) / loader.steps_per_epoch
    config = replace(config, epochs=epochs, warmup_epochs=epochs / 10)
    held = range(evidence_slim.PROBED, evidence_slim.PROBED + evidence_slim.HELD)
    holdout = EvalBatches(data.train.subset(held), batch_size=64)
    return recover(network, original, loader, holdout, config=config, **more)


def main() -> None:
    words = parser(__doc__)
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--images", type=int, default=384)
    words.add_argument("--answers", type=float, default=0.25)
    words.add_argument("--importance", default="unexplained")
    words.add_argument("--train-images", type=int, default=None)
    words.add_argument("--seconds", type=float, default=40.0)
    words.add_argument("--lr", type=float, default=1e-4)
    words.add_argument("--batch", type=int, default=128)
    words.add_argument("--workers", type=int, default=0)
    words.add_argument("--torch-pruning", type=Path, default=None)
    words.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    words.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    words.add_argument("--tiny", action="store_true", help="few images and three blocks, to rehearse")
    options = words.parse_args()
    if options.tiny:
        evidence_slim.PROBED, evidence_slim.SCORED, evidence_slim.HELD = 48, 48, 16
        evidence_slim.STEPS = (0.25, 0.5, 1.0)
        options.images, options.train_images, options.importance, options.batch = 24, 200, "activation", 4
    given = given_network(options.weights).to(options.device)
    if options.tiny:
        given.blocks = given.blocks[:3]
    data = images_for(options.dataset, scored=evidence_slim.SCORED, most=options.train_images)
    probe = Probe(given, data)
    known = list(read_jsonl(options.out))
    whole = probe.accuracy(given)
    print(f"the given network: {whole:.2%} of {len(probe.scored)}", flush=True)

    def write(seed: int, name: str, variant: str, network: Any, **more: Any) -> None:
        about = {"setting": name, "seed": seed, "variant": variant}
        row = {**about, **probe.row(network, given), "given": whole, **more}
        append_jsonl(options.out, row)
        known.append(row)
        print(row, flush=True)

    @cache
    def calibrated(seed: int) -> Calibrated:
        return Calibrated(given, data, seed, options)

    for name in ("folded", *(["pruned"] if options.torch_pruning is not None else [])):
        for seed in range(options.seeds):
            has = {(row["setting"], row["variant"]) for row in known if row["seed"] == seed}
            if (name, "recovered") in has:
                continue
            made = calibrated(seed)
            for each, network in networks(made, name, options):
                if (each, "before") not in has:
                    write(seed, each, "before", network)
                found = recovered(network, made.given, data, seed, options)
                told = {"steps": found.steps, "seconds": round(found.seconds, 1), "told": str(found)}
                write(seed, each, "recovered", network, **told)
    table(known)


if __name__ == "__main__":
    main()
