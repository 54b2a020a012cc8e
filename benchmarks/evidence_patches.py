"""Accuracy against multiply-accumulates of Patch Slimming, beside uniform keep rates.

    python benchmarks/evidence_patches.py --out runs/patches.json [--dataset digits] [--image-size 20] [--device cuda]

Per seed a small ViT is trained. `whole` is that network, trained on as the others are, which is what they have to be
held against where more training helps. Then for every share of its MACs: `uniform` gives as many patches, spread
evenly, in all blocks; `ps` the places that Patch Slimming finds; `ps_blocks` the same with every block tuned by itself;
`dps_blocks` as many patches as those, chosen per image. Each is read before and behind the same short training of the
whole network with labels and the whole network as its teacher. In all of them the last block gives the class token
alone, which loses nothing. Nothing is chosen by the holdout split, so accuracy is of it and the test split together.

Handwritten digits are 8 x 8 pixels and are enlarged, so that there are many patches. The file of `--out` is written
after every row, and what it holds is not done again; base networks lie beside it. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitnas.arch import Arch, Block, Stage
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.data import Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.errors import UserError
from vitnas.model import Model, build
from vitnas.model.selections import selecting, with_selections
from vitnas.runs import read_json, write_json
from vitnas.sample import Fixed
from vitnas.slimming import BlockTuning, Prediction
from vitnas.slimming.patches import PatchSearch, Slimmed
from vitnas.train import Classification, TrainConfig, evaluate, fit
from vitnas.train.checkpoint import difference
from vitnas.train.engine import Engine
from vitnas.train.teacher import Teacher

METHODS = ("whole", "uniform", "ps", "ps_blocks", "dps_blocks")
# What rows of one file must share.
SETTINGS = tuple(
    "dataset image_size patch dim depth heads hidden batch epochs lr tune_epochs tune_lr block_epochs images "
    "step holdout".split()
)


class Bench:
    """Data, settings, and the training that all networks have."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.engine = Engine(cpu=options.device == "cpu", precision=options.precision)
        config = DataConfig(dataset=options.dataset, image_size=options.image_size, holdout=options.holdout)
        self.data: Data = open_data(config)
        test = self.data.open_test(options.out.with_suffix(".reads.json"), purpose="evidence")
        device = self.engine.device
        unseen = [*EvalBatches(self.data.holdout, batch_size=500), *EvalBatches(test, batch_size=500)]
        self.unseen = [(x.to(device), y.to(device)) for x, y in unseen]
        self.n = sum(len(y) for _, y in self.unseen)

    def arch(self) -> Arch:
        options, form = self.options, self.data.train.form
        head_dim = options.dim // options.heads
        block = Block(num_heads=options.heads, head_dim=head_dim, mlp_hidden=options.hidden)
        return Arch(
            image_size=form.image_size,
            patch_size=options.patch,
            in_chans=form.in_chans,
            num_classes=self.data.num_classes,
            stages=(Stage(embed_dim=options.dim, blocks=(block,) * options.depth),),
        )

    def train(self, model: nn.Module, seed: int, epochs: int, lr: float, teacher: nn.Module | None) -> None:
        batches = TrainBatches(self.data.train, self.data.augment, batch_size=self.options.batch, seed=seed)
        config = TrainConfig(
            epochs=epochs,
            lr=lr,
            warmup_epochs=min(3, epochs / 4),
            monitor_every=0,
            precision=self.options.precision,
        )
        task = Classification(label_smoothing=0.1)
        teaching = None if teacher is None else Teacher(teacher)
        fit(model, task, Fixed(), batches, config=config, seed=seed, teacher=teaching, engine=self.engine)

    def base(self, seed: int) -> Model:
        """The network before slimming, trained or read back."""
        path = self.options.out.with_name(f"{self.options.out.stem}-base-{seed}.safetensors")
        model = build(self.arch())
        if path.exists():
            model.load_state_dict(load_file(path))
        else:
            self.train(model, seed, self.options.epochs, self.options.lr, None)
            save_file({name: tensor.cpu() for name, tensor in model.state_dict().items()}, path)
        return model.to(self.engine.device).eval()

    def accuracy(self, model: nn.Module) -> float:
        return evaluate(model, self.unseen).accuracy

    def calibration(self) -> list[Tensor]:
        """Images of train, as they are in evaluation."""
        found, left = list[Tensor](), self.options.images
        for images_BCHW, _ in EvalBatches(self.data.train, batch_size=64):
            found.append(images_BCHW[:left].to(self.engine.device))
            left -= len(found[-1])
            if left <= 0:
                break
        return found


def uniform(base: Model, limit: float) -> Model:
    """As many patches, spread evenly, in all blocks but the last, as the limit on MACs allows."""
    last, patches = base.arch.depth - 1, prod(base.arch.grids[-1])
    fits = [
        keep
        for keep in range(1, patches)
        if count(selecting(base.arch, {0: keep, last: 0}, "patch_slimming")).macs <= limit
    ]
    return with_selections(base, {0: max(fits), last: 0}, selector="patch_slimming").eval()


def found_at(slimming: PatchSearch, limit: float, dynamic: bool) -> Slimmed:
    """The places that Patch Slimming finds for this many MACs, before any tuning."""
    selector = "dynamic_patch_slimming" if dynamic else "patch_slimming"
    return slimming.within(Budget.parse(f"macs<={int(limit)}"), selector)


def slimmed(method: str, base: Model, slimming: PatchSearch, limit: float, bench: Bench, seed: int) -> Model:
    if method == "whole":
        return copy.deepcopy(base)
    if method == "uniform":
        return uniform(base, limit)
    found = found_at(slimming, limit, method == "dps_blocks")
    if method != "ps":
        found = slimming.tuned(found, BlockTuning(epochs=bench.options.block_epochs))
    if method == "dps_blocks":
        found = slimming.predicting(found, Prediction(seed=seed))
    return found.model


def row_of(
    method: str, share: int, base: Model, slimming: PatchSearch, bench: Bench, seed: int
) -> dict[str, Any]:
    options, start = bench.options, time.monotonic()
    full = count(base.arch).macs
    model = slimmed(method, base, slimming, share / 100 * full, bench, seed)
    seconds = time.monotonic() - start
    before = bench.accuracy(model)
    counts = [block.keep for block in model.arch.blocks]
    bench.train(model, seed + 1000, options.tune_epochs, options.tune_lr, copy.deepcopy(base))
    return {
        "seed": seed,
        "method": method,
        "asked": share,
        "share": count(model.arch).macs / full,
        "keeps": counts,
        "seconds": seconds,
        "before": before,
        "after": bench.accuracy(model),
        "tuning_seconds": time.monotonic() - start - seconds,
    }


def table(content: dict[str, Any], options: argparse.Namespace, n: int) -> str:
    """Means over seeds, and whether the claim holds."""
    bases: dict[str, float] = content["base"]
    lines = [
        f"base: {100 * statistics.mean(bases.values()):.2f} % (seeds {', '.join(bases)}; n = {n} images)",
        "",
        "| MACs asked | method | MACs | before | after | after - base, by seed |",
        "|---|---|---|---|---|---|",
    ]
    for share in (100, *options.shares):
        for method in METHODS:
            rows = [row for row in content["rows"] if (row["asked"], row["method"]) == (share, method)]
            if not rows:
                continue
            mean = {k: statistics.mean(row[k] for row in rows) for k in ("share", "before", "after")}
            each = [100 * (row["after"] - bases[str(row["seed"])]) for row in rows]
            lines.append(
                f"| {share} % | {method} | {100 * mean['share']:.1f} % | {100 * mean['before']:.2f} | "
                f"{100 * mean['after']:.2f} | {statistics.mean(each):+.2f} ({', '.join(f'{e:+.2f}' for e in each)}) |"
            )
    return "\n".join(lines)


def known(options: argparse.Namespace) -> dict[str, Any]:
    settings = json.loads(json.dumps({name: getattr(options, name) for name in SETTINGS}))
    if not options.out.exists():
        return {"settings": settings, "base": {}, "rows": []}
    content: dict[str, Any] = read_json(options.out)
    if changed := difference(content["settings"], settings):
        raise UserError(f"{options.out} has rows of other settings ({changed}). Use another --out.")
    return content


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=int, nargs="+", default=[75, 55, 40])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    sizes = {"image-size": 20, "patch": 2, "dim": 32, "depth": 6, "heads": 2, "hidden": 64, "batch": 64}
    more = {"epochs": 40, "tune-epochs": 8, "block-epochs": 3, "images": 256, "step": 10, "holdout": 400}
    for name, default in {**sizes, **more}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tune-lr", type=float, default=3e-4)
    options = parser.parse_args(argv)
    content, bench = known(options), Bench(options)
    for seed in options.seeds:
        base = bench.base(seed)
        content["base"][str(seed)] = bench.accuracy(base)
        slimming = PatchSearch(base, bench.calibration(), step=options.step, seed=seed)
        for share in (100, *options.shares):
            for method in options.methods:
                if (method == "whole") != (share == 100):
                    continue
                if any(
                    (r["seed"], r["asked"], r["method"]) == (seed, share, method) for r in content["rows"]
                ):
                    continue
                row = row_of(method, share, base, slimming, bench, seed)
                content["rows"].append(row)
                write_json(options.out, content)
                print(json.dumps(row), flush=True)
    write_json(options.out, content)
    print(table(content, options, bench.n))


if __name__ == "__main__":
    main()
