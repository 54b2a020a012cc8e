"""PretrainContext: a run that pretrains a network on images without labels, and its folder."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import timm
import torch
from torch import nn

from vitnas.data import Data, DataConfig, has_one_class, open_data
from vitnas.data.augment import seed_from, seeded_globals
from vitnas.errors import UserError, first_line
from vitnas.exporting import load_timm
from vitnas.exporting.networks import load_network
from vitnas.grids import ImageSize, sides_of
from vitnas.model import build
from vitnas.model.trained import Trained, find_trained
from vitnas.probing import images_seen
from vitnas.sample import Fixed, Sampler
from vitnas.space import Space, SpaceConfig
from vitnas.stages.context import Context
from vitnas.stages.run import PretrainConfig, Run
from vitnas.stages.work import RunImages, Work

OURS = ("vit", "supernet")  # words of `model` for what the run's space has
LARGE = 64  # pixels that photographs become for a network of ours
GRID = 7  # rows of patches at least, where that leaves patches of two pixels


class PretrainContext(Context):
    """The parts of a run that has `pretrain`."""

    @property
    def pretrain(self) -> PretrainConfig:
        assert self.run.pretrain is not None
        return self.run.pretrain

    @cached_property
    def named(self) -> nn.Module | None:
        """The network that `model` names, where it is none of the space's; without its classifier."""
        text = self.pretrain.model
        if text in OURS:
            return None
        given = find_trained(text, what="model")
        network: Any
        if given.folder or given.file:
            network = load_network(text, what="model", image_size=self.run.data.image_size)
        else:
            network = _untrained(text, given, self.run)
        network.reset_classifier(0)
        return network.train()

    @cached_property
    def images(self) -> PretrainImages:
        config = self.run.data if self.named is None else images_seen(self.run.data, self.named)
        return PretrainImages(config, self.work, None if self.named is None else 224, self.given)

    @cached_property
    def space(self) -> Space:
        data = self.images.data
        return self.space_config(data.image_size).build(
            image_size=data.image_size, in_chans=data.in_chans, num_classes=0
        )

    def space_config(self, image_size: ImageSize) -> SpaceConfig:
        """run.space, with patches that fit these images where it names none."""
        config = self.run.space
        if getattr(config, "patch_size", 0) is None:
            return replace(config, patch_size=patch_for(image_size))  # type: ignore[call-arg]
        return config

    def student(self) -> nn.Module:
        """What learns, as it begins; the same at every call."""
        if self.named is not None:
            return copy.deepcopy(self.named)
        if self.pretrain.model == "supernet":
            return self.new_supernet()
        return build(self.space.largest(), generator=self.work.generator("pretrain"))

    @property
    def draws(self) -> Sampler:
        """Which Archs learn at a step."""
        return self.sampler.make() if self.pretrain.model == "supernet" else Fixed()

    def result(self) -> nn.Module:
        """The pretrained network, on the CPU."""
        return load_timm(self.models.folder("chosen")).eval()


class PretrainImages(RunImages):
    """A pretraining's images. Labels serve to look on; where they cannot, images are taken without them.

    Args:
        large: side of large images, in pixels, where nothing says another; None: what networks of ours take.
        given: images that are open already.
    """

    def __init__(self, config: DataConfig, work: Work, large: int | None, given: Data | None = None) -> None:
        super().__init__(config, work)
        self.large, self.given = large or LARGE, given
        self.notes: list[str] = []

    def open(self) -> Data:
        if self.given is not None:
            return self.given
        try:
            return open_data(self.config, large=self.large)
        except UserError as error:
            if not self.config.labels:
                raise
            data = open_data(replace(self.config, labels=False), large=self.large)
            self.notes.append(f"labels are not looked at, as they cannot be used: {error}")
            return data

    @property
    def has_labels(self) -> bool:
        return has_one_class(self.data.train.targets)

    @property
    def about(self) -> dict[str, Any]:
        return {**super().about, "class_names": None}  # features have no classes


def patch_for(image_size: ImageSize) -> int:
    """The largest patch, in pixels, that divides the image and leaves seven rows or more; of small images four."""
    sides = sides_of(image_size)
    fits = [size for size in range(1, min(sides) + 1) if all(side % size == 0 for side in sides)]
    for rows in (GRID, 4):
        enough = [size for size in fits if size >= 2 and min(sides) // size >= rows]
        if enough:
            return max(enough)
    return 1


def _untrained(text: str, given: Trained, run: Run) -> Any:
    """timm's network of that name with new weights, for the run's image size and channels."""
    data, options = run.data, {}
    if data.image_size is not None:
        with torch.device("meta"):
            has_patches = hasattr(timm.create_model(given.name), "patch_embed")
        options = {"img_size": sides_of(data.image_size)} if has_patches else {}
    try:
        with seeded_globals(seed_from(run.seed, "pretrain")):
            return timm.create_model(given.name, in_chans=data.in_chans or 3, **options)
    except UserError:
        raise
    except Exception as error:  # networks refuse sizes in many ways
        raise UserError(
            f"model {text!r} cannot be made for images of {data.image_size or 'its own'} pixels ({first_line(error)}). "
            "Give another data.image_size, or another model."
        ) from error
