"""What a better teacher is worth to a small student with few images: CIFAR-10, one thread.

    python benchmarks/evidence_teacher.py PART --dataset hfds/FOLDER --out FOLDER [--seeds 0 1 2] [--arms ...] [--tiny]

Parts, each of which makes only the rows that are not there yet:

    teacher   a convolutional network of 67 M MACs learns the 45,000 train images
    tune      students without a teacher at several rates, scored on images carved out of train: the fair baseline
    students  a ViT of 9.0 M MACs (stem of ViT-ResNAS) learns 5,000 of these images, an arm per row, all for equally
              many steps: none, soft, features (lifted), soft+features, manifold, soft+manifold; test split
    table     the rows that are there

Labels are learned in every arm, and each loss of the teacher beside them with a weight of 1 unless `--weight` says
otherwise. Arms of a seed see the same batches, so what the teacher says is computed once, in the arm that asks first.
Seconds are of the processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.model import Model, build
from vitnas.runs import append_jsonl, read_jsonl
from vitnas.sample import Fixed
from vitnas.train import ClassificationConfig, Teacher, TeacherConfig, TrainConfig, evaluate, fit
from vitnas.train.losses import Manifold
from vitnas.train.task import At, TaskGiven

AUGMENT = Augment(shift=0.125, hflip=0.5)
STUDENT = Arch(
    image_size=32, patch_size=8, in_chans=3, num_classes=10, stem="conv", stem_width=16,
    class_token=False, global_pool="avg",
    stages=(Stage(embed_dim=96, blocks=(Block(num_heads=3, head_dim=32, mlp_hidden=384),) * 4),),
)  # fmt: skip
BLOCKS = ((0, 3), (1, 4), (2, 4), (3, 5))  # manifold: the teacher's with maps of 8 x 8 places
WANTED = ("logits", "tokens", "blocks.3", "blocks.4")  # the last block gives the tokens
ARMS: dict[str, tuple[str, ...]] = {
    "none": (),
    "soft": ("soft",),
    "features": ("features",),
    "soft+features": ("soft", "features"),
    "manifold": ("manifold",),
    "soft+manifold": ("soft", "manifold"),
}
PAIRS = (
    ("soft+features", "none"),
    ("soft", "none"),
    ("features", "none"),
    ("manifold", "none"),
    ("soft+features", "soft"),
    ("soft+manifold", "soft"),
    ("manifold", "soft"),
    ("manifold", "features"),
    ("soft+manifold", "soft+features"),
)


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.body(x_BCHW)


class Convolutional(nn.Module):
    """A small residual network with the names of timm's: it ends in a map of 8 x 8 places for 32 pixels."""

    num_classes = 10

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        first, second, third = widths
        self.blocks = nn.Sequential(
            convolution(3, first),
            convolution(first, second, stride=2),
            Residual(second),
            convolution(second, third, stride=2),
            Residual(third),
            Residual(third),
        )
        self.head = nn.Linear(third, 10)
        self.num_features, self.feature_info = third, [{"num_chs": width} for width in widths]

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        with torch.autocast(
            "cpu", dtype=torch.bfloat16
        ):  # 1.5 times as fast; the students' small layers are not
            return self.blocks(images_BCHW).float()

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        pooled_BC = x_BCHW.mean((2, 3))
        return pooled_BC if pre_logits else self.head(pooled_BC)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_BCHW))


def convolution(width: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


class Remembered(Teacher):
    """Gives what it said before: arms of a seed see the same batches in the same order."""

    def __init__(self, network: nn.Module, said: list[dict[str, Tensor]]) -> None:
        super().__init__(network)
        self.said, self.step = said, 0

    def answer(self, views: Sequence[Tensor], want: Sequence[str], at: At | None = None) -> dict[str, Tensor]:
        if self.step == len(self.said):
            answers = super().answer(views, WANTED)
            self.said.append({name: answer.bfloat16() for name, answer in answers.items()})
        said = self.said[self.step]
        self.step += 1
        return {name: said["tokens" if name == "blocks.5" else name].float() for name in want}


class Work:
    """The images, the teacher and the rows of a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.few, self.holdout_images = (300, 200) if options.tiny else (5000, 5000)

    @cached_property
    def data(self) -> Data:
        config = DataConfig(
            dataset=self.options.dataset,
            holdout=self.holdout_images,
            max_images=1500 if self.options.tiny else None,
        )
        return open_data(config)

    @cached_property
    def holdout(self) -> EvalBatches:
        return EvalBatches(self.data.holdout, batch_size=500)

    @cached_property
    def test(self) -> EvalBatches:
        log = self.options.out / "test_reads.json"
        return EvalBatches(self.data.open_test(log, purpose="evidence"), batch_size=500)

    @cached_property
    def teacher(self) -> Convolutional:
        network = Convolutional()
        network.load_state_dict(load_file(self.options.out / "teacher.safetensors"))
        return network.to(memory_format=torch.channels_last)

    @cached_property
    def said(self) -> dict[int, list[dict[str, Tensor]]]:
        """What the teacher said, of the last seed."""
        return {}

    def batches(self, seed: int | None, batch_size: int) -> TrainBatches:
        """Of all train images, or of the few of a seed."""
        images = self.data.train
        if seed is not None:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            images = images.subset(order[: self.few].tolist())
        return TrainBatches(images, AUGMENT, batch_size=batch_size, seed=seed or 0)

    def train(self, network: nn.Module, batches: TrainBatches, taught: TeacherConfig, **config: Any) -> float:
        """Train in place; gives the seconds of the processor."""
        given = TaskGiven(augment=AUGMENT, num_classes=10, grid=(8, 8))
        task = taught.task(ClassificationConfig().build(given))
        teacher = None
        if taught.network:
            if batches.seed not in self.said:
                self.said.clear()
            teacher = Remembered(self.teacher, self.said.setdefault(batches.seed, []))
        full = TrainConfig(monitor_every=0, min_lr=0.0, **config)
        start = time.process_time()
        fit(network, task, Fixed(), batches, config=full, teacher=teacher, seed=batches.seed)
        return time.process_time() - start

    def row(self, name: str, network: nn.Module, scored: EvalBatches, **row: Any) -> None:
        score = evaluate(network, scored)
        row |= {"accuracy": score.accuracy, "loss": round(score.loss, 4), "n": score.n}
        append_jsonl(self.options.out / name, row)
        print(row, flush=True)

    def make_teacher(self) -> None:
        if (self.options.out / "teacher.safetensors").exists():
            return
        torch.manual_seed(0)
        network = Convolutional().to(memory_format=torch.channels_last)
        epochs = 1 if self.options.tiny else self.options.teacher_epochs
        config = {"epochs": epochs, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "warmup_epochs": 1}
        seconds = self.train(network, self.batches(None, 128), TeacherConfig(), **config)
        save_file(
            {name: x.contiguous() for name, x in network.state_dict().items()},
            self.options.out / "teacher.safetensors",
        )
        images = len(self.data.train)
        self.row("teacher.jsonl", network, self.test, images=images, seconds=round(seconds), **config)

    def student(
        self,
        name: str,
        arm: str,
        seed: int,
        lr: float,
        steps: int,
        scored: EvalBatches,
        weights: Sequence[float],
    ) -> None:
        batches = self.batches(seed, self.options.batch)
        known = {"arm": arm, "seed": seed, "lr": lr, "steps": steps, "batch": self.options.batch}
        known |= {"weights": list(weights)}
        if any(all(row[key] == known[key] for key in known) for row in read_jsonl(self.options.out / name)):
            return
        network: Model = build(STUDENT, generator=torch.Generator().manual_seed(100 + seed))
        losses = ARMS[arm]
        taught = TeacherConfig()
        if losses:
            manifold = Manifold(blocks=BLOCKS) if "manifold" in losses else Manifold()
            taught = TeacherConfig(network="here", losses=losses, weights=tuple(weights), manifold=manifold)
        epochs = steps / batches.steps_per_epoch
        config = {"epochs": epochs, "lr": lr, "weight_decay": 0.05, "warmup_epochs": epochs / 10}
        seconds = self.train(network, batches, taught, **config)
        macs = count(STUDENT).macs
        self.row(
            name, network, scored, **known, seconds=round(seconds, 1), epochs=round(epochs, 1), macs=macs
        )

    def tune(self) -> None:
        for arm in self.options.arms or ["none"]:
            for steps in self.options.steps:
                for lr in self.options.lr:
                    self.student(
                        "tune.jsonl", arm, self.options.seeds[0], lr, steps, self.holdout, self.weights(arm)
                    )

    def students(self) -> None:
        for seed in self.options.seeds:
            for arm in self.options.arms or ARMS:
                for steps in self.options.steps:
                    for lr in self.options.lr:
                        self.student("students.jsonl", arm, seed, lr, steps, self.test, self.weights(arm))

    def weights(self, arm: str) -> list[float]:
        return [self.options.weight.get(loss, 1.0) for loss in ARMS[arm]]


def table(folder: Path) -> str:
    lines = [
        f"teacher: {100 * row['accuracy']:.2f} % after {row['seconds']} s"
        for row in read_jsonl(folder / "teacher.jsonl")
    ]
    kinds: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in read_jsonl(folder / "students.jsonl"):
        key = (row["arm"], row["steps"], row["lr"], tuple(row["weights"]))
        kinds.setdefault(key, {})[row["seed"]] = row
    for (arm, steps, lr, weights), by_seed in kinds.items():
        each = [100 * row["accuracy"] for row in by_seed.values()]
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        seconds = statistics.mean(row["seconds"] for row in by_seed.values())
        lines.append(
            f"{arm:<14} {steps:6} steps, lr {lr:g}, weights {list(weights)}: {statistics.mean(each):.2f} "
            f"({spread:.2f}) [{', '.join(f'{value:.2f}' for value in each)}] {seconds:.0f} s"
        )
    for ahead, behind in PAIRS:
        for mine, of_mine in kinds.items():
            for other, of_other in kinds.items():
                if (mine[0], other[0]) != (ahead, behind) or not (
                    seeds := [*(of_mine.keys() & of_other.keys())]
                ):
                    continue
                gains = [
                    100 * (of_mine[seed]["accuracy"] - of_other[seed]["accuracy"]) for seed in sorted(seeds)
                ]
                spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
                lines.append(
                    f"{mine} - {other}: {statistics.mean(gains):+.2f} ({spread:.2f}) points, n = {len(gains)} "
                    f"[{', '.join(f'{value:+.2f}' for value in gains)}]"
                )
    return "\n".join(lines)


def weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("teacher", "tune", "students", "table"))
    parser.add_argument("--dataset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[1500])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--weight", type=weight, nargs="+", default=[], help="LOSS=NUMBER, 1 where not said")
    parser.add_argument("--teacher-epochs", type=float, default=9)
    parser.add_argument("--tiny", action="store_true", help="to rehearse")
    options = parser.parse_args()
    options.weight = dict(options.weight)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    work = Work(options)
    if options.part == "teacher":
        work.make_teacher()
    elif options.part != "table":
        getattr(work, options.part)()
    print(table(options.out))


if __name__ == "__main__":
    main()
