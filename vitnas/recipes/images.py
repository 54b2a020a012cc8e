"""images: your own folder, on one machine; what it does goes by how many images there are, how large, and the time."""

from __future__ import annotations

from dataclasses import replace

from vitnas.budget import Budget
from vitnas.data import AUGMENTS, DataConfig
from vitnas.data.glance import Glance
from vitnas.recipes.pretrain import SPACE
from vitnas.sample import UniformConfig
from vitnas.space import UnifiedConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig
from vitnas.train import TrainConfig

FEW, MANY = 5_000, 50_000  # images
TELLING = 1_000  # with fewer a holdout is too small to tell Archs apart, by their loss
LONG_S = 7_200.0
TRAINED = 14  # Archs whose brief trainings take about what a supernet and its search do
# By the longer side up to which they are for: where unified Spaces start, and the budget of few images, of more, and of
# many where there are hours for them.
SIZES = (
    (14, "micro", "1M", "1M", "1M"),
    (40, "px32", "10M", "20M", "40M"),
    (64, "px64", "20M", "40M", "80M"),
)
LARGE = ("px96", "150M")


def images() -> Run:
    """Your own images (data.dataset=PATH): size, space, budget, epochs and time go by their number and size."""
    train = TrainConfig(epochs=100, lr=2e-3, warmup_epochs=5, drop_path=0.1, clip_grad=1.0, monitor_every=10)
    return Run(
        recipe="images",
        time="30m",
        budget="macs<=40M",
        data=DataConfig(dataset="", image_size=64, in_chans=3, batch_size=128, augment=AUGMENTS["mixed"]),
        space=space("px64"),
        supernet=train,
        sampler=UniformConfig(near_budget=True),
        search=SearchConfig(searcher="evolution", num_trials=200),
        retrain=RetrainConfig(train=train, rank_archs=6, rank_epochs=10),
    )


def images_like(seen: Glance, asked: Run, seconds: float | None) -> Run:
    """The recipe `images` for such images.

    Small ones keep their size. Few images get smaller networks, which learn for longer in the same time, more epochs,
    smaller batches and less time; too few to tell Archs apart are held out in three parts in turn. Many get more of all
    where there are hours for it. A network to start from has a size and a space of its own, as `pretrain` makes them.
    Images with numbers are not varied: what leaves these as they are only their owner knows. Where a latency alone
    limits the answer to few images, no supernet is trained: one that draws near that limit learns from the largest
    networks, and these learn least from few images (LOG.md).

    Args:
        asked: the run without regard to the images.
        seconds: that are given; None where nothing is said, and the number of images decides.
    """
    run = images()
    few, many = seen.images < FEW, seen.images >= MANY and (seconds or 0) >= LONG_S
    size = max(8, seen.side // 4 * 4) if seen.side <= 40 else 64
    preset, *budgets = next(row[1:] for row in SIZES if size <= row[0])
    budget = budgets[0 if few else 2 if many else 1]
    if many and seen.side >= 128:
        size, (preset, budget) = 96, LARGE
    carved = not seen.has_holdout and not isinstance(asked.data.holdout, str)
    cross = seen.images < TELLING and carved and not (asked.search.trains or asked.sampler.answers)
    timed = {limit.quantity for limit in Budget.parse(asked.budget).limits} == {"latency"}
    search = asked.search
    weights = (
        asked.pretrained or asked.sampler.answers or asked.finals.archs or asked.retrain.start == "inherited"
    )
    trains = (
        few and timed and not (weights or cross or search.folds > 1 or search.searcher != run.search.searcher)
    )
    train = replace(run.supernet, epochs=200 if seen.images < 1_000 else 100 if seen.images < MANY else 50)
    return replace(
        run,
        time=None if seconds is not None else "10m" if few else "30m" if seen.images < MANY else "1h",
        budget=run.budget if asked.pretrained else f"macs<={budget}",
        data=replace(
            run.data,
            image_size=run.data.image_size if asked.pretrained else size,
            batch_size=32 if seen.images < 500 else 64 if seen.images < FEW else 128,
            augment="auto" if asked.data.label_kind == "numbers" else run.data.augment,
        ),
        space=replace(SPACE, patch_size=8) if asked.pretrained else space(preset),
        supernet=train,
        search=replace(run.search, searcher="guided_halving", num_trials=TRAINED)
        if trains
        else replace(run.search, num_trials=100 if few else 200, folds=3 if cross else 1),
        # Brief trainings of a few Archs cannot be told apart on a tenth of few images.
        retrain=replace(run.retrain, train=train, rank_archs=0 if few else run.retrain.rank_archs),
    )


def space(size: str) -> UnifiedConfig:
    """The unified space with attention alone, which all that follows a search takes, behind linear and convolutional
    stems."""
    return UnifiedConfig(
        size=size,
        stems=("linear", "conv"),
        mixers=("softmax",),
        positions=("learned",),
        reductions=("patch",),
    )
