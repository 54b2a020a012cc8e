"""images: your own folder, on one machine; what it does goes by how many images there are, how large, and the time."""

from __future__ import annotations

from dataclasses import replace

from vitnas.data import AUGMENTS, DataConfig
from vitnas.data.glance import Glance
from vitnas.space import AutoFormerConfig
from vitnas.stages.run import RetrainConfig, Run, SearchConfig
from vitnas.train import TrainConfig

FEW, MANY = 5_000, 50_000  # images
TELLING = 2_500  # with fewer a holdout is too small to tell Archs apart
LONG_S = 7_200.0


def images() -> Run:
    """Any images (data.dataset=...), at 64 pixels in patches of 8: flips, shifts, mixing; 40 M MACs, 30 minutes. Size,
    space, epochs, folds and time go by the images."""
    train = TrainConfig(epochs=100, lr=1e-3, warmup_epochs=5, drop_path=0.1, monitor_every=10)
    return Run(
        recipe="images",
        time="30m",
        budget="macs<=40M",
        data=DataConfig(dataset="", image_size=64, in_chans=3, batch_size=128, augment=AUGMENTS["mixed"]),
        space=space((96, 128, 160), (4, 5, 6), (3, 4, 5)),
        supernet=train,
        search=SearchConfig(searcher="evolution", num_trials=200),
        retrain=RetrainConfig(train=train, rank_archs=6, rank_epochs=10),
    )


def images_like(seen: Glance, asked: Run, seconds: float | None) -> Run:
    """The recipe `images` for such images.

    Small ones keep their size and patches become smaller, so that a network looks at about 64 patches either way. Few
    images get a smaller space, more epochs, smaller batches and less time; too few to tell Archs apart are held out in
    three parts in turn. Many get more of all where there are hours for it. A network to start from has a size and a
    space of its own, which stay the recipe's.

    Args:
        asked: the run without regard to the images.
        seconds: that are given; None where nothing is said, and the number of images decides.
    """
    run = images()
    few, many = seen.images < FEW, seen.images >= MANY and (seconds or 0) >= LONG_S
    if seen.side <= 40:
        size = max(8, seen.side // 4 * 4)
        patch_size = 4 if size > 16 else 2
    else:
        size, patch_size = (96 if many and seen.side >= 128 else 64), 8
    if few:
        parts, budget = space((64, 96, 128), (3, 4, 5), (2, 3, 4)), "macs<=40M"
    elif many:
        parts = space((128, 160, 192), (5, 6, 7), (4, 5, 6))
        budget = "macs<=400M" if size == 96 else "macs<=150M"
    else:
        parts, budget = space((96, 128, 160), (4, 5, 6), (3, 4, 5)), "macs<=80M"
    carved = not seen.has_holdout and not isinstance(asked.data.holdout, str)
    cross = seen.images < TELLING and carved and not (asked.search.trains or asked.sampler.answers)
    train = replace(run.supernet, epochs=200 if seen.images < 1_000 else 100 if seen.images < MANY else 50)
    return replace(
        run,
        time=None if seconds is not None else "10m" if few else "30m" if seen.images < MANY else "1h",
        budget=run.budget if asked.pretrained else budget,
        data=replace(
            run.data,
            image_size=run.data.image_size if asked.pretrained else size,
            batch_size=32 if seen.images < 500 else 64 if seen.images < TELLING else 128,
        ),
        space=run.space if asked.pretrained else replace(parts, patch_size=patch_size),
        supernet=train,
        search=replace(run.search, num_trials=100 if few else 200, folds=3 if cross else 1),
        retrain=replace(run.retrain, train=train),
    )


def space(
    embed_dims: tuple[int, ...], depths: tuple[int, ...], num_heads: tuple[int, ...]
) -> AutoFormerConfig:
    """A small AutoFormer space."""
    return AutoFormerConfig(
        size="micro",
        patch_size=8,
        embed_dims=embed_dims,
        depths=depths,
        num_heads=num_heads,
        mlp_ratios=(2.0, 3.0, 4.0),
        head_dim=32,
    )
