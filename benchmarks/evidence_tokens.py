"""Accuracy against MACs and against measured latency of one trained ViT that keeps fewer tokens, chosen in every way.

    python benchmarks/evidence_tokens.py --dataset hfds/FOLDER --out FOLDER [--device cuda] [--parts train tune time]

A DeiT-like net (width 192, depth 8, 3 heads) is trained on CIFAR-10's 32 x 32 pixels drawn up to 112, of which patches
of 8 make 196 tokens and a class token: the images have no more to show than 32 pixels do, so tokens are worth less than
at a camera's 224. Then, for each selector and keep rate r (r, r^2 and r^3 of the patches from a quarter, half and three
quarters of the depth on, as in DynamicViT): accuracy without and with a short fine-tuning (labels and the unpruned net
as teacher), and the time of the exported file beside the whole net's in the same rounds, batch 1, one thread.

Scored on 5,000 images carved out of train, which nothing else looks at. Everything is a line of tokens.csv or
tokens_latency.csv as soon as it is known; what is there is not done again, so a killed run goes on.
`--tiny` rehearses all of it in a minute or two.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.data import DataConfig, Images, open_data
from vitnas.data.augment import seed_from
from vitnas.errors import UserError
from vitnas.layers.selectors import SELECTIONS
from vitnas.measure.latency import LatencyMeter
from vitnas.model import Model, build
from vitnas.model.selections import with_selections
from vitnas.sample import Fixed
from vitnas.stages.work import load_weights, save_weights
from vitnas.train import (
    Classification,
    Distillation,
    Engine,
    KeepRatio,
    Soft,
    Teacher,
    Tokens,
    TrainConfig,
    evaluate,
    fit,
)
from vitnas.train.fewer_tokens import dynamicvit_config

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
FULL = "none"
PARTS = ("train", "tune", "time", "draw")
# Labels and the whole net's logits; where patches are drawn DynamicViT's four losses.
TOLD = Distillation(losses={"soft": (Soft(), 0.5)}, labels=Classification())
DRAWN = Distillation(losses={"soft": (Soft(), 0.5), "tokens": (Tokens(), 0.5)}, labels=KeepRatio())


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    side: int = 112
    patch: int = 8
    dim: int = 192
    depth: int = 8
    heads: int = 3
    images: int | None = None
    holdout: int = 5000
    batch: int = 512
    epochs: float = 12
    tune_images: int = 16_384
    timing_s: float = 1.0

    @property
    def arch(self) -> Arch:
        block = Block(num_heads=self.heads, head_dim=self.dim // self.heads, mlp_hidden=4 * self.dim)
        stage = Stage(embed_dim=self.dim, blocks=(block,) * self.depth)
        return Arch(image_size=self.side, patch_size=self.patch, in_chans=3, num_classes=10, stages=(stage,))


TINY = Size(
    side=32,
    patch=4,
    dim=48,
    depth=4,
    images=2200,
    holdout=200,
    batch=64,
    epochs=2,
    tune_images=256,
    timing_s=0.05,
)


class DeviceBatches:
    """Images that lie on the device as bytes, shifted, mirrored, normalised and drawn up there.

    Args:
        side: pixels that they are drawn up to.
        augment: off for scoring, which is one pass in order.
    """

    def __init__(self, images: Images, size: Size, device: torch.device, *, seed: int, augment: bool) -> None:
        pixels_NCHW = images.pixels(torch.arange(len(images)))
        assert pixels_NCHW is not None
        self.pixels_NCHW, self.targets_N = pixels_NCHW.to(device), images.targets.to(device)
        mean_std = torch.tensor([images.form.mean, images.form.std], device=device)[:, :, None, None]
        self.mean, self.std = (255 * mean_std).unbind()
        self.side, self.batch_size, self.seed, self.augment = size.side, size.batch, seed, augment
        self.steps_per_epoch = max(1, len(images) // size.batch)

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            epoch, index = divmod(step, self.steps_per_epoch)
            order_N = torch.randperm(len(self.targets_N), generator=_generator("order", self.seed, epoch))
            rows_B = order_N[index * self.batch_size : (index + 1) * self.batch_size].to(
                self.targets_N.device
            )
            yield self._finish(self._vary(self.pixels_NCHW[rows_B], step)), self.targets_N[rows_B]
            step += 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels_BCHW, targets_B in zip(
            self.pixels_NCHW.split(self.batch_size), self.targets_N.split(self.batch_size), strict=True
        ):
            yield self._finish(pixels_BCHW), targets_B

    def _vary(self, pixels_BCHW: Tensor, step: int) -> Tensor:
        if not self.augment:
            return pixels_BCHW
        generator, (n, _, height, width) = _generator("vary", self.seed, step), pixels_BCHW.shape
        device = pixels_BCHW.device
        padded = functional.pad(pixels_BCHW.float(), (4, 4, 4, 4))
        down_B, right_B = torch.randint(0, 9, (2, n), generator=generator).to(device)
        mirrored_B = (torch.rand(n, generator=generator) < 0.5).to(device)
        rows_BH1 = (down_B[:, None] + torch.arange(height, device=device))[:, :, None]
        columns_BW = torch.arange(width, device=device).expand(n, -1)
        columns_BW = torch.where(mirrored_B[:, None], width - 1 - columns_BW, columns_BW) + right_B[:, None]
        numbers_B11 = torch.arange(n, device=device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[numbers_B11, rows_BH1, columns_BW[:, None]].permute(0, 3, 1, 2)

    def _finish(self, pixels_BCHW: Tensor) -> Tensor:
        images_BCHW = (pixels_BCHW.float() - self.mean) / self.std
        return functional.interpolate(images_BCHW, size=(self.side, self.side), mode="bilinear")


def _generator(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_from(*words))


class Rows:
    """A csv file that grows line by line; what is in it is not done again."""

    def __init__(self, path: Path, keys: tuple[str, ...], values: tuple[str, ...]) -> None:
        self.path, self.keys, self.names = path, keys, (*keys, *values)
        self.rows = list(csv.DictReader(path.open())) if path.exists() else []

    def has(self, *key: object) -> bool:
        wanted = [str(part) for part in key]
        return any([row[name] for name in self.keys] == wanted for row in self.rows)

    def add(self, *row: object) -> None:
        fresh = not self.path.exists()
        with self.path.open("a") as stream:
            writer = csv.writer(stream)
            if fresh:
                writer.writerow(self.names)
            writer.writerow(row)
        self.rows.append(dict(zip(self.names, map(str, row), strict=True)))
        print(*row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--selectors", nargs="+", choices=[*SELECTIONS], default=[*SELECTIONS])
    parser.add_argument("--keeps", nargs="+", type=float, default=KEEPS)
    parser.add_argument("--tune-keeps", nargs="+", type=float, default=KEEPS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, help="of the net's training")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing new behind so many"
    )
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    Evidence(options).run()


class Evidence:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.size = options, TINY if options.tiny else Size()
        self.start = time.monotonic()
        self.device = torch.device(options.device)
        self.precision: Any = "bf16" if self.device.type == "cuda" else "fp32"
        self.rows = Rows(
            options.out / "tokens.csv",
            ("seed", "selector", "keep", "tuned"),
            ("macs", "accuracy", "n", "seconds"),
        )
        self.times = Rows(
            options.out / "tokens_latency.csv", ("selector", "keep"), ("macs", "ms", "full_ms", "iqr")
        )

    @property
    def has_time(self) -> bool:
        return time.monotonic() - self.start < self.options.seconds

    def run(self) -> None:
        parts = self.options.parts
        if {"train", "tune"} & {*parts}:
            torch.backends.cuda.matmul.allow_tf32 = True
            self.engine = Engine(precision=self.precision, cpu=self.device.type == "cpu")
            config = DataConfig(
                dataset=self.options.dataset,
                image_size=32,
                holdout=self.size.holdout,
                max_images=self.size.images,
            )
            self.data = open_data(config)
            self.scored = DeviceBatches(self.data.holdout, self.size, self.device, seed=0, augment=False)
            for seed in range(self.options.seeds):
                self.train(seed)
                self.tune(seed, tuned="tune" in parts)
        if "time" in parts:
            self.time()
        if "draw" in parts:
            draw(self.rows.rows, self.times.rows, self.options.out / "tokens.html")

    def base(self, seed: int) -> tuple[Model, Path]:
        model = build(self.size.arch, generator=torch.Generator().manual_seed(seed)).to(self.device)
        return model, self.options.out / f"base-{seed}.safetensors"

    def train(self, seed: int) -> None:
        """The whole net, from scratch."""
        model, path = self.base(seed)
        if path.exists() or not self.has_time:
            return
        epochs = self.options.epochs or self.size.epochs
        seconds = self.fit(model, Classification(label_smoothing=0.1), seed, epochs, lr=1e-3)
        self.score(model, seed, FULL, 1.0, False, seconds)
        save_weights(model, path)

    def tune(self, seed: int, *, tuned: bool) -> None:
        """The net with fewer tokens, before and behind a short fine-tuning."""
        base, path = self.base(seed)
        if not path.exists():
            return
        load_weights(base, path, "--parts train")
        teacher = Teacher(base.eval())
        epochs = self.size.tune_images / (self.size.batch * self.batches(seed).steps_per_epoch)
        for selector, keep in [
            (FULL, 1.0),
            *((s, k) for k in self.options.keeps for s in self.options.selectors),
        ]:
            try:
                model = self.fewer(base, selector, keep, seed)
            except UserError as error:  # pooling, for one, has one share only
                print(f"left out: {error}", flush=True)
                continue
            if selector != FULL and not self.rows.has(seed, selector, keep, False):
                self.score(model, seed, selector, keep, False, 0.0)
            wanted = tuned and (selector == FULL or keep in self.options.tune_keeps)
            if not wanted or self.rows.has(seed, selector, keep, True) or not self.has_time:
                continue
            # All train as they are evaluated but the predictor, which draws, and learns by its mask.
            draws = selector == "predictor"
            model.masks_tokens = None if draws else False
            learned, config = (
                (DRAWN, dynamicvit_config(epochs, 1e-3, slow_lr_scale=0.1)) if draws else (TOLD, None)
            )
            seconds = self.fit(model, learned, seed, epochs, lr=1e-4, teacher=teacher, config=config)
            self.score(model, seed, selector, keep, True, seconds)

    def fewer(self, base: Model, selector: str, keep: float, seed: int) -> Model:
        whole = build(base.arch).to(self.device)
        whole.load_state_dict(base.state_dict())
        if selector == FULL:
            return whole.eval()
        generator = torch.Generator().manual_seed(seed)
        return with_selections(whole, keep, selector=selector, generator=generator).eval()

    def batches(self, seed: int) -> DeviceBatches:
        return DeviceBatches(self.data.train, self.size, self.device, seed=seed, augment=True)

    def fit(
        self,
        model: nn.Module,
        task: Any,
        seed: int,
        epochs: float,
        *,
        lr: float,
        teacher: Teacher | None = None,
        config: TrainConfig | None = None,
    ) -> float:
        plain = TrainConfig(epochs=epochs, lr=lr, warmup_epochs=epochs / 10, monitor_every=0)
        config = replace(config or plain, precision=self.precision)
        batches = self.batches(seed)
        return fit(
            model, task, Fixed(), batches, config=config, seed=seed, engine=self.engine, teacher=teacher
        ).seconds

    def score(self, model: Model, seed: int, selector: str, keep: float, tuned: bool, seconds: float) -> None:
        model.masks_tokens = None
        score = evaluate(model.eval(), self.scored)
        macs = count(model.arch).macs
        self.rows.add(seed, selector, keep, tuned, macs, f"{score.accuracy:.4f}", score.n, f"{seconds:.1f}")

    def time(self) -> None:
        """The exported files, each beside the whole net's."""
        meter = LatencyMeter("onnxruntime,batch=1", runs=200, seconds=self.size.timing_s, attempts=3)
        whole = build(self.size.arch).eval()
        for keep in self.options.keeps:
            for selector in self.options.selectors:
                if self.times.has(selector, keep):
                    continue
                try:
                    model = with_selections(whole, keep, selector=selector).eval()
                except UserError:
                    continue
                found = meter.compare({"full": whole, "kept": model})
                kept, full = found["kept"], found["full"]
                macs = count(model.arch).macs
                self.times.add(
                    selector,
                    keep,
                    macs,
                    f"{kept.median_ms:.3f}",
                    f"{full.median_ms:.3f}",
                    f"{kept.relative_iqr:.3f}",
                )


def draw(rows: list[dict[str, str]], times: list[dict[str, str]], path: Path) -> None:
    """Mean accuracy over the seeds against MACs and against the share of the whole net's time."""
    from plotly.graph_objects import Figure, Scatter
    from plotly.subplots import make_subplots

    share = {(row["selector"], row["keep"]): float(row["ms"]) / float(row["full_ms"]) for row in times}
    figure: Figure = make_subplots(
        cols=2,
        x_title="",
        subplot_titles=("against MACs", "against time of the exported file, of the whole net's"),
    )
    for tuned in ("False", "True"):
        for selector in dict.fromkeys(row["selector"] for row in rows):
            mine = [row for row in rows if (row["selector"], row["tuned"]) == (selector, tuned)]
            points = []
            for keep in dict.fromkeys(row["keep"] for row in mine):
                found = [row for row in mine if row["keep"] == keep]
                mean = sum(float(row["accuracy"]) for row in found) / len(found)
                points.append((int(found[0]["macs"]) / 1e6, share.get((selector, keep), 1.0), 100 * mean))
            name = f"{selector}{', tuned' if tuned == 'True' else ''}"
            for column in (0, 1) if points else ():
                line = {"dash": "solid" if tuned == "True" else "dot"}
                xs, ys = [point[column] for point in points], [point[2] for point in points]
                figure.add_trace(
                    Scatter(x=xs, y=ys, name=name, mode="lines+markers", line=line, showlegend=column == 0),
                    row=1,
                    col=column + 1,
                )
    figure.update_yaxes(title="accuracy, %")
    figure.write_html(path, include_plotlyjs=True)


if __name__ == "__main__":
    main()
