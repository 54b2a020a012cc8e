"""Uniform sampling: one random Arch per step (single path one shot; AutoFormer section 4.2)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vitnas.sample.near import RandomConfig, Source
from vitnas.sample.sampler import Draw, Given
from vitnas.space import Space


@dataclass(frozen=True)
class Uniform:
    """One random Arch for the whole batch; from a Space, every gene uniform."""

    source: Source

    def draw(self, rng: random.Random) -> list[Draw]:
        return [Draw(arch=self.source.sample(rng))]


@dataclass(frozen=True, kw_only=True)
class UniformConfig(RandomConfig):
    """One random Arch per step."""

    kind = "uniform"

    def build(self, space: Space, given: Given) -> Uniform:
        return Uniform(self.source(space, given))
