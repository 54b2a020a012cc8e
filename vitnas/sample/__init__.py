"""Samplers: which Archs train at this step. `SAMPLERS` maps a word to the configuration that builds one.

The imports of configurations below are the table: a new Sampler is one file and one line.
"""

from __future__ import annotations

from vitnas.kinds import members
from vitnas.sample.focus import BestUp as BestUp
from vitnas.sample.focus import BestUpConfig as BestUpConfig
from vitnas.sample.focus import Focus as Focus
from vitnas.sample.focus import FocusConfig as FocusConfig
from vitnas.sample.hook import Hook as Hook
from vitnas.sample.hook import Moment as Moment
from vitnas.sample.identity import Found as Found
from vitnas.sample.identity import Identity as Identity
from vitnas.sample.identity import IdentityConfig as IdentityConfig
from vitnas.sample.identity import identity_probability as identity_probability
from vitnas.sample.near import NearBudget as NearBudget
from vitnas.sample.near import use_of as use_of
from vitnas.sample.sampler import Draw as Draw
from vitnas.sample.sampler import Fixed as Fixed
from vitnas.sample.sampler import Given as Given
from vitnas.sample.sampler import Sampler as Sampler
from vitnas.sample.sampler import SamplerConfig as SamplerConfig
from vitnas.sample.sandwich import Sandwich as Sandwich
from vitnas.sample.sandwich import SandwichConfig as SandwichConfig
from vitnas.sample.slices import Several as Several
from vitnas.sample.slices import SeveralConfig as SeveralConfig
from vitnas.sample.spread import Spread as Spread
from vitnas.sample.spread import SpreadConfig as SpreadConfig
from vitnas.sample.uniform import Uniform as Uniform
from vitnas.sample.uniform import UniformConfig as UniformConfig

SAMPLERS: dict[str, type[SamplerConfig]] = members(SamplerConfig, globals(), key="kind")
