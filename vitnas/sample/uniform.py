"""Uniform sampling: one random Arch per step (single path one shot; AutoFormer section 4.2)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vitnas.sample.sampler import Draw, Given, SamplerConfig
from vitnas.space import Space


@dataclass(frozen=True)
class Uniform:
    """Every gene uniform; one Arch for the whole batch."""

    space: Space

    def draw(self, rng: random.Random) -> list[Draw]:
        return [Draw(arch=self.space.sample(rng))]


@dataclass(frozen=True, kw_only=True)
class UniformConfig(SamplerConfig):
    """One random Arch per step."""

    kind = "uniform"

    def build(self, space: Space, given: Given) -> Uniform:
        return Uniform(space)
