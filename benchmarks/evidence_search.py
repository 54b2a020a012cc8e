"""Is an answer worth its search? The unified Space, single papers' Spaces, halving and hand-scaled ViTs on real images.

    python benchmarks/evidence_search.py --dataset hfds/FOLDER --out FOLDER [--seeds 0 1 2] [--arms unified halving ...]
        [--size small] [--budget TEXT] [--device cuda]

Every arm and seed is a run of the product (OUT/ARM-SEED), without its files to deploy: what is searched, how the
shortlist is trained, what is chosen and how it is compared are the run's own stages. Arms:

    unified     supernet of the unified Space, evolution, finals; beside its winner the run trains the best of as many
                random Archs by the same scores and finals (`random_search`), and the best of three hand-scaled ViTs
    near        a supernet that draws near the budget, searched by loss, and a shortlist by loss and parameters
    guided      halving over Archs that the predictor proposes
    halving     successive halving over random Archs of the unified Space, without a supernet
    rank        Archs of the unified Space, drawn at random within 10 % of the budget and trained from new weights;
                Kendall's tau of that with what each seed's supernet gave them
    ranked      that training alone, which needs no supernet; with `--share 0/4` each fourth of them, from the first on.
                By a second seed, with images and weights of its own, it says how well training agrees with itself
    mixers, vit_resnas, autoformer, vitas    as `halving`, in one paper's Space, made for the same budget

All searches take the same: the supernet's epochs and the Archs that halving begins with follow from `Size.total`, the
images that an Arch of the budget's cost would learn from in the same MACs (a step counts three passes, a look one).
Winners are trained alike, from new weights. Each Space is cut around the budget. Images for training, held-out ones and
the order of all are the seed's; the test split is read once per run, when all of it is trained.

Rows go to evidence_search.jsonl as they are known: `model` per trained net, `stage` with seconds of the processor,
`trained` and `rank` per Arch and seed. What is there is not made again, and a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.data import Augment, DataConfig
from vitnas.model.named import ArchFile
from vitnas.records import Result, Results, TrainedSupernet
from vitnas.runs import append_jsonl, read_jsonl
from vitnas.sample import Given, SamplerConfig, UniformConfig
from vitnas.searching import rank_correlation
from vitnas.searching.choosing import standing
from vitnas.space import (
    AutoFormerConfig,
    MixerConfig,
    Space,
    SpaceConfig,
    UnifiedConfig,
    VitasConfig,
    ViTResNASConfig,
)
from vitnas.stages.claim import alone, begin
from vitnas.stages.context import Context
from vitnas.stages.finals import epochs_in_all
from vitnas.stages.run import FinalsConfig, RetrainConfig, Run, SearchConfig
from vitnas.stages.table import STAGES
from vitnas.train import TrainConfig, evaluate

PARTS = ("train", "search", "finals", "retrain", "evaluate")
STEP = 3  # passes that a step of training costs: forward, and backward twice that
SUPERNETS = ("unified", "near")
ARMS = (
    "unified",
    "near",
    "halving",
    "guided",
    "ranked",
    "rank",
    "mixers",
    "vit_resnas",
    "autoformer",
    "vitas",
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large everything is.

    Args:
        macs: of the budget, or of what meets it.
        limit: the budget, where it is none on multiply-accumulates.
        costs: what an Arch counts as, by arm, so that searches take equal seconds of the processor, where that is not
            `macs`.
        total: epochs of an Arch of the budget's cost that any search takes, all its parts together.
        train_images, holdout: of each seed; None is all there are.
    """

    macs: float
    spaces: Mapping[str, SpaceConfig]
    total: float
    train_images: int
    holdout: int
    batch: int
    epochs: float
    finals: float
    archs: int
    trials: int
    ranked: int
    rank_epochs: float
    lr: float = 2e-3
    limit: str = ""
    costs: Mapping[str, float] = field(default_factory=dict)

    def cost(self, arm: str) -> float:
        """MACs that an Arch counts as."""
        return self.costs.get(arm, self.macs)

    @property
    def near(self) -> str:
        """Within 10 % of the cost."""
        return f"{0.9 * self.macs:.0f}<=macs<={self.macs:.0f}"

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(
            epochs=self.epochs, lr=self.lr, warmup_epochs=self.epochs / 10, clip_grad=1.0, monitor_every=0
        )


def one_stage(kind: Any, dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...]) -> Any:
    return kind(
        size="micro",
        patch_size=4,
        embed_dims=dims,
        depths=depths,
        num_heads=heads,
        mlp_ratios=(1.0, 2.0, 3.0, 4.0),
        head_dim=16,
    )


def spaces(
    unified: UnifiedConfig,
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    stages: tuple[tuple[int, ...], tuple[int, ...]],
    widest: int,
    slots: int,
) -> dict[str, SpaceConfig]:
    """The Spaces for one budget; `stages` are widths and depths of ViT-ResNAS's, `widest` and `slots` ViTAS's."""
    return {
        "unified": unified,
        "mixers": one_stage(MixerConfig, dims, depths, heads),
        "autoformer": one_stage(AutoFormerConfig, dims, depths, heads),
        "vit_resnas": ViTResNASConfig(
            size="micro",
            patch_size=4,
            embed_dims=stages[0],
            depths=stages[1],
            num_heads=heads,
            mlp_ratios=(1.0, 2.0, 3.0),
            head_dim=16,
        ),
        "vitas": VitasConfig(
            size="mini",
            patch_sizes=(4,),
            widest=(widest, widest, 3 * widest),
            num_heads=(2, 3),
            num_slots=slots,
        ),
    }


SMALL = Size(
    macs=3e6,
    spaces=spaces(
        UnifiedConfig(
            size="px32",
            patch_sizes=(4,),
            embed_dims=((16, 24, 32, 40), (40, 48, 64, 80), (80, 96, 112)),
            depths=(3, 3, 2),
        ),
        (24, 32, 40),
        (2, 3, 4),
        (1, 2, 3),
        ((20, 24, 28, 32), (3, 3)),
        48,
        5,
    ),
    total=52,
    train_images=3000,
    holdout=1500,
    batch=64,
    epochs=16,
    finals=4,
    archs=8,
    trials=80,
    ranked=16,
    rank_epochs=8,
)
LARGE = replace(  # for a GPU
    SMALL,
    macs=10e6,
    spaces=spaces(
        UnifiedConfig(
            size="px32",
            embed_dims=((24, 32, 48, 64), (64, 80, 96, 112), (112, 128, 144, 160)),
            depths=(4, 4, 3),
        ),
        (32, 40, 48, 56, 64),
        (3, 4, 5),
        (2, 3, 4),
        ((32, 40, 48, 56, 64), (4, 4)),
        72,
        6,
    ),
    total=240,
    train_images=5000,
    holdout=2000,
    batch=500,  # a step of so small a net waits for the host, so larger batches are epochs in less time
    epochs=300,
    finals=20,
    trials=100,
    ranked=16,
    rank_epochs=60,
    lr=3e-3,
)
MEDIUM = replace(  # the same budget in a CPU's hours
    LARGE, total=36, train_images=2000, holdout=1000, batch=32, epochs=12, finals=3, trials=50, rank_epochs=6, lr=2e-3,
)  # fmt: skip
# 3 ms of ONNX Runtime, one thread of a quiet core, one image: 60 to 120 M multiply-accumulates.
LATENCY = replace(
    MEDIUM,
    macs=30e6,
    # MACs say little here: 13 Archs of 30 M took guided halving 87 s, the supernet's way 220 s.
    costs={
        "guided": 13e6,
        "halving": 13e6,
        "mixers": 22e6,
        "autoformer": 22e6,
        "vit_resnas": 18e6,
        "vitas": 18e6,
    },
    limit="latency<=3.0ms@onnxruntime,batch=1,threads=1",
    spaces=spaces(
        UnifiedConfig(
            size="px32",
            embed_dims=((48, 64, 96, 128), (128, 160, 192, 224), (224, 256, 288, 320)),
            depths=(4, 4, 3),
        ),
        (96, 128, 160, 192, 224),
        (4, 5, 6, 7, 8),
        (2, 3, 4, 6),
        ((96, 112, 128, 160, 192), (4, 4)),
        192,
        9,
    ),
    total=20,
    train_images=1000,
    holdout=600,
    epochs=8,
    finals=2,
    archs=6,
    trials=30,
)
TINY = replace(  # to rehearse
    SMALL, total=8, train_images=128, holdout=64, batch=32, epochs=1, finals=1, archs=2, trials=6, ranked=3,
    rank_epochs=0.5,
)  # fmt: skip
SIZES = {"small": SMALL, "medium": MEDIUM, "large": LARGE, "latency": LATENCY, "tiny": TINY}


def mean_macs(sampler: SamplerConfig, space: Space, budget: str) -> float:
    """Of the Archs that a supernet's steps take."""
    built, rng = sampler.build(space, Given(budget=Budget.parse(budget))), random.Random(0)
    return statistics.mean(
        count(draw.arch).macs for _ in range(1000) for draw in built.draw(rng) if draw.arch
    )


class Evidence:
    """The runs of one size, and their rows."""

    def __init__(self, options: argparse.Namespace, size: Size) -> None:
        self.options, self.size = options, size
        self.path: Path = options.out / "evidence_search.jsonl"

    def rows(self, what: str) -> list[dict[str, Any]]:
        return [row for row in read_jsonl(self.path) if row["what"] == what]

    def write(self, what: str, **row: Any) -> None:
        append_jsonl(self.path, {"what": what, **row})
        print(json.dumps({"what": what, **row}), flush=True)

    def run(self, arm: str, seed: int) -> Run:
        """The run of an arm; every search takes `total`."""
        size, trains = self.size, arm not in SUPERNETS
        space = size.spaces.get(arm, size.spaces["unified"])
        finals = FinalsConfig(archs=0 if trains else size.archs, epochs=size.finals)
        run = Run(
            recipe="evidence_search",
            budget=self.options.budget or size.limit or size.near,
            seed=seed,
            data=DataConfig(
                dataset=self.options.dataset,
                image_size=32,
                holdout=size.holdout,
                batch_size=size.batch,
                augment=Augment(shift=0.125, hflip=0.5, label_smoothing=0.1),
                max_images=size.train_images + size.holdout,
                workers=self.options.workers,
                seed=seed,
            ),
            space=space,
            supernet=size.train,
            sampler=UniformConfig(near_budget=arm == "near"),
            search=SearchConfig(
                searcher={"guided": "guided_halving"}.get(arm, "halving")
                if trains
                else self.options.searcher,
                num_trials=size.trials,
                score="accuracy" if arm == "unified" else "loss",
            ),
            finals=finals,
            retrain=RetrainConfig(train=size.train, baselines=self.baselines(arm, seed), rank_archs=0),
            device="auto" if self.options.device == "cuda" else "cpu",
            threads=self.options.threads,
        )
        look = size.holdout / (
            STEP * size.train_images
        )  # epochs that looking at the held-out images once stands for
        if trains:
            archs = next(
                n
                for n in range(2, 10_000)
                if (epochs_in_all(finals, size.train, n + 1) + 2 * look * (n + 1)) * size.cost(arm)
                > size.total * size.macs
            )
            return replace(run, search=replace(run.search, num_trials=archs))
        left = size.total - size.trials * look - epochs_in_all(finals, size.train, size.archs)
        made = space.build(image_size=32, in_chans=3, num_classes=10)
        epochs = max(0.5, left * size.macs / mean_macs(run.sampler, made, size.near))
        return replace(run, supernet=replace(size.train, epochs=epochs, warmup_epochs=epochs / 10))

    def baselines(self, arm: str, seed: int) -> tuple[str, ...]:
        """Random search beside every supernet, hand-scaled nets beside the first of a seed."""
        if arm not in SUPERNETS:
            return ()
        others = [row for row in self.rows("model") if row["seed"] == seed and row["arm"] != arm]
        known = any(row["role"] == "hand_scaled" for row in others)
        return ("random_search",) if known else ("hand_scaled", "random_search")

    @contextmanager
    def opened(self, arm: str, seed: int, name: str = "") -> Iterator[Context]:
        context = Context(self.run(arm, seed), self.options.out / f"{name or arm}-{seed}")
        with alone(context):
            yield context

    def arm(self, arm: str, seed: int) -> None:
        """Go through a run, unless its models have their rows."""
        if any(row["arm"] == arm and row["seed"] == seed for row in self.rows("model")):
            return
        with self.opened(arm, seed) as context:
            begin(context)
            for name in PARTS:
                start = time.process_time(), time.monotonic()
                STAGES[name](context)
                seconds = {"cpu_s": time.process_time() - start[0], "clock_s": time.monotonic() - start[1]}
                self.write(
                    "stage", arm=arm, seed=seed, stage=name, **{k: round(v, 1) for k, v in seconds.items()}
                )
            for row in self.models(context, arm, seed):
                self.write("model", arm=arm, seed=seed, **row)

    def models(self, context: Context, arm: str, seed: int) -> list[dict[str, Any]]:
        """A row per trained net of a run: its accuracy, and what finding and training it took."""
        folder, found = context.folder, []
        results = Results.read(folder)
        verdict = {each.role: each for each in results.verdict}
        for row in results.rows:
            arch = ArchFile.read(folder / "models" / row.role).arch
            more: dict[str, Any] = {"arch": arch.describe(), "macs": row.macs, "params": row.params}
            if row.role in verdict:
                versus = verdict[row.role]
                more |= {"chosen_ahead": versus.difference, "ci95": versus.ci95}
            found.append(
                {
                    "role": row.role,
                    "accuracy": row.test_accuracy,
                    "n": row.n_test,
                    "holdout_accuracy": row.holdout_accuracy,
                    "supernet_accuracy": row.supernet_accuracy,
                    **self.cost(context, row),
                    **more,
                }
            )
        return found

    def cost(self, context: Context, row: Result) -> dict[str, float]:
        """What finding and training took, in 1e12 MACs. All but a supernet's Archs are taken to cost what this one
        does, which is within 10 %."""
        assert row.spent is not None
        learned, supernet = row.spent.learned, 0.0
        if row.supernet_accuracy is not None:
            before = TrainedSupernet.read(context.folder).spent.learned
            learned, supernet = (
                learned - before,
                STEP * before * mean_macs(context.run.sampler, context.space, self.size.near),
            )
        own = STEP * row.epochs * len(context.data.train) * row.macs
        rest = (STEP * learned + row.spent.looked) * row.macs - own
        return {
            "supernet_tmacs": round(supernet / 1e12, 6),
            "search_tmacs": round((supernet + rest) / 1e12, 6),
            "train_tmacs": round(own / 1e12, 6),
        }

    def ranked(self, seed: int, first: int = 0, step: int = 1) -> None:
        """Train the Archs of the ranking by a seed's images: each `step`-th from the `first` on."""
        size = self.size
        with self.opened("near", seed, f"ranked{first}") as context:
            config = replace(
                context.models.config.train, epochs=size.rank_epochs, warmup_epochs=size.rank_epochs / 10
            )
            for number, arch in enumerate(self.drawn(context.space, size.ranked)):
                known = {(row["number"], row["seed"]) for row in self.rows("trained")}
                if number % step != first or (number, seed) in known:
                    continue
                start, stage = time.process_time(), f"rank/{arch.id}"
                model, _ = context.models.train(context.models.fresh(arch, stage), config, stage)
                score, cost = evaluate(model, context.images.holdout), count(arch)
                self.write(
                    "trained", number=number, seed=seed, accuracy=score.accuracy, loss=score.loss, n=score.n,
                    epochs=size.rank_epochs, cpu_s=round(time.process_time() - start, 1), macs=cost.macs,
                    params=cost.params, describe=arch.describe(), arch=arch.to_json(),
                    genes=[int(gene) for gene in context.space.encode(arch)],
                )  # fmt: skip

    def rank(self, seeds: list[int]) -> None:
        """Archs within 10 % of the budget: trained once, by the first seed; scored by the supernet of each."""
        size = self.size
        self.ranked(seeds[0])
        arms = [
            arm
            for arm in SUPERNETS
            if {row["seed"] for row in self.rows("model") if row["arm"] == arm} >= {*seeds}
        ]
        known = {
            (row.get("arm", "unified"), row["seed"], row["epochs"], row["n"]) for row in self.rows("rank")
        }
        trained = ranked_accuracies(self.rows("trained"), seeds[0])
        for arm, seed in product(arms, seeds):
            if (arm, seed, size.rank_epochs, size.ranked) in known:
                continue
            with self.opened(arm, seed) as context:
                if not TrainedSupernet.exists(context.folder):  # by another machine, or tidied up
                    begin(context)
                    STAGES["train"](context)
                archs = list(self.drawn(context.space, size.ranked))
                scored = [context.inherited.evaluator(arch) for arch in archs]
                rulers = {
                    "accuracy": [each["accuracy"] for each in scored],
                    "loss": [-each["loss"] for each in scored],
                    "macs": [float(count(arch).macs) for arch in archs],
                    "params": [float(count(arch).params) for arch in archs],
                    "loss and size": standing(
                        -np.array([each["loss"] for each in scored]),
                        np.array([count(arch).macs for arch in archs]),
                        [(count(arch).params, arch.depth) for arch in archs],
                    ).tolist(),
                }
                taus = {}
                for name, values in rulers.items():
                    if len(set(values)) > 1 and len(set(trained)) > 1:
                        taus[name] = rank_correlation(values, trained)["kendall_tau"]
                self.write(
                    "rank", arm=arm, seed=seed, epochs=size.rank_epochs, n=len(archs), taus=taus,
                    inherited=rulers["accuracy"], inherited_loss=[each["loss"] for each in scored], trained=trained,
                )  # fmt: skip

    def drawn(self, space: Space, n: int) -> Iterator[Any]:
        """Different random Archs within the budget."""
        rng, budget, seen = random.Random("evidence_search"), Budget.parse(self.size.near), set()
        while len(seen) < n:
            arch = space.sample(rng)
            if arch.id not in seen and not budget.misses(count(arch)):
                seen.add(arch.id)
                yield arch


def ranked_accuracies(trained: Sequence[Mapping[str, Any]], seed: int) -> list[float]:
    """Of the Archs of the ranking, in their order, as one seed trained them."""
    rows = sorted((row for row in trained if row["seed"] == seed), key=lambda row: row["number"])
    return [row["accuracy"] for row in rows]


def mean_text(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):7.2f} ({spread:.2f}, n={len(values)})  " + ", ".join(
        f"{v:.2f}" for v in values
    )


def table(path: Path) -> str:
    """What the rows say, seed by seed."""
    rows = list(read_jsonl(path))
    models = [row for row in rows if row["what"] == "model"]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in models:
        random_by = row["role"] == "random_search" and row["arm"] != "unified"
        name = f"random_{row['arm']}" if random_by else row["arm"] if row["role"] == "chosen" else row["role"]
        found.setdefault(name, {})[row["seed"]] = row
    lines = [f"{'':<15} {'search':>7} {'train':>6}  accuracy on test, %: mean (s.d.), by seed; 1e12 MACs"]
    for name, by_seed in found.items():
        costs = [
            statistics.mean(row[f"{kind}_tmacs"] for row in by_seed.values()) for kind in ("search", "train")
        ]
        accuracies = [100 * by_seed[seed]["accuracy"] for seed in sorted(by_seed)]
        lines.append(f"{name:<15} {costs[0]:7.2f} {costs[1]:6.2f} {mean_text(accuracies)}")
    for ours, name in (
        (ours, name) for ours in ("unified", "near", "halving", "guided") for name in found if name != ours
    ):
        both = sorted(set(found[name]) & set(found.get(ours, {})))
        if both:
            pairs = [(found[ours][seed]["accuracy"], found[name][seed]["accuracy"]) for seed in both]
            lines.append(f"{ours} - {name:<13} {mean_text([100 * (a - b) for a, b in pairs])}")
    trained = [row for row in rows if row["what"] == "trained"]
    for seeds in combinations(sorted({row["seed"] for row in trained}), 2):
        both = [ranked_accuracies(trained, seed) for seed in seeds]
        if len(both[0]) == len(both[1]):
            tau = rank_correlation(*both)["kendall_tau"]
            lines.append(
                f"Kendall of two trainings, seeds {seeds[0]} and {seeds[1]}, n={len(both[0])}: {tau:.2f}"
            )
    for row in rows:
        if row["what"] == "rank":
            told = ", ".join(f"{name} {tau:.2f}" for name, tau in row["taus"].items())
            lines.append(
                f"Kendall with trained accuracy, {row.get('arm', 'unified')}, seed {row['seed']}, n={row['n']}: {told}"
            )
    return "\n".join(lines)


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--budget", default="", help="another one, such as a latency; Spaces and costs stay")
    parser.add_argument("--searcher", default="evolution")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--share", default="0/1", help="of `ranked`: which, and of how many")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    return parser.parse_args(words)


def main() -> None:
    options = parsed()
    evidence = Evidence(options, SIZES[options.size])
    if not options.table:
        torch.set_num_threads(options.threads)
        # Autocast to bf16 is more calls of the host, which is what so small a net waits for on a GPU.
        torch.set_float32_matmul_precision("high")
        for arm in options.arms:
            if arm == "rank":
                evidence.rank(options.seeds)
                continue
            if arm == "ranked":
                first, step = (int(word) for word in options.share.split("/"))
                evidence.ranked(options.seeds[0], first, step)
                continue
            for seed in options.seeds:
                evidence.arm(arm, seed)
    print(table(evidence.path))


if __name__ == "__main__":
    main()
