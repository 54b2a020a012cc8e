"""SlimContext: a run that makes a trained network smaller, and its folder."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from vitnas.budget import Budget
from vitnas.errors import UserError
from vitnas.measure.latency import LatencyMeter
from vitnas.model import Model
from vitnas.records import Effort, Forecast
from vitnas.space import AroundConfig, AroundSpace
from vitnas.stages.context import Context
from vitnas.stages.results import timed_on
from vitnas.stages.run import SlimConfig
from vitnas.stages.slim.folded import Folded
from vitnas.stages.slim.original import SlimImages, fitted, images_for, load_original, space_around
from vitnas.stages.work import quick_meter


class SlimContext(Context):
    """The parts of a run that has `slim`."""

    @property
    def slim(self) -> SlimConfig:
        assert self.run.slim is not None
        return self.run.slim

    @cached_property
    def original(self) -> Model:
        """The network, at the size of the run's images, on the CPU."""
        size = self.run.data.image_size
        model = load_original(self.run.pretrained, size if self.slim.resample else None)
        return fitted(model, images_for(self.run.data, model, self.slim).image_size)

    @cached_property
    def images(self) -> SlimImages:
        return SlimImages(self.run, self.work, self.original, self.given)

    @cached_property
    def space(self) -> AroundSpace:
        config = self.run.space
        assert isinstance(config, AroundConfig)
        name = Path((self.run.pretrained or "").partition("@")[0]).name
        axes: tuple[str, ...] = self.slim.axes
        if self.slim.tokens != "none":
            if config.selector not in (None, self.slim.tokens):
                raise UserError(
                    f"tokens is {self.slim.tokens!r} and space.selector {config.selector!r}; both say who chooses the "
                    "tokens. Leave one out."
                )
            config, axes = replace(config, selector=self.slim.tokens), (*axes, "tokens")
        return space_around(self.original.arch, config, axes, name)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """What latency is measured on: the budget's targets and the export's."""
        return timed_on(self.run)

    @cached_property
    def meters(self) -> dict[str, LatencyMeter]:
        return {target: quick_meter(target) for target in Budget.parse(self.run.budget).latency_targets}

    @property
    def effort(self) -> Effort:
        """The effort that was asked for, or else taken by the forecast."""
        return Forecast.read(self.folder).effort

    @property
    def num_images(self) -> int:
        """How many train images activations are taken from: as asked for, or else as the forecast took."""
        return self.slim.images or Forecast.read(self.folder).images

    @cached_property
    def inherited(self) -> Folded:
        return Folded(self.work, self.images, self.new_supernet, self.original, self.num_images)
