"""`probe`: what a network's features say about classes, by a protocol that looks at the test split once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitnas.data import Data, DataConfig, EvalBatches, Readings, require_one_class
from vitnas.data.images import Images
from vitnas.errors import UserError
from vitnas.grids import ImageSize, as_image_size, size_text
from vitnas.probing.features import Features, features
from vitnas.probing.knn import knn_accuracy
from vitnas.probing.linear import Linear, linear_probe
from vitnas.probing.rank import effective_rank
from vitnas.runs import RunFile
from vitnas.train.engine import Engine
from vitnas.train.evaluate import wilson
from vitnas.train.progress import Progress, Silent
from vitnas.train.teacher import Pixels, channels_of

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.03, 0.07, 0.2)
STRENGTHS = tuple(10.0**power for power in range(-6, 3))
BATCH = 128
RANKED = 2048  # images at most that the effective rank is of


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A classifier on features.

    Attributes:
        accuracy, ci95, n: on the test split, with its 95 % Wilson interval, and the number of images.
        chosen: its numbers, by the part of train that was held out; `held_out` is the accuracy there.
        tried: how many combinations there were to choose from.
    """

    accuracy: float
    ci95: tuple[float, float]
    n: int
    chosen: Mapping[str, float]
    held_out: float
    tried: int


@dataclass(frozen=True, kw_only=True)
class Probed(RunFile):
    """What a network's features are worth.

    Attributes:
        features: which they are; `width` numbers per image.
        image_size: in pixels, as the network saw the images.
        num_train, num_held_out, num_test: images of each part; the held-out ones, too, are in the final bank and fit.
        effective_rank: of the features of `num_ranked` held-out images.
        test_readings: how often the test split has been read for this folder, this time included.
    """

    FILE = "probe.json"
    COMMAND = "vitnas probe"

    model: str
    dataset: str
    features: str
    width: int
    image_size: ImageSize
    num_classes: int
    num_train: int
    num_held_out: int
    num_test: int
    knn: Judged
    linear: Judged
    effective_rank: float
    num_ranked: int
    test_readings: int
    notes: tuple[str, ...]


def images_seen(config: DataConfig, network: Any) -> DataConfig:
    """`config` with what it leaves open taken from the network: size, channels, mean, std, crop, interpolation.

    Raises:
        UserError: images of another size or other channels than the network's.
    """
    own, channels = Pixels.of(network), channels_of(network)
    cfg = getattr(network, "pretrained_cfg", None) or {}
    size = None if own.size is None else as_image_size("image_size", own.size)
    asked = config.image_size
    if asked is not None and size is not None and asked != size and hasattr(network, "patch_embed"):
        raise UserError(
            f"data.image_size is {size_text(asked)}; MODEL takes images of {size_text(size)} pixels. Leave "
            "data.image_size out."
        )
    if channels not in (1, 3) or config.in_chans not in (None, channels):
        raise UserError(
            f"MODEL takes images of {channels} channels; data are grey or colour, 1 or 3, and the same as MODEL's. "
            "Leave data.in_chans out, or use another network."
        )
    known = own.mean is not None
    return replace(
        config,
        image_size=asked or size,
        in_chans=1 if channels == 1 else 3,
        mean=config.mean or own.mean,
        std=config.std or own.std,
        crop_pct=config.crop_pct or (cfg.get("crop_pct") if known else None),
        interpolation=cfg.get("interpolation", config.interpolation) if known else config.interpolation,
    )


def probe(
    network: nn.Module,
    data: Data,
    *,
    name: str = "",
    blocks: int = 0,
    log: Path,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Probed:
    """Judge the features of `network` by weighted nearest neighbours and by a linear classifier.

    Features are taken without augmentation. Numbers (neighbours, temperature, penalty) are chosen with `data.train` as
    what is known and `data.holdout`, which is carved out of train, as what is asked; with them both parts together are
    the final bank and fit, and the test split is read for the first time. Everything is a function of the features.

    Args:
        data: as the network takes them (`images_seen`).
        name: of the network, for the record.
        blocks: see `features`.
        log: gets the reading of the test split (`Data.open_test`).

    Raises:
        UserError: images without labels, or what `features` refuses.
    """
    require_one_class(data.train.targets, "a probe")
    engine, progress = engine or Engine(), progress or Silent()
    network = network.to(engine.device)

    def of(images: Images) -> Features:
        batches = EvalBatches(images, batch_size=BATCH, workers=data.config.workers, cache_bytes=0)
        stage = f"features of {images.split}"
        found = features(
            network, batches, blocks=blocks, told=lambda done: progress.update(stage, done, len(images))
        )
        progress.done(stage)
        return found

    held, train = of(data.holdout), of(data.train)
    neighbours, knn_held = _choose_neighbours(train, held)
    strength, linear_held = linear_probe(*train, *held, STRENGTHS)
    known = Features(*map(torch.cat, zip(train, held, strict=True)))
    test = of(data.open_test(log, purpose="probe"))
    knn = knn_accuracy(*known, *test, k=int(neighbours["k"]), temperature=neighbours["temperature"])
    linear = Linear(*known, strength).accuracy(*test)
    ranked = held.values_ND[:RANKED]
    return Probed(
        model=name,
        dataset=data.config.dataset,
        features=f"the last {blocks} blocks" if blocks else "what the classifier gets",
        width=ranked.shape[1],
        image_size=data.image_size,
        num_classes=data.num_classes,
        num_train=len(train.targets),
        num_held_out=len(held.targets),
        num_test=len(test.targets),
        knn=_judged(knn, len(test.targets), neighbours, knn_held, len(NEIGHBOURS) * len(TEMPERATURES)),
        linear=_judged(linear, len(test.targets), {"C": strength}, linear_held, len(STRENGTHS)),
        effective_rank=effective_rank(ranked),
        num_ranked=len(ranked),
        test_readings=len(Readings.load(log).readings),
        notes=data.notes,
    )


def _choose_neighbours(train: Features, held: Features) -> tuple[dict[str, float], float]:
    """Number of neighbours and temperature that do best on held-out images, the first of equals."""
    tried = {
        (k, temperature): knn_accuracy(*train, *held, k=k, temperature=temperature)
        for k in NEIGHBOURS
        for temperature in TEMPERATURES
    }
    (k, temperature), best = max(tried.items(), key=lambda item: item[1])
    return {"k": k, "temperature": temperature}, best


def _judged(accuracy: float, n: int, chosen: Mapping[str, float], held_out: float, tried: int) -> Judged:
    return Judged(
        accuracy=accuracy,
        ci95=wilson(round(accuracy * n), n),
        n=n,
        chosen=chosen,
        held_out=held_out,
        tried=tried,
    )
