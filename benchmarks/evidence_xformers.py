"""Vision X-formers on CIFAR-10 under a clean protocol: accuracy, true parameters, MACs, measured memory and speed.

    python benchmarks/evidence_xformers.py --dataset hfds//path/to/cifar10-jpeg --out FILE.csv [--models vit vip ...]
        [--seeds 1] [--epochs 2] [--train-images 4000] [--holdout-images N] [--test-images N] [--patch-size 1]
        [--batch-size N] [--no-dropout] [--threads 1] [--device cpu]

The paper trains 40 to 150 epochs on a GPU, picks the best epoch on the test split and mostly leaves dropout on while
testing. Here: AdamW lr 1e-3, weight decay 0.01, no schedule, no warm-up, no augmentation, as the paper; its batch size
and dropout per network (`SETTINGS`); a holdout split for looking; the test split read once per network and seed, in
evaluation mode, after the last epoch. Parts of a split are drawn once, the same for all networks and seeds. On a CPU a
few epochs of a part of the images say only how the networks compare at that little training, and the first printed
line says so.

A row is written as soon as a network is done. A second call with the same `--out` leaves out networks that are there;
rows of other epochs, images, patch or batch size are refused.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.counting import count
from vitnas.data import Augment, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.measure.environment import environment
from vitnas.measure.latency import LatencyMeter
from vitnas.measure.memory import peak_activation_bytes, peak_bytes_of
from vitnas.model import build
from vitnas.model.convolutional import cv, levi
from vitnas.model.fnet2d import FNet2d
from vitnas.model.vision_xformers import VISION_XFORMERS
from vitnas.sample import Fixed
from vitnas.testing.flops import counted_macs
from vitnas.train import Classification, Engine, TrainConfig, evaluate, fit

MICRO = 64  # images at once; larger batches are accumulated
MEASURED = 8  # images of the training step whose memory is measured
TIMED = 32  # images of the forward pass that is timed


@dataclass(frozen=True)
class Setting:
    """Of the authors' script: images per step, dropout in the MLP, behind attention and on the embedded tokens, and
    the last block's rate of stochastic depth."""

    batch: int
    mlp: float = 0.0
    attention: float = 0.0
    embedding: float = 0.0
    drop_path: float = 0.0


SETTINGS = {
    "vit": Setting(64, mlp=0.25, attention=0.25),
    "vip": Setting(128),
    "vil": Setting(256),
    "vin": Setting(128, mlp=0.25),
    "fnet": Setting(512),
    "vit_rope": Setting(64),
    "vip_rope": Setting(192),
    "vil_rope": Setting(320),
    "vin_rope": Setting(192, embedding=0.5),
    "hybrid_vit": Setting(64),
    "hybrid_vip": Setting(128),
    "hybrid_vil": Setting(256),
    "hybrid_vin": Setting(128, mlp=0.25),
    "hybrid_fnet": Setting(512),
    "hybrid_vit_rope": Setting(64),
    "hybrid_vip_rope": Setting(192),
    "hybrid_vil_rope": Setting(256),
    "hybrid_vin_rope": Setting(192, mlp=0.5, embedding=0.5),
    "cct": Setting(48, drop_path=0.1),
    "ccn": Setting(160, drop_path=0.1),
    "ccp": Setting(160, drop_path=0.1),
    "levin": Setting(192),
    "levip": Setting(192),
    "cvn": Setting(160),
    "cvp": Setting(160),
    "fnet2d": Setting(512, mlp=0.5),  # the batch of FNet: the facts at hand have none
}
MODELS = (
    "vit", "vip", "vil", "vin", "fnet", "vin_rope", "hybrid_vit", "hybrid_vin", "hybrid_vin_rope", "cct", "ccn", "ccp"
)  # fmt: skip
PAPER = {  # top-1 of CIFAR-10, where the facts at hand have it; those of CCN and CvP are verified
    "vin": 65.06, "hybrid_vin": 75.26, "ccn": 83.36, "ccp": 82.2, "cvn": 83.26, "cvp": 83.19, "levin": 77.06,
    "levip": 79.5,
}  # fmt: skip
# What two rows must share to stand in one table.
SHARED = ("epochs", "train_images", "n_holdout", "n_test", "asked_patch", "asked_batch", "dropout")


def make(name: str, seed: int, patch_size: int, dropout: bool) -> tuple[nn.Module, int]:
    """The network with new weights, and its multiply-accumulates (by torch's counter where no Arch says it)."""
    setting, generator = SETTINGS[name], torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for networks that take no generator
    if name == "fnet2d":
        model: nn.Module = FNet2d(num_classes=10, dropout=setting.mlp if dropout else 0.0)
    elif name[:2] == "cv" or name[:4] == "levi":
        family = cv if name[:2] == "cv" else levi
        model = family(name[-1], num_classes=10, img_size=32)
    else:
        arch = replace(VISION_XFORMERS[f"vix_{name}"], image_size=32, num_classes=10)
        if not name.startswith("cc"):  # those have a tokenizer of stride 2
            arch = replace(arch, patch_size=patch_size)
        rate = setting.drop_path if dropout else 0.0
        model = build(arch, drop_path=rate, generator=generator)
        if dropout:
            add_dropout(model, setting)
        return model, count(arch).macs
    return model, counted_macs(model.eval(), (1, 3, 32, 32))


def add_dropout(model: Any, setting: Setting) -> None:
    """Dropout where the authors have it; a Model of ours has places for it in its MLPs only."""

    def behind(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return functional.dropout(out, setting.attention, module.training)

    def before(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (functional.dropout(given[0], setting.embedding, module.training),)

    for block in model.blocks:
        block.mlp.drop1.p = block.mlp.drop2.p = setting.mlp
        if setting.attention:
            block.attn.register_forward_hook(behind)
    if setting.embedding:
        model.blocks[0].register_forward_pre_hook(before)


def step_bytes(model: nn.Module, device: str) -> int:
    """Peak of activations and gradients in one training step's forward and backward pass on MEASURED images."""
    model.train()
    images = torch.randn(MEASURED, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.arange(MEASURED, device=device) % 10

    def step() -> None:
        functional.cross_entropy(model(images), targets).backward()

    for parameter in model.parameters():
        parameter.grad = None
    peak = peak_bytes_of(model, images, step)
    for parameter in model.parameters():
        parameter.grad = None
    return peak


def micro_batch(batch: int, images: int) -> tuple[int, int]:
    """Images at once and how often per step: the largest even divisor of the batch that is not above MICRO."""
    batch = min(batch, images)
    micro = max((n for n in range(2, MICRO + 1, 2) if batch % n == 0), default=min(batch, MICRO))
    return micro, max(1, batch // micro)


def train(model: nn.Module, images: Any, batch: int, options: argparse.Namespace, seed: int) -> float:
    """Train in place; returns images per second."""
    micro, times = micro_batch(batch, len(images))
    batches = TrainBatches(images, Augment(), batch_size=micro, seed=seed)
    config = TrainConfig(
        epochs=options.epochs, lr=1e-3, weight_decay=0.01, schedule="none", warmup_epochs=0, clip_grad=None,
        monitor_every=0, accumulate=times,
    )  # fmt: skip
    engine = Engine(precision="fp32", cpu=options.device == "cpu")
    started = time.perf_counter()
    fitted = fit(model, Classification(), Fixed(), batches, config=config, seed=seed, engine=engine)
    return fitted.steps * times * batches.batch_size / (time.perf_counter() - started)


def one(name: str, seed: int, splits: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train, score and measure one network: its row."""
    model, macs = make(name, seed, options.patch_size, not options.no_dropout)
    batch = options.batch_size or SETTINGS[name].batch
    rate = train(model, splits["train"], batch, options, seed)
    model.eval()
    started = time.perf_counter()
    held, score = evaluate(model, splits["holdout"]), evaluate(model, splits["test"])
    scored = time.perf_counter() - started
    target = f"torch,batch={TIMED},threads={options.threads}"
    meter = LatencyMeter(target, device=options.device, warmup=2, runs=20, seconds=3.0, attempts=2)
    timed = meter.measure(model)
    arch = getattr(model, "arch", None)
    return {
        "model": f"vix_{name}",
        "seed": seed,
        "test_accuracy": round(score.accuracy, 4),
        "n_test": score.n,
        "holdout_accuracy": round(held.accuracy, 4),
        "n_holdout": held.n,
        "paper_top1_percent": PAPER.get(name, ""),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "macs": macs,
        "forward_bytes_per_image": peak_activation_bytes(model, (3, 32, 32)),
        "training_step_bytes_per_image": step_bytes(model, options.device) // MEASURED,
        "train_images_per_s": round(rate, 1),
        "eval_images_per_s": round(timed.images_per_s, 1),
        "eval_spread": round(timed.relative_iqr, 3),
        "scoring_images_per_s": round((score.n + held.n) / scored, 1),
        "epochs": options.epochs,
        "train_images": len(splits["train"]),
        "batch": batch,
        "asked_batch": options.batch_size,
        "patch": arch.patch_size if arch else "",
        "asked_patch": options.patch_size,
        "dropout": not options.no_dropout,
        "device": options.device,
        "threads": options.threads,
        "torch": torch.__version__,
        "cpu": environment().get("cpu", ""),
    }


def some(images: Any, number: int | None) -> Any:
    """`number` of the images in a fixed random order; all of them, unmoved, where that is not fewer."""
    if number is None or number >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.subset(order[:number].tolist())


def read_splits(options: argparse.Namespace) -> dict[str, Any]:
    """Training images, and batches of the holdout and the test split."""
    half = (0.5, 0.5, 0.5)
    data = open_data(
        DataConfig(
            dataset=options.dataset, image_size=32, mean=half, std=half, holdout=5000, augment=Augment()
        )
    )
    test = data.open_test(options.out.with_suffix(".reads.json"), purpose="evidence")
    parts = {"holdout": (data.holdout, options.holdout_images), "test": (test, options.test_images)}
    scored = {key: EvalBatches(some(*pair), batch_size=options.eval_batch) for key, pair in parts.items()}
    return {"train": some(data.train, options.train_images)} | scored


def known_rows(path: Path, asked: dict[str, Any], refuse: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Rows of an earlier call; refused where they were made otherwise."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        for name in SHARED:
            if row[name] != str(asked[name]):
                refuse(
                    f"{path} has rows with {name} {row[name]}; this call has {asked[name]}. Use another --out."
                )
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Beside, then renamed: a killed run keeps the rows it had."""
    beside = path.with_suffix(".part")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)


def table(rows: list[dict[str, Any]]) -> None:
    """Mean and standard deviation of the test accuracy over seeds, with the costs."""
    print(
        "\nmodel                test accuracy         paper     params  MMACs  step MB/image train/s  eval/s"
    )
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        scores = [100 * float(row["test_accuracy"]) for row in mine]
        spread = f"sd {statistics.stdev(scores):.2f}" if len(scores) > 1 else "1 seed"
        middle = {key: statistics.median(float(row[key]) for row in mine) for key in SPEEDS}
        print(
            f"{model:<20} {statistics.mean(scores):6.2f} {spread:<9} x{len(scores)}"
            f" {mine[0]['paper_top1_percent']!s:>7}"
            f" {int(mine[0]['params']):>9,} {int(mine[0]['macs']) / 1e6:7.1f}"
            f" {int(mine[0]['training_step_bytes_per_image']) / 1e6:9.2f}"
            f" {middle['train_images_per_s']:9.1f} {middle['eval_images_per_s']:8.1f}"
        )


SPEEDS = ("train_images_per_s", "eval_images_per_s")


def asked_for() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="torch/cifar10")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to N - 1")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--train-images", type=int, default=4000)
    parser.add_argument("--holdout-images", type=int, default=None, help="all 5,000 by default")
    parser.add_argument("--test-images", type=int, default=None, help="all by default")
    parser.add_argument("--eval-batch", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=None, help="the authors' per network by default")
    parser.add_argument(
        "--patch-size", type=int, default=1, help="2 makes a quarter of the tokens, for a CPU"
    )
    parser.add_argument(
        "--no-dropout", action="store_true", help="neither dropout nor stochastic depth, in any network"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("evidence_xformers.csv"))
    return parser, parser.parse_args()


def main() -> None:
    parser, options = asked_for()
    torch.set_num_threads(options.threads)
    splits = read_splits(options)
    asked = {
        "epochs": options.epochs, "train_images": len(splits["train"]), "n_holdout": len(splits["holdout"].images),
        "n_test": len(splits["test"].images), "asked_patch": options.patch_size,
        "asked_batch": options.batch_size or "", "dropout": not options.no_dropout,
    }  # fmt: skip
    rows = known_rows(options.out, asked, parser.error)
    done = {(row["model"], int(row["seed"])) for row in rows}
    print(
        f"{options.epochs:g} epochs of {asked['train_images']} images, patch {options.patch_size}, "
        f"{environment().get('cpu', '')}, {options.threads} threads, torch {torch.__version__}: NOT the paper's 40 to "
        f"150 epochs of 50,000; {len(done)} rows known",
        flush=True,
    )
    for seed in range(options.seeds):
        for name in options.models:
            if (f"vix_{name}", seed) in done:
                continue
            started = time.perf_counter()
            rows.append(one(name, seed, splits, options))
            write(options.out, rows)
            told = {key: rows[-1][key] for key in list(rows[-1])[:15]}
            print(f"{time.perf_counter() - started:.0f} s: {told}", flush=True)
    table(rows)


if __name__ == "__main__":
    sys.exit(main())
