"""What images without labels are worth: CIFAR-10, a small network of two stages, one thread.

    python benchmarks/evidence_pretrain.py PART --dataset hfds/FOLDER --out FOLDER [--seeds 0 1 2] [--tiny]

Parts, each of which makes only the rows that are not there yet:

    pretrain   EsViT on 5,000 images without labels, for `--seconds` of the processor: with views and regions, and with
               views alone; nearest neighbours of the averaged network in the same images, on the test split
    tune       from new weights on 500 labels at several rates and lengths, scored on images carved out of train
    labels     the 500 labels: from new weights for as long as pre-training and tuning together, and from what was
               pre-trained; test split
    collapse   three trainings that are made to collapse, of 1,000 steps each: when the alarm stops them. Training goes
               on to a tenth where it does not. Pre-trainings have the alarm, too, and their rows say if it rang
    table      the rows that are there

Both kinds of pre-training get equal seconds: steps are counted from what a step takes, timed before. Labelled images
are none of the unlabelled ones.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.data.images import Images
from vitnas.errors import UserError
from vitnas.model import Model, build
from vitnas.probing import effective_rank, features, knn_accuracy
from vitnas.runs import append_jsonl, read_jsonl
from vitnas.sample import Fixed, Hook, Moment
from vitnas.stages.pretrain.watch import Watch
from vitnas.train import Classification, EsViTConfig, TrainConfig, evaluate, fit

AUGMENT = Augment(shift=0.125, hflip=0.5)
NETWORK = Arch(
    image_size=32, patch_size=4, in_chans=3, num_classes=10, stem="conv", stem_width=12,
    class_token=False, global_pool="avg",
    stages=(
        Stage(embed_dim=32, blocks=(Block(num_heads=1, head_dim=32, mlp_hidden=64),)),
        Stage(embed_dim=64, blocks=(Block(num_heads=2, head_dim=32, mlp_hidden=128),) * 2),
    ),
)  # fmt: skip
ESVIT = EsViTConfig(
    out_dim=256, hidden_dim=128, bottleneck_dim=64, local_crops_number=2, momentum_teacher=0.99,
    warmup_teacher_temp_epochs=3, freeze_last_layer=0.25, weight_decay_end=None,
)  # fmt: skip
BATCH, UNTIMED, TIMED = 64, 2, 30
PLANTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fields of EsViTConfig and of TrainConfig
    "teacher temperature": ({"teacher_temp": 1.0, "warmup_teacher_temp": 1.0}, {}),
    "no centring": ({"center_momentum": 1.0}, {}),
    "lr": ({}, {"lr": 1.0}),
}
PLANNED = 1000
KINDS = {"views and regions": True, "views": False}


class Work:
    """The images and the rows of a folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.unlabelled, self.labelled, holdout = (300, 100, 200) if options.tiny else (5000, 500, 5000)
        self.data_config = DataConfig(
            dataset=options.dataset, holdout=holdout, max_images=1500 if options.tiny else None
        )

    @cached_property
    def data(self) -> Data:
        return open_data(self.data_config)

    @cached_property
    def test(self) -> EvalBatches:
        log = self.options.out / "test_reads.json"
        return EvalBatches(self.data.open_test(log, purpose="evidence"), batch_size=500)

    @cached_property
    def holdout(self) -> EvalBatches:
        return EvalBatches(self.data.holdout, batch_size=500)

    def images(self, seed: int) -> tuple[Images, Images]:
        """Those without labels, and those with."""
        train = self.data.train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        return train.subset(order[: self.unlabelled]), train.subset(
            order[self.unlabelled : self.unlabelled + self.labelled]
        )

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [*read_jsonl(self.options.out / name)]

    def add(self, name: str, **row: Any) -> None:
        append_jsonl(self.options.out / name, row)
        print(row, flush=True)

    def missing(self, name: str, **known: Any) -> bool:
        return not any(all(row.get(key) == known[key] for key in known) for row in self.rows(name))

    def pretrained(self, seed: int, kind: str) -> Path:
        return self.options.out / f"{kind.replace(' ', '_')}-{seed}.safetensors"

    def pretrain(self) -> None:
        for seed, kind in itertools.product(self.options.seeds, self.options.kinds or KINDS):
            if not self.missing("pretrain.jsonl", seed=seed, kind=kind):
                continue
            self.self_train(
                seed, kind, UNTIMED
            )  # what is made once, decoded images among it, is not a step's
            short, long = (
                processor_seconds(partial(self.self_train, seed, kind, steps))
                for steps in (UNTIMED, UNTIMED + TIMED)
            )
            steps = max(10, round(self.options.seconds * TIMED / (long - short)))
            start = time.process_time()
            network = self.self_train(seed, kind, steps, alarm=True)
            seconds = time.process_time() - start
            save_file(network.state_dict(), self.pretrained(seed, kind))
            epochs = steps * BATCH / self.unlabelled
            row = {
                "seed": seed,
                "kind": kind,
                "steps": steps,
                "epochs": round(epochs, 1),
                "seconds": round(seconds, 1),
            }
            self.add("pretrain.jsonl", **row, **self.neighbours(seed, network))
        for seed in self.options.seeds:
            if self.missing("pretrain.jsonl", seed=seed, kind="new weights"):
                row = {"seed": seed, "kind": "new weights", "steps": 0, "epochs": 0.0, "seconds": 0.0}
                self.add("pretrain.jsonl", **row, **self.neighbours(seed, fresh(seed)))

    def self_train(
        self,
        seed: int,
        kind: str,
        steps: int,
        *,
        alarm: bool = False,
        esvit: Mapping[str, Any] | None = None,
        train: Mapping[str, Any] | None = None,
        end: Enough | None = None,
    ) -> nn.Module:
        """The averaged network after so many steps.

        Raises:
            CollapseError: by the alarm.
        """
        network = fresh(seed)
        first, last = self.options.temps
        temps = {"warmup_teacher_temp": first, "teacher_temp": last}
        config = replace(ESVIT, region=KINDS[kind], **temps | dict(esvit or {}))
        images, _ = self.images(seed)
        batches = config.views(images, network, batch_size=BATCH, seed=seed)
        epochs = steps / batches.steps_per_epoch
        fields: dict[str, Any] = {
            "lr": self.options.pretrain_lr,
            "warmup_epochs": epochs / 10,
            "weight_decay": 0.04,
            "clip_grad": 3.0,
            "clip_per_tensor": True,
            "min_lr": 1e-5,
            "monitor_every": 0,
        }
        teacher = config.teacher(network)
        watch = Watch(
            teacher,
            images,
            self.data.holdout,
            out_dim=config.out_dim,
            looks=0,
            advice=str,
            note=lambda _: None,
        )
        hooks: list[Hook] = [watch] if alarm else []
        if end is not None:
            end.watch = watch
            hooks.append(end)
        fit(
            network,
            config.task(),
            Fixed(),
            batches,
            config=TrainConfig(epochs=epochs, **fields | dict(train or {})),
            teacher=teacher,
            seed=seed,
            hooks=hooks,
        )
        averaged = fresh(seed)
        averaged.load_state_dict(teacher.network.state_dict())
        return averaged

    def collapse(self) -> None:
        for seed, (name, (esvit, train)) in itertools.product(self.options.seeds, PLANTED.items()):
            if not self.missing("collapse.jsonl", seed=seed, planted=name):
                continue
            end = Enough(PLANNED // 10)
            kind = "views and regions"
            said = "nothing"
            try:
                self.self_train(seed, kind, PLANNED, alarm=True, esvit=esvit, train=train, end=end)
            except (UserError, EnoughError) as error:
                said = f"{type(error).__name__}: {error}"
            self.add("collapse.jsonl", seed=seed, planted=name, steps=PLANNED, stopped_at=end.step, said=said)

    def neighbours(self, seed: int, network: nn.Module) -> dict[str, Any]:
        bank = features(network, EvalBatches(self.images(seed)[0], batch_size=500))
        asked = features(network, self.test)
        return {
            "knn": knn_accuracy(*bank, *asked),
            "effective_rank": round(effective_rank(asked.values_ND[:1000]), 2),
            "n": len(asked.targets),
        }

    def learn(self, network: nn.Module, seed: int, lr: float, steps: int) -> float:
        """The labels; gives the seconds."""
        batches = TrainBatches(self.images(seed)[1], AUGMENT, batch_size=BATCH, seed=seed)
        epochs = steps / batches.steps_per_epoch
        train = TrainConfig(
            epochs=epochs, lr=lr, warmup_epochs=epochs / 10, weight_decay=0.05, monitor_every=0, min_lr=0.0
        )
        task = Classification(label_smoothing=0.1)
        return processor_seconds(
            lambda: fit(network, task, Fixed(), batches, config=train, seed=seed, num_classes=10)
        )

    def tune(self) -> None:
        seed = self.options.seeds[0]
        for steps, lr in itertools.product(self.options.steps, self.options.lr):
            if self.missing("tune.jsonl", steps=steps, lr=lr):
                network = fresh(seed)
                seconds = self.learn(network, seed, lr, steps)
                score = evaluate(network, self.holdout)
                row = {"steps": steps, "lr": lr, "seconds": round(seconds, 1), "seed": seed}
                self.add("tune.jsonl", **row, accuracy=score.accuracy, n=score.n)

    def labels(self) -> None:
        for seed, start in itertools.product(self.options.seeds, ("new weights", *KINDS)):
            for steps, lr in itertools.product(self.options.steps, self.options.lr):
                if start in KINDS and not self.pretrained(seed, start).exists():
                    continue
                if not self.missing("labels.jsonl", seed=seed, start=start, steps=steps, lr=lr):
                    continue
                network = fresh(seed)
                if start in KINDS:
                    network.load_state_dict(load_file(self.pretrained(seed, start)))
                seconds = self.learn(network, seed, lr, steps)
                score = evaluate(network, self.test)
                row = {"seed": seed, "start": start, "steps": steps, "lr": lr, "seconds": round(seconds, 1)}
                self.add("labels.jsonl", **row, accuracy=score.accuracy, n=score.n)


class EnoughError(Exception):
    """A training has gone on for long enough."""


class Enough:
    """A Hook that ends a training before step `last`."""

    def __init__(self, last: int) -> None:
        self.last, self.step = last, 0
        self.watch: Watch | None = None

    def before(self, moment: Moment) -> None:
        self.step = moment.step + 1
        if moment.step >= self.last:
            assert self.watch is not None
            vitals = self.watch.vitals(moment.step)
            raise EnoughError(
                f"the alarm did not ring; answers tell images apart by {vitals.information:.3f} nats, "
                f"effective rank {vitals.rank:.1f}"
            )

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        pass


def fresh(seed: int) -> Model:
    return build(NETWORK, generator=torch.Generator().manual_seed(100 + seed))


def processor_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def table(folder: Path) -> str:
    lines = [f"network: {count(NETWORK).macs / 1e6:.1f} M MACs, {count(NETWORK).params:,} parameters"]
    for name, keys, value in (
        ("pretrain.jsonl", ("kind",), "knn"),
        ("tune.jsonl", ("steps", "lr"), "accuracy"),
        ("labels.jsonl", ("start", "steps", "lr"), "accuracy"),
    ):
        kinds: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
        for row in read_jsonl(folder / name):
            kinds.setdefault(tuple(row[key] for key in keys), {})[row["seed"]] = row
        for kind, by_seed in kinds.items():
            each = [100 * row[value] for row in by_seed.values()]
            seconds = statistics.mean(row["seconds"] for row in by_seed.values())
            lines.append(f"{name} {kind}: {value} {spread(each)}, {seconds:.0f} s")
        if name == "pretrain.jsonl" and len(kinds) > 1:
            regions, views = (kinds.get((kind,), {}) for kind in KINDS)
            both = sorted(regions.keys() & views.keys())
            if both:
                gains = [100 * (regions[seed]["knn"] - views[seed]["knn"]) for seed in both]
                lines.append(f"views and regions - views: {spread(gains)} points")
    lines += [
        f"{row['planted']}, seed {row['seed']}: stopped at step {row['stopped_at']} of {row['steps']}: {row['said']}"
        for row in read_jsonl(folder / "collapse.jsonl")
    ]
    return "\n".join(lines)


def spread(each: list[float]) -> str:
    deviation = statistics.stdev(each) if len(each) > 1 else 0.0
    return f"{statistics.mean(each):.2f} ({deviation:.2f}; {', '.join(f'{x:.2f}' for x in each)}; n = {len(each)})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("pretrain", "tune", "labels", "collapse", "table"))
    parser.add_argument("--dataset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=200.0, help="of the processor, per pre-training")
    parser.add_argument("--pretrain-lr", type=float, default=1e-3)
    parser.add_argument(
        "--temps", type=float, nargs=2, default=[0.01, 0.02], help="of the teacher: first, last"
    )
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--steps", type=int, nargs="+", default=[300])
    parser.add_argument("--tiny", action="store_true", help="to rehearse")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.part != "table":
        getattr(Work(options), options.part)()
    print(table(options.out))


if __name__ == "__main__":
    main()
